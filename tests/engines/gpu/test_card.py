"""What only a card can show: the kernels that run there, recorded launches, and the same bits in any batch."""

import pytest
import torch

import modernbert
from modernbert import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel
from modernbert.engines.gpu.runner import GpuLayers
from modernbert.nn.attention import choose_backend
from modernbert.nn.attention.eager import EagerAttention
from modernbert.nn.packing import Packing
from tests.conftest import IDS

pytestmark = pytest.mark.gpu
REACHES = [(None, None), (None, 0), (64, 64), (63, 0)]
WIDE = {"num_hidden_layers": 4, "vocab_size": 2048}  # base size otherwise


@pytest.fixture
def card():
    return torch.device("cuda", 0)


def texts(lengths, vocabulary=2048, seed=0):
    ids = torch.randint(10, vocabulary - 10, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return ids, torch.tensor([0, *lengths]).cumsum(0).int()


def config_of(**changes):
    return {**WIDE, **IDS, **changes}


def error(got, wanted):
    """Relative, over all numbers."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_attention_and_its_gradients(card, name, dtype, reach):
    packing = Packing.from_lengths([5, 700, 0, 64, 300], card)
    given = [torch.randn(packing.tokens, 12, 64, device=card).to(dtype) for _ in range(3)]
    weight = torch.randn(packing.tokens, 12, 64, device=card)
    outs = []
    for backend, width in ((EagerAttention(), torch.float32), (choose_backend(name), dtype), (EagerAttention(), dtype)):
        q, k, v = (x.to(width).detach().requires_grad_() for x in given)
        out = backend.attend(q, k, v, backend.plan(packing, reach, width))
        outs.append((out.detach(), *torch.autograd.grad((out.float() * weight).sum(), (q, k, v))))
    for wanted, ours, rounded in zip(*outs, strict=True):
        assert ours.isfinite().all()
        assert error(ours, wanted) < 1.5 * error(rounded, wanted) + 1e-3


def test_flex_is_compiled_once_for_all_lengths(card):
    backend = choose_backend("flex_attention")
    counters = torch._dynamo.utils.counters["stats"]
    seen = []
    for lengths in ([300, 40], [900], [64] * 7, [129, 1], [4000, 3]):
        for reach in REACHES:
            packing = Packing.from_lengths(lengths, card)
            q, k, v = (torch.randn(packing.tokens, 12, 64, device=card, dtype=torch.bfloat16) for _ in range(3))
            backend.attend(q, k, v, backend.plan(packing, reach, q.dtype))
        seen.append(counters["unique_graphs"])
    assert seen[1:] == seen[:-1]


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_attention_of_a_text_does_not_follow_from_its_batch(card, name, reach):
    backend, lengths = choose_backend(name), [5, 700, 64, 300, 2000]
    packing = Packing.from_lengths(lengths, card)
    q, k, v = (torch.randn(packing.tokens, 12, 64, device=card, dtype=torch.bfloat16) for _ in range(3))
    whole = backend.attend(q, k, v, backend.plan(packing, reach, q.dtype))
    for (start, end), length in zip(packing.spans, lengths, strict=True):
        plan = backend.plan(Packing.from_lengths([length], card), reach, q.dtype)
        assert torch.equal(backend.attend(q[start:end], k[start:end], v[start:end], plan), whole[start:end]), length


def test_gradients_are_the_same_at_every_run(card):
    config = ModernBertConfig(**config_of(deterministic_flash_attn=True))
    model = ModernBertForMaskedLM(config).to(card, torch.bfloat16).train()
    ids, starts = texts([700, 90, 300])
    found = []
    for _ in range(3):
        model.zero_grad()
        model(ids, cu_seqlens=starts, labels=ids).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_text_is_the_same_bit_for_bit_in_any_batch(card, dtype):
    """By itself and in batches that are recorded, and in one that is too large for it."""
    model = ModernBertForMaskedLM(ModernBertConfig(**config_of())).to(card, dtype).eval().optimize_for_inference()
    assert isinstance(model.model.runner.layers, GpuLayers)
    lengths = [1, 7, 16, 100, 300, 513]
    ids, _ = texts(lengths)
    parts = ids.split(lengths)
    with torch.inference_mode():
        alone = [model(part, cu_seqlens=torch.tensor([0, len(part)])).logits for part in parts]
        for _ in range(3):  # the second time launches are recorded, the third they are replayed
            for part, own in zip(parts, alone, strict=True):
                assert torch.equal(model(part, cu_seqlens=torch.tensor([0, len(part)])).logits, own)
        for filling in ([], [40] * 30, [6000, 7000, 5000]):
            more, _ = texts(filling, seed=5) if filling else (ids[:0], None)
            starts = torch.tensor([0, *lengths, *filling]).cumsum(0).int()
            whole = model(torch.cat([ids, more]), cu_seqlens=starts).logits
            for own, part in zip(alone, whole.split([*lengths, *filling]), strict=False):
                assert torch.equal(own, part), (len(own), filling)


@pytest.fixture(scope="module")
def peers():
    """The same weights here in float32, and in transformers in bfloat16."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = ModernBertModel(ModernBertConfig(num_hidden_layers=22, **{k: v for k, v in config_of().items()
                                                                    if k != "num_hidden_layers"}))  # fmt: skip
    config = transformers.ModernBertConfig(**config_of(num_hidden_layers=22, reference_compile=False))
    config._attn_implementation = "sdpa"
    theirs = transformers.ModernBertModel(config)
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.to("cuda", torch.bfloat16).eval()
    theirs.rotary_emb = type(theirs.rotary_emb)(config).to("cuda")  # whose frequencies loading keeps in float32
    return ours.eval(), theirs


def test_bfloat16_is_no_further_from_float32_than_transformers(card, peers):
    ours, theirs = peers
    ids, starts = texts([300, 512, 17])
    oracle = ours.double().to(card)(ids, cu_seqlens=starts)[0].float()
    fast = ModernBertModel(ours.config).to(card, torch.bfloat16).eval()
    fast.load_state_dict(ours.state_dict())
    plain = fast(ids, cu_seqlens=starts)[0]
    served = fast.optimize_for_inference()(ids, cu_seqlens=starts)[0]
    with torch.no_grad():
        peer = torch.cat([theirs(part[None].to(card))[0][0] for part in ids.split([300, 512, 17])])
    for got in (plain, served):
        assert error(got, oracle) <= 1.02 * error(peer, oracle)


def test_gradients_in_bfloat16_are_no_further_than_transformers(card, peers):
    ours, theirs = peers
    ids, starts = texts([512])
    found, weight = [], torch.randn(512, 768, device=card)
    for model, dtype, given in (
        (ours, torch.float32, {"input_ids": ids.to(card), "cu_seqlens": starts}),
        (ours, torch.bfloat16, {"input_ids": ids.to(card), "cu_seqlens": starts}),
        (theirs, torch.bfloat16, {"input_ids": ids[None].to(card)}),
    ):
        model.to(card, dtype).zero_grad()
        (model(**given)[0].float().view(512, 768) * weight).sum().backward()
        found.append(torch.cat([p.grad.flatten().float() for _, p in sorted(model.named_parameters())]))
        model.zero_grad(set_to_none=True)
    assert error(found[1], found[0]) <= 1.1 * error(found[2], found[0])


def decoders(card):
    """The same decoder on the CPU, and optimized on the card."""
    config = modernbert.ModernBertDecoderConfig(**config_of(initializer_range=0.1))
    plain, fast = (modernbert.ModernBertDecoderForCausalLM(config).eval() for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    return plain, fast.to(card).optimize_for_inference()


def test_texts_that_end_one_by_one_leave_the_others_as_they_were(card):
    """Seven texts, then six and fewer, in the bucket of eight, where what ended frees its memory."""
    plain, fast = decoders(card)
    plain.to(card)
    prompts = torch.randint(10, 2000, (7, 20), device=card)
    ends = torch.bincount(plain.generate(prompts, max_new_tokens=8, eos_token_id=[])[:, 20:].flatten()).argsort()
    options = {"max_new_tokens": 40, "eos_token_id": ends[-6:].tolist(), "pad_token_id": 0}
    wanted = plain.generate(prompts, **options)
    for _ in range(3):
        assert torch.equal(fast.generate(prompts, **options), wanted)


def test_generation_takes_the_tokens_that_a_cpu_takes(card):
    plain, fast = decoders(card)
    prompts = torch.randint(10, 2000, (5, 40))
    mask = torch.ones_like(prompts)
    mask[1, 25:] = mask[3, 1:] = 0
    options = {"max_new_tokens": 60, "eos_token_id": [5], "pad_token_id": 0}
    wanted = plain.generate(prompts, mask, **options)
    for _ in range(3):  # steps are recorded on the way, and replayed with other caches
        assert torch.equal(fast.generate(prompts, mask, **options).cpu(), wanted)
    assert fast.generate(prompts, mask, do_sample=True, top_k=5, max_new_tokens=5).shape == (5, 45)
    generator = torch.Generator().manual_seed(3)  # of the CPU: what it draws is what it draws there
    sampled = fast.generate(prompts, mask, do_sample=True, generator=generator, **options).cpu()
    again = plain.generate(prompts, mask, do_sample=True, generator=torch.Generator().manual_seed(3), **options)
    assert torch.equal(sampled, again)


def test_no_logits_are_made_for_tokens_without_labels(card):
    config = ModernBertConfig(**config_of(vocab_size=50368, sparse_prediction=True))
    model = ModernBertForMaskedLM(config).to(card, torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    ids, starts = texts([1024] * 8)
    labels = torch.full_like(ids, -100)
    labels[::10] = ids[::10]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(ids, cu_seqlens=starts, labels=labels).loss.backward()
    everything = len(ids) * config.vocab_size * 4  # the float32 logits of all tokens
    assert torch.cuda.max_memory_allocated() - before < 0.7 * everything


def test_pipelines_on_a_card_answer_as_on_a_cpu():
    inputs = ["The capital of France is [MASK].", "Plants need [MASK] and water to grow."] * 20
    answers = [modernbert.pipeline("fill-mask", device=device, dtype="float32")(inputs) for device in ("cpu", 0)]
    for ours, theirs in zip(*answers, strict=True):
        assert [a["token"] for a in ours[:2]] == [a["token"] for a in theirs[:2]]
        assert ours[0]["score"] == pytest.approx(theirs[0]["score"], rel=1e-3)


def test_another_card_than_the_first():
    if torch.cuda.device_count() < 2:
        pytest.skip("one card")
    card = torch.device("cuda", 1)
    model = ModernBertForMaskedLM(ModernBertConfig(**config_of())).to(card, torch.bfloat16).eval()
    ids, starts = texts([30, 50])
    wanted = model(ids, cu_seqlens=starts).logits
    got = model.optimize_for_inference()(ids, cu_seqlens=starts).logits
    assert got.device == card
    assert error(got, wanted) < 0.02
