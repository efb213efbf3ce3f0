"""Every option, callable and output of transformers' generate gives the same here, on a small random decoder."""

import copy
import time

import pytest
import torch
import transformers

import modernbert
from modernbert.decoding.cache import DynamicCache
from modernbert.decoding.processors import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from modernbert.errors import InputError
from tests.parity.configs import peer
from tests.parity.test_generation import VALUES, prompts

IDS, MASK = prompts(7, [9, 6, 9])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    theirs = peer("ModernBertDecoderForCausalLM", {**VALUES, "num_hidden_layers": 3, "eos_token_id": 2})
    with torch.no_grad():
        theirs.decoder.bias[3] = -50.0  # padding is never generated
    theirs.save_pretrained(folder)
    transformers.logging.set_verbosity_error()
    ours = modernbert.ModernBertDecoderForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return theirs, ours


def both(models, ids=IDS, mask=MASK, **options):
    out = []
    for model in models:
        torch.manual_seed(0)
        out.append(model.generate(ids, attention_mask=mask, **{"max_new_tokens": 12, **copy.deepcopy(options)}))
    return out


class Ban(LogitsProcessor):
    """A processor that counts its calls and sees the padding that was given."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        assert input_ids.shape == (len(scores), 8 + self.calls)
        return scores.masked_fill(torch.arange(scores.shape[1]) % 5 == 0, float("-inf"))


class After(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 4 == 0


def allow(text, ids):
    return [(int(ids[-1]) * 7 + text + i) % 100 + 5 for i in range(9)]


@pytest.mark.parametrize("more", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"min_length": 18, "eos_token_id": list(range(4, 60))},
        {"min_new_tokens": 0, "min_length": 18, "eos_token_id": list(range(4, 60))},
        {"min_new_tokens": 5, "exponential_decay_length_penalty": (2, 1.5)},
        {"bad_words_ids": [[i] for i in range(4, 40)] + [[50, 51], [60, 61, 62], [2]]},
        {"sequence_bias": [[[i], 3.0] for i in range(10, 20)] + [[[70, 71], 9.0], [[12], -3.0]]},
        {"suppress_tokens": list(range(4, 60)), "begin_suppress_tokens": list(range(60, 90))},
        {"forced_eos_token_id": 2, "exponential_decay_length_penalty": (3, 1.5)},
        {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 1.4},
        {"guidance_scale": 1.7, "max_new_tokens": 6},
        {"prefix_allowed_tokens_fn": allow},
        {"logits_processor": [Ban()]},
        {"logits_processor": transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(0.4)])},
        {"stopping_criteria": [After()]},
        {"stopping_criteria": transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(14)])},
        {"renormalize_logits": True, "remove_invalid_values": True, "repetition_penalty": 1.3},
        {"eos_token_id": torch.tensor([2, 50, 60, 70])},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_the_same_tokens(options, more, models):
    if "guidance_scale" in options and "num_beams" in more:
        pytest.skip("transformers reads the prompts of other beams")
    a, b = both(models, **options, **more)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"typical_p": 0.6}, {"typical_p": 0.05}, {"epsilon_cutoff": 0.05}, {"eta_cutoff": 0.3},
        {"top_k": 4, "typical_p": 0.9}, {"top_k": None, "temperature": None},
    ],
    ids=str,
)  # fmt: skip
def test_the_same_draws(options, models):
    a, b = both(models, do_sample=True, **options)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"eos_token_id": list(range(4, 40))}, {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 3, "eos_token_id": list(range(4, 20))},
        {"num_beams": 2, "length_penalty": 0.5, "renormalize_logits": True, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)  # fmt: skip
def test_the_same_outputs(options, models):
    wanted = dict.fromkeys(("scores", "logits", "attentions", "hidden_states"), True)
    options = {**options, **{f"output_{name}": True for name in wanted}, "return_dict_in_generate": True}
    a, b = both(models, **options)
    assert torch.equal(a.sequences, b.sequences)
    beams = options.get("num_beams", 1) > 1
    if beams:
        assert torch.equal(a.beam_indices, b.beam_indices)
        torch.testing.assert_close(b.sequences_scores, a.sequences_scores, rtol=1e-5, atol=1e-5)
    for normalize in (False, True):
        x, y = (
            model.compute_transition_scores(out.sequences, out.scores, out.get("beam_indices"), normalize)
            for model, out in zip(models, (a, b), strict=True)
        )
        new = b.sequences[:, 9:]
        ended = (torch.isin(new, torch.tensor(options.get("eos_token_id", 2))).cumsum(1) > 1) | (new == 3)
        torch.testing.assert_close(y.masked_fill(ended, 0), x.masked_fill(ended, 0), rtol=0, atol=1e-4)
    for name in wanted:
        assert len(a[name]) == len(b[name])
    for x, y in zip((*a.hidden_states, *a.attentions), (*b.hidden_states, *b.attentions), strict=True):
        assert [part.shape for part in x] == [part.shape for part in y]
    real = MASK[0].bool()
    for i, step in enumerate(b.hidden_states[:3]):
        for x, y in zip(a.hidden_states[i], step, strict=True):
            x, y = (x[0, real], y[0, real]) if not i else (x[0], y[0])
            torch.testing.assert_close(y, x * (y.any() if i else 1), rtol=0, atol=2e-5)  # ours are zeros after an end
    for x, y in zip(a.attentions[0], b.attentions[0], strict=True):
        torch.testing.assert_close(y[0], x[0], rtol=0, atol=2e-5)


def test_vectors_instead_of_ids(models):
    ours = models[1]
    vectors = ours.get_input_embeddings()(IDS).detach()
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        out = []
        for model in models:
            torch.manual_seed(0)
            out.append(model.generate(inputs_embeds=vectors, attention_mask=MASK, max_new_tokens=8, **options))
        assert torch.equal(*out)
        torch.manual_seed(0)
        whole = ours.generate(IDS, inputs_embeds=vectors, attention_mask=MASK, max_new_tokens=8, **options)
        assert torch.equal(whole[:, 9:], out[1])
        assert torch.equal(whole, both(models, max_new_tokens=8, **options)[1])
    out = ours.generate(
        inputs_embeds=vectors[:1], max_new_tokens=4, return_dict_in_generate=True, output_hidden_states=True
    )
    assert out.hidden_states[0][0].shape == (1, 9, 64)
    with pytest.raises(InputError, match=r"inputs_embeds has shape \(3, 9\)"):
        ours.generate(inputs_embeds=vectors[:, :, 0])


def test_caches_of_transformers_are_read_and_added_to(models):
    theirs, ours = models
    ids, steps = prompts(1, [90, 70, 90]), torch.randint(4, 120, (3, 5))
    for config in (None, theirs.config):
        a, b = (transformers.DynamicCache(**({"config": config} if config else {})) for _ in range(2))
        masks, caches = torch.cat([ids[1], torch.ones_like(steps)], 1), []
        with torch.no_grad():
            for model, cache in ((theirs, a), (ours, b)):
                model(
                    ids[0], attention_mask=ids[1], position_ids=(ids[1].cumsum(1) - 1).clamp(0), past_key_values=cache
                )
                for i in range(5):
                    at = {"attention_mask": masks[:, : 91 + i]}
                    if model is theirs:
                        at["position_ids"] = ids[1].sum(1, keepdim=True) + i
                    out = model(steps[:, i : i + 1], past_key_values=cache, **at)
                caches.append((out.logits, cache))
        torch.testing.assert_close(caches[1][0], caches[0][0], rtol=0, atol=2e-5)
        assert b.get_seq_length() == a.get_seq_length() == 95
        for x, y in zip(a.layers, b.layers, strict=True):
            assert x.keys.shape == y.keys.shape
            assert torch.isclose(y.keys[0], x.keys[0], atol=2e-5)[:, -63:].all()  # what a local layer sees
        longer = torch.cat([ids[0], steps, torch.randint(4, 120, (3, 2))], 1)
        mask = torch.cat([masks, torch.ones(3, 2, dtype=torch.int64)], 1)
        given = {"attention_mask": mask, "max_new_tokens": 6, "return_dict_in_generate": True}
        x, y = (
            model.generate(longer, past_key_values=cache, **given) for model, cache in zip(models, (a, b), strict=True)
        )
        assert torch.equal(x.sequences, y.sequences)
        assert y.past_key_values is b
        assert torch.equal(y.sequences, ours.generate(longer, **given).sequences)


def test_the_cache_looks_like_transformers(models):
    theirs, ours = models
    with torch.no_grad():
        a, b = (model(IDS[:1], use_cache=True).past_key_values for model in models)
        assert len(a) == len(b) == 3
        assert b.get_seq_length() == 9
        for layer in range(3):
            assert torch.equal(b.layers[layer].keys, b[layer][0])
            for x, y in zip((a.layers[layer].keys, a.layers[layer].values), b[layer], strict=True):
                torch.testing.assert_close(y, x, rtol=0, atol=2e-5)
        assert [k.shape for k, _ in b] == [(1, 4, 9, 16)] * 3
        assert torch.equal(b[-1][0], b[2][0])
        with pytest.raises(IndexError, match="layer 3"):
            b[3]
        step, legacy = torch.tensor([[7]]), b.to_legacy_cache()
        expected = ours(step, past_key_values=b).logits
        torch.testing.assert_close(ours(step, past_key_values=legacy).logits, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(theirs(step, past_key_values=a).logits, expected, rtol=0, atol=2e-5)
        made, again = DynamicCache(), copy.deepcopy(b)
        ours(torch.cat([IDS[:1], step], 1), past_key_values=made)
        assert made.get_seq_length() == again.get_seq_length() == 10
        other = ours(torch.tensor([[8]]), past_key_values=again).logits
        torch.testing.assert_close(ours(torch.tensor([[8]]), past_key_values=made).logits, other, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="past_key_values holds 2 layers of"):
        ours(step, past_key_values=legacy[:2])
    with pytest.raises(InputError, match="past_key_values and cache are given"):
        ours.generate(IDS, past_key_values=made, cache=again)


def test_a_loop_of_one_s_own(models):
    model, ids, mask, cache = models[1], IDS, MASK, None
    for _ in range(5):
        given = model.prepare_inputs_for_generation(ids, past_key_values=cache, attention_mask=mask, use_cache=True)
        with torch.no_grad():
            out = model(**given)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    assert torch.equal(ids, both(models, max_new_tokens=5, eos_token_id=[])[0])


def test_groups_of_beams(models):
    ours = models[1]
    given = {"num_beams": 4, "num_beam_groups": 2, "num_return_sequences": 4, "max_new_tokens": 6, "eos_token_id": []}
    plain = ours.generate(
        IDS, attention_mask=MASK, **{**given, "num_beams": 2, "num_beam_groups": 1, "num_return_sequences": 2}
    )
    same = ours.generate(IDS, attention_mask=MASK, **given, diversity_penalty=0.0)
    assert torch.equal(same, plain.view(3, 2, -1).repeat_interleave(2, 1).view(12, -1))
    apart = ours.generate(IDS, attention_mask=MASK, **given, diversity_penalty=100.0)[:, 9:].view(3, 4, 6)
    for text, found in enumerate(apart):
        whole = {tuple(beam.tolist()) for beam in found}
        assert len(whole) == 4
        first = {beam[0] for beam in whole}
        assert len(first) >= 2, text


def test_time_runs_out_and_callables_that_are_none_are_refused(models):
    ours = models[1]
    began = time.monotonic()
    out = ours.generate(IDS, attention_mask=MASK, max_new_tokens=5000, max_time=0.05, eos_token_id=[])
    assert out.shape[1] > 9
    assert time.monotonic() - began < 5
    for name in ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"):
        with pytest.raises(InputError, match=f"{name} is 5; give a"):
            ours.generate(IDS, **{name: 5})
    with pytest.raises(InputError, match="prefix_allowed_tokens_fn returned"):
        ours.generate(IDS, prefix_allowed_tokens_fn=lambda text, ids: [])
    with pytest.raises(InputError, match="a logits_processor returned None"):
        ours.generate(IDS, logits_processor=LogitsProcessorList([lambda ids, scores: None]))
    stop = StoppingCriteriaList([lambda ids, scores: True])
    assert ours.generate(IDS, attention_mask=MASK, stopping_criteria=stop).shape == (3, 10)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_prompts_that_peft_prepares(models):
    peft = pytest.importorskip("peft")
    outs = []
    for model in models:
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
        for way in ({}, {"num_beams": 2}):
            outs.append(tuned.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, **way))
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])
    assert not torch.equal(outs[0], models[0].generate(IDS, attention_mask=MASK, max_new_tokens=6))


@pytest.mark.parametrize("way", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_the_batch_changes_nothing(way, models):
    """Also of an optimized model, and with callables, which see the whole batch."""
    frozen = copy.deepcopy(models[1])
    frozen.optimize_for_inference()
    given = {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [9], "logits_processor": [lambda ids, x: x - x[:, :1]]}
    for model in (models[1], frozen):
        draws = {"generator": [torch.Generator().manual_seed(i) for i in range(3)]} if "do_sample" in way else {}
        whole = model.generate(IDS, attention_mask=MASK, max_new_tokens=8, **given, **way, **draws)
        for i in range(3):
            draws = {"generator": [torch.Generator().manual_seed(i)]} if draws else {}
            alone = model.generate(IDS[i : i + 1][:, MASK[i] == 1], max_new_tokens=8, **given, **way, **draws)
            new = alone[0, int(MASK[i].sum()) :]
            assert torch.equal(whole[i, 9 : 9 + len(new)], new)
