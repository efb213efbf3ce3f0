"""Options of generation: what contradicts itself is one clear error, and callers see each by name."""

import dataclasses
import inspect

import pytest

from modernbert import ModernBertDecoderForCausalLM
from modernbert.decoding.options import GenerateOptions, GenerationOptions
from modernbert.errors import InputError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loudness": 3}, "generate has no option loudness; there are"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number of at least 1"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "min_new_tokens is 3 and max_new_tokens is 2"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0; it must be a number above 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5; it must be a number above 0 and at most 1"),
        ({"do_sample": True, "min_p": -0.1}, "min_p is -0.1; it must be a number of at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be a number above 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"num_beams": 1.5}, "num_beams is 1.5"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2; without do_sample=True there are as many"),
        ({"num_beams": 2, "num_return_sequences": 3}, "as many different ones as num_beams, 2"),
        ({"num_beams": 2, "do_sample": True, "num_return_sequences": 3}, "a beam search keeps num_beams, 2"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'; choose "),
        (
            {"num_beams": 2, "length_penalty": "x"},
            "length_penalty is 'x'; it must be a number of at least -100 and at most 100",
        ),
        ({"do_sample": "no"}, "do_sample is 'no'; choose True or False"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'; it must be a whole number of at least 0"),
        ({"eos_token_id": [-2]}, "it must be a whole number of at least 0"),
        ({"pad_token_id": "a"}, "pad_token_id is 'a'"),
        ({"num_beams": 2, "early_stopping": 2}, "early_stopping is 2; choose "),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty is nan"),
        ({"num_beams": 3, "num_beam_groups": 2}, "num_beam_groups is 2; it must divide num_beams, 3"),
        ({"bad_words_ids": [[]]}, "bad_words_ids holds an empty list"),
        ({"bad_words_ids": 5.5}, "bad_words_ids is 5.5; it must be a list of lists"),
        ({"sequence_bias": [5]}, "sequence_bias is [5]; give pairs of a list of ids and a number"),
        ({"exponential_decay_length_penalty": 5}, "takes two numbers"),
        ({"penalty_alpha": 0.6}, "penalty_alpha is 0.6; contrastive search is not served"),
        ({"custom_generate": "x/y"}, "custom_generate is 'x/y'; generate runs no code of others"),
        ({"force_words_ids": [[5]]}, "constrained beam search is not served"),
        ({"stop_strings": 5}, "stop_strings is 5; it must be a string"),
        ({"stop_strings": ["a", ""]}, "stop_strings is ['a', '']; give strings with something in them"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(InputError) as error:
        GenerationOptions.make(given, {})
    assert message in str(error.value)


def test_none_lifts_the_limits_of_sampling():
    defaults = {"do_sample": True, "temperature": 0.5, "top_k": 7, "max_new_tokens": 4}
    options = GenerationOptions.make({"top_k": None, "temperature": None, "max_new_tokens": None}, defaults)
    assert (options.top_k, options.temperature, options.max_new_tokens) == (0, 1.0, 4)
    assert GenerationOptions.make({"top_k": None}, {}).top_k == GenerationOptions().top_k  # without sampling


def test_a_model_s_defaults_yield_to_what_is_given():
    defaults = {"do_sample": True, "temperature": 0.5, "max_length": 40, "eos_token_id": 7, "another": 1}
    options = GenerationOptions.make({"max_new_tokens": 5}, defaults)
    assert (options.temperature, options.max_length, options.max_new_tokens) == (0.5, None, 5)
    assert options.eos_token_id == (7,)
    assert GenerationOptions.make({"eos_token_id": [1, 2]}, defaults).eos_token_id == (1, 2)
    assert not GenerationOptions.make({"do_sample": False}, {**defaults, "temperature": 0.0}).do_sample  # is off
    assert GenerationOptions.make({}, {"max_length": 9, "max_new_tokens": 7}).new_tokens(12) == 7
    assert GenerationOptions.make({"temperature": None}, {}).temperature == 1.0
    assert GenerationOptions.make({"eos_token_id": -1}, defaults).eos_token_id == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.7}, "temperature: without effect; give do_sample=True too"),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.0}, "top_k, top_p: without effect"),
        ({"length_penalty": 2.0}, "length_penalty: without effect; give num_beams too"),
        ({"output_scores": True}, "output_scores: without effect; give return_dict_in_generate=True too"),
        ({"max_length": 9, "max_new_tokens": 3}, "max_new_tokens and max_length are given; max_new_tokens counts"),
        ({"synced_gpus": True}, "synced_gpus changes nothing"),
        ({"cache_implementation": "static"}, "cache_implementation changes nothing: the cache is laid out"),
    ],
)
def test_what_is_off_or_has_no_meaning_is_logged(given, message, log):
    options = GenerateOptions.make(given, {})
    assert message in log.text
    assert options == GenerateOptions.make({name: given[name] for name in given if name == "max_new_tokens"}, {})


def test_what_is_usual_or_off_is_not_logged(log):
    given = {"temperature": 1.0, "length_penalty": 1.0, "synced_gpus": False, "penalty_alpha": None, "use_cache": True}
    GenerateOptions.make({**given, "output_scores": False}, {"temperature": 0.3})
    assert not log.text


def test_how_many_new_tokens(log):
    assert GenerationOptions.make({}, {}).new_tokens(7) == 20
    assert GenerationOptions.make({"max_new_tokens": 3}, {}).new_tokens(7) == 3
    assert GenerationOptions.make({"max_length": 9}, {}).new_tokens(7) == 2
    for length in (6, 7):
        with pytest.raises(InputError, match=f"max_length is {length} and the prompt has 7 tokens already"):
            GenerationOptions.make({"max_length": length}, {}).new_tokens(7)
    with pytest.raises(InputError, match="leaves room for 2 after the prompt"):
        GenerationOptions.make({"max_length": 9, "min_new_tokens": 3}, {}).new_tokens(7)
    assert GenerationOptions.make({"max_length": 1}, {}).new_tokens(1) == 1
    assert GenerationOptions.make({"max_length": 1}, {}).new_tokens(7) == 1  # as the reference's sample has it
    assert "one new token" in log.text


@pytest.mark.parametrize("name", ["generate", "stream"])
def test_generate_and_stream_show_each_option(name):
    parameters = inspect.signature(getattr(ModernBertDecoderForCausalLM, name)).parameters
    options = [f.name for f in dataclasses.fields(GenerateOptions if name == "generate" else GenerationOptions)]
    assert list(parameters)[: 3 + len(options)] == ["self", "input_ids", "attention_mask", *options]
    assert {parameters[option].default for option in options} == {None}
    assert {parameters[option].kind for option in options} == {inspect.Parameter.KEYWORD_ONLY}
    assert parameters["max_length"].annotation == "int | None"
    assert parameters["early_stopping"].annotation == "bool | str | None"
    assert parameters["eos_token_id"].annotation == "int | Sequence[int] | None"
    assert parameters["bad_words_ids"].annotation == "Sequence[Sequence[int]] | None"
    assert parameters["stop_strings"].annotation == "str | Sequence[str] | None"
    assert "tokenizer" in parameters
