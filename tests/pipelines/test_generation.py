"""text-generation and text-scoring: shapes of answers, streams of random numbers, and windows over long texts."""

import math

import pytest
import torch

from modernbert import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline
from modernbert.decoding.config import GenerationConfig
from modernbert.errors import InputError

TEXTS = ["The dog ran", "A cat", "The old house stood on a hill, and nobody", "Once upon a time"]


@pytest.fixture(scope="module")
def generate(heads):
    return pipeline("text-generation", heads / "CausalLM", max_new_tokens=12)


def test_one_text_and_a_list(generate):
    one = generate(TEXTS[0], seed=0)
    assert isinstance(one, list)
    assert set(one[0]) == {"generated_text"}
    assert one[0]["generated_text"].startswith(TEXTS[0])
    several = generate(TEXTS, seed=0, num_return_sequences=3)
    assert [len(answers) for answers in several] == [3] * 4
    assert all(
        a["generated_text"].startswith(text) for text, answers in zip(TEXTS, several, strict=True) for a in answers
    )
    assert len({a["generated_text"] for a in several[0]}) == 3


def test_the_prompt_can_be_left_out_and_ids_returned(generate):
    whole = generate(TEXTS[0], seed=0)[0]["generated_text"]
    assert TEXTS[0] + generate(TEXTS[0], seed=0, return_full_text=False)[0]["generated_text"] == whole
    ids = generate(TEXTS[0], seed=0, return_tensors=True)[0]["generated_token_ids"]
    prompt = generate.tokenizer(TEXTS[0]).input_ids
    assert ids[: len(prompt)] == prompt
    assert generate.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) == whole[len(TEXTS[0]) :]
    bare = generate(TEXTS[0], seed=0, return_tensors=True, add_special_tokens=False)[0]["generated_token_ids"]
    assert bare[: len(prompt) - 2] == prompt[1:-1]


def test_a_prefix_is_read_and_not_returned(generate):
    text = generate("the dog", prefix="Once upon a time ", do_sample=False)[0]["generated_text"]
    wanted = generate("Once upon a time the dog", do_sample=False)[0]["generated_text"]
    assert text == wanted.removeprefix("Once upon a time ")
    assert generate("A cat", seed=0, clean_up_tokenization_spaces=True) != []
    assert not generate.can_stream(clean_up_tokenization_spaces=True)


def test_a_text_s_draws_are_its_own(generate, heads):
    """The same seed and number give the same text, whatever else is in the batch and however it is cut."""
    whole = generate(TEXTS, seed=7, num_return_sequences=2)
    for options in ({"batch_size": 1}, {"batch_tokens": 30}):
        other = pipeline("text-generation", heads / "CausalLM", max_new_tokens=12, **options)
        assert other(TEXTS, seed=7, num_return_sequences=2) == whole
    changed = [TEXTS[0], "Something else", *TEXTS[2:]]
    assert generate(changed, seed=7, num_return_sequences=2)[2:] == whole[2:]
    assert generate(TEXTS, seed=8, num_return_sequences=2) != whole
    with_error = list(generate.stream([TEXTS[0], " ", *TEXTS[2:]], on_error="return", seed=7, num_return_sequences=2))
    assert with_error[2:] == whole[2:]
    assert list(generate.stream(TEXTS[2:], first=2, seed=7, num_return_sequences=2)) == whole[2:]
    torch.manual_seed(3)
    a = generate(TEXTS)
    torch.manual_seed(3)
    assert generate(TEXTS) == a  # without a seed, PyTorch's own decides


def test_pieces_are_the_text_of_a_call(generate):
    for number, text in enumerate(TEXTS):
        pieces = list(generate.pieces(text, number, seed=5))
        assert text + "".join(pieces) == generate(TEXTS, seed=5)[number][0]["generated_text"]
        assert len(pieces) > 3
    with pytest.raises(InputError, match="without beams"):
        generate.pieces(TEXTS[0], num_beams=2)


def test_ways_to_generate(generate, heads):
    model = AutoModelForCausalLM.from_pretrained(heads / "CausalLM")
    tokenizer = AutoTokenizer.from_pretrained(heads / "CausalLM")
    for options in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "repetition_penalty": 1.5}):
        answers = generate(TEXTS, **options)
        for text, answer in zip(TEXTS, answers, strict=True):
            ids = tokenizer(text, return_tensors="pt").input_ids
            new = model.generate(ids, max_new_tokens=12, **options)[0, ids.shape[1] :]
            assert answer[0]["generated_text"] == text + tokenizer.decode(new, skip_special_tokens=True)
    assert len(generate(TEXTS, num_beams=3, num_return_sequences=2)[0]) == 2
    assert generate(TEXTS, num_beams=2, do_sample=True, seed=1) == generate(TEXTS, num_beams=2, do_sample=True, seed=1)


def test_stops(generate):
    free = generate(TEXTS[3], do_sample=False, return_full_text=False)[0]["generated_text"]
    stop = free[3:5]
    for option in ("stop_strings", "stop_sequence"):
        cut = generate(TEXTS[3], do_sample=False, return_full_text=False, **{option: stop})[0]["generated_text"]
        assert free.startswith(cut)
        assert stop in cut
        assert len(cut) < len(free)


def test_what_callers_hand_over(generate):
    given = {"seed": 0, "return_tensors": True, "max_new_tokens": 5}
    prompt = generate.tokenizer(TEXTS[0]).input_ids
    config = GenerationConfig(max_new_tokens=3, eos_token_id=[])  # what the pipeline was made with wins
    answer = generate(TEXTS[0], generation_config=config, seed=0, return_tensors=True)[0]["generated_token_ids"]
    assert len(answer) == len(prompt) + 12
    stopped = generate(TEXTS, stopping_criteria=[lambda ids, scores: ids[:, -1] >= 0], **given)
    lengths = [len(ids) for ids in generate.tokenizer(TEXTS).input_ids]
    assert [len(a[0]["generated_token_ids"]) for a in stopped] == [n + 1 for n in lengths]
    seven = [lambda ids, scores: scores.index_fill(1, torch.tensor([7]), 1e9)]
    assert generate(TEXTS[0], logits_processor=seven, **given)[0]["generated_token_ids"] == [*prompt, *[7] * 5]
    allowed = generate(TEXTS[0], prefix_allowed_tokens_fn=lambda text, ids: [8], **given)[0]["generated_token_ids"]
    assert allowed == [*prompt, *[8] * 5]
    got = []
    streamer = TextStreamer(generate.tokenizer, on_text=lambda piece, last: got.append(piece))
    whole = generate(TEXTS[0], streamer=streamer, seed=0)[0]["generated_text"]
    assert "".join(got) == whole
    with pytest.raises(InputError, match="streamer takes one text without beams; there are 4"):
        generate(TEXTS, streamer=streamer)


def test_what_generate_takes_without_effect(generate, log):
    expected = generate(TEXTS[0], seed=0)
    assert generate(TEXTS[0], seed=0, use_cache=True, synced_gpus=False, assistant_model=None) == expected
    assert not log.text
    assert generate(TEXTS[0], seed=0, assistant_early_exit=3) == expected
    assert "assistant_early_exit changes nothing" in log.text
    with pytest.raises(InputError, match=r"penalty_alpha is 0.6; contrastive search is not served"):
        generate(TEXTS[0], penalty_alpha=0.6)


def test_what_guesses_tokens_changes_none(generate):
    expected = generate(TEXTS, seed=0)
    assert generate(TEXTS, seed=0, prompt_lookup_num_tokens=3) == expected
    assert generate(TEXTS, seed=0, assistant_model=generate.model, num_assistant_tokens=2) == expected


def test_lengths(generate, heads):
    plain = pipeline("text-generation", heads / "CausalLM")
    prompt = "word " * 400
    ids = plain(prompt, return_tensors=True, seed=0, eos_token_id=[])[0]["generated_token_ids"]
    assert len(ids) == plain.context  # up to the end of the context where nothing is said
    for length in (45, 50):
        answers = generate(TEXTS, max_length=length, max_new_tokens=None, return_tensors=True, eos_token_id=[])
        assert all(len(a[0]["generated_token_ids"]) == length for a in answers)


def by_hand(model, ids, window, stride, special):
    """Each token's log-probability from the window that scores it, one window at a time."""
    total, done = 0.0, 1
    first = True
    while first or done < len(ids):
        end = min(window if first else done + stride, len(ids))
        start = max(0, end - window)
        with torch.no_grad():
            scores = model(torch.tensor([ids[start:end]])).logits[0].log_softmax(-1)
        total += sum(scores[i - start - 1, ids[i]].item() for i in range(done, end) if ids[i] not in special)
        first, done = False, end
    return total


@pytest.mark.parametrize(("window", "stride"), [(512, None), (40, 7), (40, 39), (2, 1)])
def test_scores_are_sums_over_windows(window, stride, heads):
    score = pipeline("text-scoring", heads / "CausalLM", max_length=window)
    model = AutoModelForCausalLM.from_pretrained(heads / "CausalLM")
    texts = [*TEXTS, "The dog ran across the road and over the hill. " * 9]
    special = set(score.tokenizer.all_special_ids)
    options = {} if stride is None else {"stride": stride}
    for text, answer in zip(texts, score(texts, **options), strict=True):
        ids = score.tokenizer(text).input_ids
        expected = by_hand(model, ids, window, stride or window // 2, special)
        assert answer["log_likelihood"] == pytest.approx(expected, abs=1e-3)
        assert answer["tokens"] == len(ids) - 2  # all but [CLS] and [SEP]
        assert answer["perplexity"] == pytest.approx(math.exp(-expected / answer["tokens"]), rel=1e-4)
        assert answer["bits_per_byte"] == pytest.approx(-expected / math.log(2) / len(text.encode()), rel=1e-4)
    alone = score(texts[-1], **options)
    assert alone == score(texts, **options)[-1]
    parts = score(texts[-1], token_scores=True, **options)
    assert {name: parts[name] for name in alone} == alone
    assert "".join(texts[-1][part["start"] : part["end"]] for part in parts["token_scores"]) == texts[-1]
    assert math.fsum(part["score"] for part in parts["token_scores"]) == pytest.approx(alone["log_likelihood"])


def test_without_special_tokens_the_first_token_has_no_score(heads):
    score = pipeline("text-scoring", heads / "CausalLM")
    bare = score("The dog ran", add_special_tokens=False)
    assert bare["tokens"] == len(score.tokenizer("The dog ran", add_special_tokens=False).input_ids) - 1
    assert math.isnan(bare["bits_per_byte"])
    single = score("The", add_special_tokens=False)
    assert single["tokens"] == 0
    assert math.isnan(single["perplexity"])


def test_a_decoder_classifies_and_gives_features(heads):
    classify = pipeline("text-classification", heads / "DecoderSequenceClassification")
    answers = classify(TEXTS)
    assert [classify([text])[0] for text in TEXTS] == answers
    features = pipeline("feature-extraction", heads / "DecoderModel")(TEXTS[0], return_tensors=True)
    assert features.shape == (1, len(classify.tokenizer(TEXTS[0]).input_ids), 48)
