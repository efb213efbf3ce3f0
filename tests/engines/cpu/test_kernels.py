"""Our own kernels beside the plain path: products, attention, whole models; and their rows, bit for bit their own."""

import copy
import itertools
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel
from modernbert.engines.cpu import library as native
from modernbert.engines.cpu.operations import NativeWeight, Product, Program, angle_tables, attention, point_norm
from modernbert.engines.cpu.runner import CpuLayers
from modernbert.engines.weights import Norm
from modernbert.errors import BackendError
from modernbert.nn import rotary
from modernbert.nn.attention import choose_backend
from modernbert.nn.packing import Packing
from modernbert.nn.rotary import apply_rope, rope_frequencies, rope_tables
from tests.conftest import SMALL, padded_batch, threads

pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without the kernels")
DTYPES = [torch.float32, torch.bfloat16]


@settings(max_examples=40)
@given(
    st.integers(0, 300),
    st.integers(1, 90),
    st.integers(1, 100),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(1, 3),
)
def test_a_product_is_that_of_the_definition(rows, inputs, outputs, dtype, normed, number):
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    packed = NativeWeight(weight, bias)
    assert torch.equal(packed.to_dense(), weight)
    norm = Norm(torch.randn(inputs), torch.randn(inputs), 1e-5) if normed else None
    base = torch.randn(rows, outputs)
    with threads(number):
        out = Product(packed, norm, add=True)(x, base.clone())
    rows_in = F.layer_norm(x, (inputs,), norm.weight, norm.bias, 1e-5) if norm else x
    expected = base + F.linear(rows_in.double(), weight.double(), bias.double())
    rounded = dtype == torch.bfloat16 and native.library().multiplies_bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.1 if rounded else 2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_row_is_its_own_whatever_the_rows_and_threads(dtype, number):
    weights = {gated: NativeWeight(torch.randn(150, 97).to(dtype), torch.randn(150), gated) for gated in (False, True)}
    x, norm = torch.randn(700, 97), Norm(torch.randn(97), None, 1e-5)
    for packed in weights.values():
        product = Product(packed, norm)
        whole = product(x)
        with threads(number):
            for rows, start in itertools.product((1, 2, 3, 7, 12, 13, 17, 25, 64, 65, 129, 500), (0, 1, 199)):
                assert torch.equal(product(x[start : start + rows]), whole[start : start + rows]), rows


LENGTHS = st.lists(st.sampled_from([0, 1, 2, 16, 17, 63, 64, 65, 129, 300, 600]), min_size=1, max_size=5)


@settings(max_examples=40)
@given(
    LENGTHS,
    st.sampled_from([(None, None), (64, 64), (3, 5), (None, 0), (7, 0), (0, 0)]),
    st.sampled_from([2, 6, 10, 32, 64, 80]),
    st.sampled_from(DTYPES),
    st.integers(1, 3),
)
def test_attention_is_that_of_the_definition_and_a_text_is_its_own(lengths, reach, head_dim, dtype, number):
    packing, heads = Packing.from_lengths(lengths), 2
    qkv = torch.randn(packing.tokens, 3, heads, head_dim).to(dtype)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    angles = rope_tables(rope, head_dim, packing.positions_T, max_positions=1000)
    eager = choose_backend("eager")
    turned = apply_rope(qkv[:, :2].float().flatten(1, 2), *angles).split(heads, dim=1)
    expected = eager.attend(*turned, qkv[:, 2].float(), eager.plan(packing, reach, torch.float32))

    def attend(rows, starts, positions):
        out = qkv[rows].clone()
        q, k, v = out.unbind(1)
        own = tuple(t[rows].contiguous() for t in angles)
        return attention(q, k, v, q, starts, reach=reach, positions_T=positions, angles=own).clone()

    with threads(number):
        whole = attend(slice(None), torch.tensor(packing.starts), packing.positions_T)
    limit = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(whole.float(), expected, rtol=0, atol=limit)
    for first, last in packing.spans:
        alone = attend(slice(first, last), torch.tensor([0, last - first]), packing.positions_T[first:last].clone())
        assert torch.equal(alone, whole[first:last])


def test_not_a_number_stays_in_its_text():
    qkv = torch.randn(40, 3, 2, 8)
    qkv[3, :] = float("nan")
    q, k, v = qkv.unbind(1)
    out = attention(q, k, v, torch.empty(40, 2, 8), torch.tensor([0, 20, 40]))
    assert out[:20].isnan().all()
    assert out[20:].isfinite().all()


def test_layer_norm_of_a_table():
    table, ids, norm = torch.randn(30, 45), torch.randint(0, 30, (200,)), Norm(torch.randn(45), torch.randn(45), 1e-5)
    out, struct = torch.empty(200, 45), native.Normalize(rows=200, width=45)
    kept = point_norm(struct, norm)
    program = Program([struct])
    program.set(0, native.Normalize, ids=ids, table_data=table, table_stride=45, out_data=out, out_stride=45)
    program.run()
    assert torch.equal(kept.weight, norm.weight)
    torch.testing.assert_close(out, F.layer_norm(table[ids], (45,), norm.weight, norm.bias, 1e-5))


@pytest.mark.parametrize("theta", [1e4, 1.6e5])
def test_angles_are_those_of_the_plain_path(theta):
    positions = torch.tensor([0, 1, 2, 63, 64, 511, 8191, 100_000])
    frequencies, scale = rope_frequencies({"rope_type": "default", "rope_theta": theta}, 64, torch.device("cpu"))
    found = angle_tables(frequencies, scale, positions)
    for table, plain in zip(found, rotary.angle_tables(frequencies, scale, positions), strict=True):
        torch.testing.assert_close(table, plain, rtol=0, atol=2e-7)


def model_of(dtype=torch.float32, kind=ModernBertModel, **changes):
    torch.manual_seed(1)
    config = ModernBertConfig(**{**SMALL, **changes}, initializer_range=0.2)
    return kind(config).eval().to(dtype)


def batch(lengths=(300, 1, 64, 130)):
    return padded_batch(lengths)


@pytest.mark.parametrize("changes", [
    {}, {"attention_bias": True, "mlp_bias": True, "norm_bias": True}, {"hidden_activation": "silu"},
    {"hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 97}, {"hidden_activation": "relu"},
    {"hidden_size": 36, "num_attention_heads": 2}, {"local_attention": 6},
], ids=str)  # fmt: skip
@torch.no_grad()
def test_a_fused_pass_is_that_of_the_plain_path(changes):
    ids, mask = batch()
    plain, fast = model_of(**changes), model_of(**changes).optimize_for_inference()
    assert isinstance(fast.runner.layers, CpuLayers)
    expected = plain(ids, attention_mask=mask, output_hidden_states=True)
    got = fast(ids, attention_mask=mask, output_hidden_states=True)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.last_hidden_state, fast(ids, attention_mask=mask).last_hidden_state)
    embeds = plain.embeddings.tok_embeddings(ids)
    assert torch.equal(fast(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, got.last_hidden_state)


@torch.no_grad()
def test_bfloat16_is_nearer_to_float32_than_the_plain_path_is():
    ids, mask = batch()
    exact = model_of()(ids, attention_mask=mask).last_hidden_state[mask == 1]
    states = [
        model(ids, attention_mask=mask).last_hidden_state[mask == 1]
        for model in (model_of(torch.bfloat16), model_of(torch.bfloat16).optimize_for_inference())
    ]
    plain, fast = (torch.cosine_similarity(state.float(), exact, dim=-1).min() for state in states)
    assert states[1].dtype == torch.bfloat16
    assert fast >= plain
    assert fast > 0.9995


def test_what_listens_or_changes_takes_the_plain_path():
    ids, mask = batch()
    model, seen = model_of().optimize_for_inference(), []
    assert isinstance(model.runner.layers, CpuLayers)
    handle = model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert model.runner is None
    model(ids, attention_mask=mask)
    assert len(seen) == 1
    handle.remove()
    model.optimize_for_inference()(ids, attention_mask=mask)
    assert len(seen) == 1
    assert model.runner is not None
    with torch.no_grad():
        model.layers[0].mlp_norm.weight.mul_(2)
    assert model.runner is None
    again = model_of().optimize_for_inference()
    for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert other.runner is None
        torch.testing.assert_close(other(ids, attention_mask=mask)[0], again(ids, attention_mask=mask)[0])
    assert again.runner is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again(ids, attention_mask=mask)
    assert again.runner is None


@pytest.mark.parametrize("implementation", ["auto", "eager", "sdpa"])
@torch.no_grad()
def test_attention_weights_and_other_backends_run_between_the_kernels(implementation):
    ids, mask = batch()
    config = ModernBertConfig(**SMALL, initializer_range=0.2)
    torch.manual_seed(1)
    plain = ModernBertModel(config, "eager").eval()
    fast = ModernBertModel(config, implementation).eval()
    fast.load_state_dict(plain.state_dict())
    fast.optimize_for_inference()
    wants = {"output_attentions": implementation != "sdpa", "output_hidden_states": True}
    expected, got = (model(ids, attention_mask=mask, **wants) for model in (plain, fast))
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(got.attentions or (), expected.attentions or (), strict=implementation != "sdpa"):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert isinstance(fast.runner.layers, CpuLayers)


@torch.no_grad()
def test_inner_hooks_and_inner_dropout_are_served():
    ids, mask = batch()
    model, seen = model_of(mlp_dropout=0.5).optimize_for_inference(), []
    model.layers[0].mlp.Wi.register_forward_hook(lambda *_: seen.append(1))
    still = model(ids, attention_mask=mask)[0]
    assert seen
    model.layers[1].mlp.drop.train()
    assert not torch.equal(model(ids, attention_mask=mask)[0], still)


@torch.no_grad()
def test_a_default_dtype_of_another_kind_is_nothing_to_the_kernels():
    ids, mask = batch()
    model = model_of().optimize_for_inference()
    expected = model(ids, attention_mask=mask)[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(model(ids, attention_mask=mask)[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_library_of_another_version_is_not_taken(monkeypatch):
    monkeypatch.setattr(native, "_LAYOUT", 99)
    with pytest.raises(OSError, match="another version"):
        native.Library(native.FILE)


def test_one_model_in_several_threads():
    model = model_of(kind=ModernBertForMaskedLM).optimize_for_inference()
    batches = [batch((n, 5, 70)) for n in (70, 200, 300, 90)]
    with torch.no_grad():
        expected = [model(ids, attention_mask=mask).logits for ids, mask in batches]
    wrong = []

    def serve(number):
        ids, mask = batches[number]
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(ids, attention_mask=mask).logits, expected[number]):
                    wrong.append(number)

    workers = [threading.Thread(target=serve, args=(i,)) for i in range(len(batches))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


SAY = """
import logging, sys, torch
from pathlib import Path
logging.basicConfig(level=logging.WARNING)
from modernbert.engines.cpu import library
if len(sys.argv) > 1 or {missing!r}: library.FILE = Path({missing!r} or library.FILE)
from modernbert import ModernBertModel, ModernBertConfig
torch.manual_seed(0)
config = ModernBertConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
for _ in range(2): model = ModernBertModel(config).optimize_for_inference()
with torch.inference_mode(): print(model(torch.arange(40)[None])[0].isfinite().all().item(), model.runner is not None)
"""


def test_without_kernels_pytorch_serves_and_says_so_once(tmp_path):
    done = run(SAY.format(missing=str(tmp_path / "none.so")))
    assert done.stdout == "True False\n"
    assert done.stderr.count("without its compiled kernels") == 1
    (tmp_path / "broken.so").write_text("not a library")
    done = run(SAY.format(missing=str(tmp_path / "broken.so")))
    assert done.stdout == "True False\n"
    assert done.stderr.count("cannot be loaded") == 1
    done = run(SAY.format(missing=""), MODERNBERT_KERNELS="none")
    assert (done.stdout, done.stderr) == ("True False\n", "")
    assert (
        f"choose one of {', '.join(native._NAMES)}, none"
        in run(SAY.format(missing=""), MODERNBERT_KERNELS="sse").stderr
    )


def test_the_backend_by_name(monkeypatch):
    assert choose_backend("native").name == "native"
    monkeypatch.setattr("modernbert.engines.cpu.attention.library", lambda: None)
    with pytest.raises(BackendError, match="needs the compiled kernels"):
        choose_backend("native")


def test_the_native_backend_trains_as_sdpa_does():
    ids, mask = batch()
    found = []
    for implementation in ("sdpa", "native"):
        torch.manual_seed(1)
        model = ModernBertModel(ModernBertConfig(**SMALL), implementation).train()
        out = model(ids, attention_mask=mask)[0]
        along = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        found.append([out, *torch.autograd.grad((out * along).sum(), list(model.parameters()))])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)  # gradients reach some tens
