"""Random calls of models and tokenizers, right and wrong ones: each ends in finite numbers or in one line of ours.

`MODERNBERT_FUZZ=5000 pytest tests/models/test_fuzz.py` makes as many calls of each kind.
"""

import os
import random

import numpy as np
import pytest
import torch

from modernbert import DecoderCache, Tokenizer
from modernbert.pipelines import small_model
from tests.conftest import model_of
from tests.heads import CLASSES

CALLS = int(os.environ.get("MODERNBERT_FUZZ", "300"))
FIRST = int(os.environ.get("MODERNBERT_FUZZ_SEED", "0"))


def check_error(error, what):
    """An error that is meant for the caller: one line of reasonable length, of a kind that callers expect."""
    message = str(error)
    assert isinstance(error, ValueError | TypeError | OSError), (what, repr(error))
    assert type(error).__module__ == "modernbert.errors" or isinstance(error, ValueError | TypeError), (what, error)
    assert "\n" not in message, (what, message)
    assert 10 < len(message) < 500, (what, message)


def values(draw, shape, low=-3, high=100):
    """A tensor of a random kind that may or may not fit."""
    dtype = draw.choice([torch.int64] * 6 + [torch.int32, torch.uint8, torch.float32, torch.bool])
    tensor = torch.randint(max(low, 0) if draw.random() < 0.9 else low, high, shape)
    tensor = tensor.clamp(min=0) if dtype == torch.uint8 else tensor
    kind = draw.random()
    if kind < 0.03:
        return tensor.tolist()
    return tensor.numpy() if kind < 0.05 else tensor.to(dtype)


def shape_of(draw):
    sizes = [0, 1, 1, 2, 2, 3, 5, 17]
    return tuple(draw.choice(sizes) for _ in range(draw.choice([1, 2, 2, 2, 2, 3])))


def arguments(draw, name):
    """Arguments of a forward call, most of which fit."""
    shape = shape_of(draw)
    given = {}
    if draw.random() < 0.9:
        given["input_ids"] = values(draw, shape, high=draw.choice([96, 96, 96, 97]))
    if draw.random() < 0.12:
        dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16])
        given["inputs_embeds"] = torch.randn(*shape, draw.choice([48, 48, 47]), dtype=dtype)
    other = shape if draw.random() < 0.85 else shape_of(draw)
    if draw.random() < 0.4:
        given["attention_mask"] = values(draw, other, 0, 2)
    if draw.random() < 0.2:
        given["position_ids"] = values(draw, other if draw.random() < 0.7 else (1, shape[-1]), 0, 40)
    if draw.random() < 0.3:
        tokens = shape[-1] if len(shape) < 3 else 5
        cuts = sorted(draw.randint(0, tokens) for _ in range(draw.choice([0, 1, 2])))
        given["cu_seqlens"] = torch.tensor([0, *cuts, tokens if draw.random() < 0.9 else tokens + 1]).int()
    if draw.random() < 0.1:
        given["max_seqlen"] = draw.choice([0, 1, 17, 99])
    if draw.random() < 0.1:
        given |= {"batch_size": draw.choice([1, 2, 3]), "seq_len": draw.choice([1, 5, 17])}
    if draw.random() < 0.05:
        given["indices"] = values(draw, shape[-1:], 0, 20)
    if draw.random() < 0.3 and "For" in name:
        wanted = draw.choice([shape, shape[:1], (*shape[:1], 2)])
        labels = values(draw, wanted, -1, draw.choice([2, 2, 96]))
        if "QuestionAnswering" in name:
            given |= {"start_positions": labels, "end_positions": labels}
        else:
            given["labels"] = labels
    for flag in ("output_hidden_states", "output_attentions"):
        if draw.random() < 0.1:
            given[flag] = True
    if draw.random() < 0.03:
        given[draw.choice(["token_type_ids", "unknown"])] = torch.zeros(shape).long()
    return given


@pytest.fixture(scope="module")
def models():
    plain = [(name, model_of(name, num_hidden_layers=2)) for name in sorted(CLASSES)]
    return plain + [(name, model_of(name, num_hidden_layers=2).optimize_for_inference()) for name in sorted(CLASSES)]


def tensors_of(output):
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_of(value)


def test_random_forward_passes(models):
    caches = {}
    for seed in range(FIRST, FIRST + CALLS):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        name, model = draw.choice(models)
        given = arguments(draw, name)
        if "Decoder" in name and draw.random() < 0.3:
            given["past_key_values"] = caches.setdefault(id(model), DecoderCache(model.config))
        try:
            with torch.inference_mode(draw.random() < 0.5):
                output = model(**given)
        except Exception as error:
            check_error(error, (seed, name, given))
            caches.pop(id(model), None)
            continue
        for tensor in tensors_of(output.to_tuple()):
            lowest = torch.finfo(tensor.dtype).min if tensor.is_floating_point() else 0
            labelled = any(key in given for key in ("labels", "start_positions"))
            finite = tensor[tensor != lowest]
            assert labelled or bool(torch.isfinite(finite).all()), (seed, name, given)
        cache = caches.get(id(model))
        if cache is not None and sum(cache.lengths) > 200:
            del caches[id(model)]


OPTIONS = {
    "max_new_tokens": [0, 1, 3, -1, 2.5, "3", None],
    "min_new_tokens": [0, 2, 9, -1],
    "do_sample": [True, False, "yes", None],
    "temperature": [0.0, 0.5, 1, -1, float("nan"), "hot"],
    "top_k": [0, 1, 5, 10**9, -3],
    "top_p": [0.0, 0.5, 1.0, 1.5],
    "min_p": [0.0, 0.2, 2],
    "num_beams": [1, 2, 0, 3],
    "num_return_sequences": [1, 2, 5, 10**9],
    "repetition_penalty": [1.0, 1.2, 0, -1],
    "eos_token_id": [2, [2, 3], 999, "x", None],
    "pad_token_id": [0, 5, -1],
    "max_length": [1, 5, 30, -2],
    "no_repeat_ngram_size": [0, 2, -1],
    "use_cache": [True, False],
    "return_dict_in_generate": [True, False],
    "length_penalty": [1.0, 0.5, "long"],
    "unknown_option": [1],
}


def test_random_calls_of_generate(models):
    decoders = [model for name, model in models if name == "ModernBertDecoderForCausalLM"]
    for seed in range(FIRST, FIRST + CALLS):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        chosen = draw.sample(sorted(OPTIONS), draw.choice([0, 1, 2, 3]))
        options = {name: draw.choice(OPTIONS[name]) for name in chosen}
        options.setdefault("max_new_tokens", 4)
        ids = values(draw, (draw.choice([0, 1, 2]), draw.choice([0, 1, 4, 9])), high=96)
        mask = {"attention_mask": values(draw, np.shape(ids), 0, 2)} if draw.random() < 0.3 else {}
        try:
            draw.choice(decoders).generate(ids, **mask, **options)
        except Exception as error:
            check_error(error, (seed, ids, options))


TEXTS = ["", " ", "a", "[MASK]", "x" * 3000, "\ud800", "tab\t\x00", "é\u0301", "\U0001f600"]
TEXTS += [None, 5, b"bytes", ["a", "b"], [], {"a": 1}]
SETTINGS = {
    "padding": [True, False, "longest", "max_length", "sideways"],
    "truncation": [True, False, "only_first", "only_second", "longest_first", "no"],
    "max_length": [0, 1, 3, 8, -1, 10**12],
    "stride": [0, 1, 5, -1],
    "return_tensors": ["pt", "np", None, "tf"],
    "pad_to_multiple_of": [1, 8, 0],
    "padding_side": ["left", "right", "up"],
    "is_split_into_words": [True, False],
    "return_overflowing_tokens": [True, False],
    "return_offsets_mapping": [True, False],
    "add_special_tokens": [True, False],
}


def test_random_calls_of_the_tokenizer():
    tokenizer = Tokenizer.from_pretrained(small_model())
    for seed in range(FIRST, FIRST + CALLS):
        draw = random.Random(seed)
        text = (
            [draw.choice(TEXTS) for _ in range(draw.choice([1, 2, 3]))] if draw.random() < 0.6 else draw.choice(TEXTS)
        )
        pair = {"text_pair": draw.choice(TEXTS)} if draw.random() < 0.3 else {}
        chosen = {
            name: draw.choice(SETTINGS[name]) for name in draw.sample(sorted(SETTINGS), draw.choice([0, 1, 2, 4]))
        }
        try:
            encoding = tokenizer(text, **pair, **chosen)
            ids = encoding["input_ids"]
            tokenizer.decode(draw.choice([ids, 5, -1, 2**40, [1, 2], [10**9]]))
        except Exception as error:
            check_error(error, (seed, text, pair, chosen))
