"""Models that were made ready to serve by the kernels for cards, against the same models as they were."""

import copy
import gc
import weakref

import pytest
import torch

import modernbert
from modernbert import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel
from modernbert.engines.gpu import flash, graphs, operations
from modernbert.engines.gpu.runner import GpuLayers
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.inputs import Inputs, pack_inputs
from modernbert.nn.packing import Packing
from tests.conftest import SMALL, padded_batch, with_biases

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
TINY = {
    **SMALL, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "local_attention": 8, "initializer_range": 0.3, "max_position_embeddings": 64,
}  # fmt: skip
BIASED = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "decoder_bias": True}
PARTIAL = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                              "original_max_position_embeddings": 32},
           "sliding_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}}  # fmt: skip
CONFIGS = {
    "plain": {},
    "biases": BIASED,
    "pruned": {"pruned_heads": {1: [0]}},
    "scaled": {"rope_parameters": PARTIAL},
    "silu": {"hidden_activation": "silu"},
}


@pytest.fixture
def eager_kernel(monkeypatch):
    """Eager attention where FlashAttention's kernels would be, over what those are given."""
    asked = []

    def attend(q, k, v, cu_seqlens, longest, window, deterministic):
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        assert max(lengths) <= longest
        asked.append((longest, len(lengths)))
        assert sum(lengths) == len(q)  # rows of no text would be whatever memory held
        packing, reach = Packing.from_lengths(lengths, q.device), tuple(None if w < 0 else w for w in window)
        return EagerAttention().attend(q, k, v, EagerAttention().plan(packing, reach, q.dtype))

    monkeypatch.setattr(flash, "why_not", lambda: "")
    monkeypatch.setattr(flash, "kernel", lambda device: attend)
    monkeypatch.setattr(flash, "DTYPES", (torch.float32,))
    monkeypatch.setattr(graphs.Graphs, "_record", lambda self, function: function)  # it reads the host's memory
    return asked


def pair(place, cls=ModernBertForMaskedLM, implementation="sdpa", **changes):
    """A model as it is, and optimized by the kernels."""
    config = cls.config_class(**{**TINY, **changes})
    plain = with_biases(cls(config, "sdpa").eval().to(place), std=0.3)
    fast = cls(config, implementation).eval().to(place)
    fast.load_state_dict(plain.state_dict())
    fast.optimize_for_inference()
    assert isinstance(fast.base_model.runner.layers, GpuLayers)
    return plain, fast


def batch(place, lengths=(20, 13, 5), side="right"):
    ids, mask = padded_batch(lengths, side)
    return ids.to(place), mask.to(place)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_an_encoder_gives_what_it_gave(place, changes, implementation, eager_kernel):
    plain, fast = pair(place, implementation=implementation, **changes)
    for side in ("left", "right"):
        ids, mask = batch(place, side=side)
        wanted, got = (model(ids, mask, output_hidden_states=states) for model, states in ((plain, True), (fast, True)))
        torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=3e-5)
        for ours, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)
        recorded = fast(ids, mask).logits  # where launches are recorded, states are not given
        torch.testing.assert_close(recorded, wanted.logits, rtol=0, atol=3e-5)
    assert len(fast.model.runner.layers.graphs) == (implementation == "flash_attention_2")


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_a_text_is_the_same_bit_for_bit_in_any_batch(place, implementation, eager_kernel):
    _, fast = pair(place, implementation=implementation)
    ids, mask = batch(place)
    with torch.no_grad():
        whole = fast(ids, mask).logits
        for row, length in enumerate(mask.sum(1).tolist()):
            assert torch.equal(fast(ids[row : row + 1, :length]).logits[0], whole[row, :length])


def test_recordings_keep_nothing_of_earlier_batches(place, eager_kernel):
    plain, fast = pair(place, ModernBertModel, "flash_attention_2")
    for lengths in ((30, 2), (17, 9, 1), (18,), (25, 1, 1), (3,), (32,)):
        ids = torch.randint(3, 40, (sum(lengths),), device=place)
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        with torch.inference_mode():
            got = fast(ids, cu_seqlens=starts)[0]
        torch.testing.assert_close(got, plain(ids, cu_seqlens=starts)[0], rtol=0, atol=3e-5)
    assert len(fast.runner.layers.graphs) == 3  # 32 tokens of one text, 32 of up to four; 16 of one
    assert set(eager_kernel) == {(128, 4 + 1), (128, 1 + 1)}  # of the longest, and texts with one to fill


def test_positions_and_vectors_of_a_caller(place, eager_kernel):
    plain, fast = pair(place, ModernBertModel, "flash_attention_2")
    ids, mask = batch(place)
    positions = torch.arange(ids.shape[1], device=place)[None] * 2 % 50
    vectors = plain.embeddings.tok_embeddings(ids).detach()
    for given in ({"input_ids": ids, "position_ids": positions}, {"inputs_embeds": vectors}):
        wanted, got = (model(attention_mask=mask, **given)[0] for model in (plain, fast))
        torch.testing.assert_close(got, wanted, rtol=0, atol=3e-5)


def test_padding_inside_a_text_and_rotation_by_length(place, eager_kernel):
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    changes = {"rope_parameters": {"full_attention": dynamic, "sliding_attention": dynamic}}
    for given in ({}, {**changes, "max_position_embeddings": 16}):
        plain, fast = pair(place, ModernBertModel, "flash_attention_2", **given)
        ids, mask = batch(place)
        mask[0, 3:9] = 0
        wanted, got = (model(ids, mask)[0] for model in (plain, fast))
        torch.testing.assert_close(got, wanted, rtol=0, atol=3e-5)
        assert not len(fast.runner.layers.graphs)


def test_nothing_to_encode(place, eager_kernel):
    plain, fast = pair(place, ModernBertModel, "flash_attention_2")
    ids, mask = batch(place)
    assert torch.equal(fast(ids, torch.zeros_like(mask))[0], plain(ids, torch.zeros_like(mask))[0])
    mask[1] = 0
    torch.testing.assert_close(fast(ids, mask)[0], plain(ids, mask)[0], rtol=0, atol=3e-5)


def test_it_ends_with_the_weights_it_was_made_of(place):
    plain, fast = pair(place, ModernBertModel)
    ids, mask = batch(place)
    again = copy.deepcopy(fast)
    assert again.runner is None
    saved, own = fast.state_dict(), plain.state_dict()
    assert list(saved) == list(own)
    assert all(torch.equal(saved[name], own[name]) for name in own)
    with torch.no_grad():
        plain.layers[1].mlp_norm.weight.mul_(2)
        fast.layers[1].mlp_norm.weight.mul_(2)
    torch.testing.assert_close(fast(ids, mask)[0], plain(ids, mask)[0], rtol=0, atol=3e-5)
    assert fast.runner is None


def test_it_stands_back_where_someone_listens(place):
    _, fast = pair(place, ModernBertModel)
    ids, mask = batch(place)
    heard = []
    fast.layers[2].mlp.Wi.register_forward_hook(lambda *given: heard.append(1))
    fast(ids, mask)
    assert heard
    assert fast.runner is None


def test_gradients_pass_where_they_are_wanted(place):
    plain, fast = pair(place, ModernBertModel)
    ids, mask = batch(place)
    found = []
    for model in (plain, fast):
        vectors = plain.embeddings.tok_embeddings(ids).detach().requires_grad_()
        model(inputs_embeds=vectors, attention_mask=mask)[0].square().sum().backward()
        found.append(vectors.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def by_kernels_and_by_pytorch(monkeypatch, model):
    """Go through two rounds, in the first of which the kernels rotate and gate."""
    for serving in (operations.serving, lambda dtype, device: False):
        monkeypatch.setattr(operations, "serving", serving)
        model.zero_grad()
        yield


@pytest.mark.parametrize("changes", [{}, BIASED], ids=["plain", "biases"])
def test_training_is_what_it_was(place, changes, monkeypatch):
    """Rotation and gate by the kernels, forward and backward, against PyTorch's own."""
    config = ModernBertConfig(**{**TINY, **changes})
    model = ModernBertForMaskedLM(config, "sdpa").train().to(place)
    ids, mask = batch(place)
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for _ in by_kernels_and_by_pytorch(monkeypatch, model):
        loss = model(ids, mask, labels=labels).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients_are_what_they_were(place, monkeypatch):
    model = ModernBertForMaskedLM(ModernBertConfig(**TINY), "eager").train().to(place)
    ids, mask = batch(place)
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for _ in by_kernels_and_by_pytorch(monkeypatch, model):
        vectors = model.model.embeddings.tok_embeddings(ids).detach().requires_grad_()
        loss = model(inputs_embeds=vectors, attention_mask=mask, labels=labels).loss
        (slope,) = torch.autograd.grad(loss, vectors, create_graph=True)
        slope.square().sum().backward()
        found.append([vectors.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


DECODER = {**TINY, "num_hidden_layers": 2, "global_attn_every_n_layers": 2}


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_generation_takes_the_same_tokens(place, implementation, eager_kernel):
    cls = modernbert.ModernBertDecoderForCausalLM
    plain, fast = pair(place, cls, implementation, **DECODER)
    ids, mask = batch(place, (9, 6, 1))
    options = {"max_new_tokens": 12, "eos_token_id": list(range(3, 8)), "pad_token_id": 0}  # texts end one by one
    wanted, got = (model.generate(ids, mask, **options) for model in (plain, fast))
    assert torch.equal(got, wanted)
    steps = [key for key in fast.model.runner.layers.graphs._kept if isinstance(key, int)]
    assert steps
    before = len(fast.model.runner.layers.graphs)
    assert torch.equal(fast.generate(ids, mask, **options), wanted)  # another cache, the same recordings
    assert len(fast.model.runner.layers.graphs) == before


def test_a_cache_goes_on_where_it_was(place, eager_kernel):
    cls = modernbert.ModernBertDecoderModel
    plain, fast = pair(place, cls, "flash_attention_2", **DECODER, **BIASED)
    ids, _ = batch(place, (14, 14))
    wanted = plain(ids, use_cache=False)[0]
    with torch.no_grad():
        first = fast(ids[:, :9], use_cache=True)
        cache, outs = first.past_key_values, [first.last_hidden_state]
        for column in range(9, 14):
            outs.append(fast(ids[:, column : column + 1], past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(outs, 1), wanted, rtol=0, atol=3e-5)
    with torch.no_grad():  # a text that is gone on with by itself is what it was
        alone = fast(ids[:1, :9], use_cache=True)
        for column, out in zip(range(9, 14), outs[1:], strict=True):
            got = fast(ids[:1, column : column + 1], past_key_values=alone.past_key_values)[0]
            assert torch.equal(got[0], out[0])


def test_a_step_rotates_by_the_positions_of_a_caller(place):
    plain, fast = pair(place, modernbert.ModernBertDecoderModel, **DECODER)
    ids, _ = batch(place, (14, 14))
    outs = []
    for model in (plain, fast):
        with torch.no_grad():
            cache = model(ids[:, :9], use_cache=True).past_key_values
            outs.append(model(ids[:, 9:10], past_key_values=cache, position_ids=torch.tensor([[30]], device=place))[0])
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=3e-5)


def test_nothing_holds_the_card_once_it_has_ended(place):
    _, fast = pair(place, ModernBertModel)
    fast(*batch(place))
    ended = weakref.ref(fast.runner.layers)
    gc.collect()
    gc.disable()
    try:
        fast.thaw()
        assert ended() is None
    finally:
        gc.enable()


def test_inputs_go_to_a_card_in_one_piece():
    ids, mask = batch("cpu")
    mask[0, 4] = 0
    positions = torch.arange(20)[None] + 3
    for given in ({}, {"position_ids": positions}):
        inputs = pack_inputs(Inputs(ids, mask, **given), ModernBertConfig(**TINY), torch.float32, torch.device("cpu"))
        sizes = []

        def send(rows, sizes=sizes):
            sizes.append(sum(map(len, rows)))
            return torch.cat(rows)

        there = inputs.copied(send, torch.device("cpu"))
        assert len(sizes) == 1
        assert torch.equal(there.ids_T, inputs.ids_T)
        assert torch.equal(there.rope_positions_T, inputs.rope_positions_T)
        assert (there.rope_positions_T is there.packing.positions_T) == (not given)
        for name in ("positions_T", "text_T", "indices_T", "cu_seqlens"):
            assert torch.equal(getattr(there.packing, name), getattr(inputs.packing, name)), name
        assert there.packing.cu_seqlens.dtype == torch.int32
        assert (there.packing.lengths, there.packing.gaps, there.packing.grid) == (
            inputs.packing.lengths, inputs.packing.gaps, inputs.packing.grid,
        )  # fmt: skip
        assert torch.equal(there.restore(there.ids_T), inputs.restore(inputs.ids_T))
