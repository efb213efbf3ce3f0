"""The real tokenizer gives what transformers' fast tokenizer gives, on real text, code and awkward Unicode."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from modernbert import AutoTokenizer, Tokenizer
from modernbert.errors import InputError, NotFoundError
from modernbert.training.pretraining.train_tokenizer import save_tokenizer, train_tokenizer
from tests.conftest import SPECIAL_TOKENS

AWKWARD = [
    "",
    " ",
    "\n\n\t  \r\n",
    "naïve café — “quotes” … ﬁ ligature",
    "e\u0301 becomes é; Å is not Å",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flags 🇫🇷",
    "السلام عليكم ‏ mixed עברית text",
    "中文和日本語のテキスト한국어",
    "zero\u200bwidth\u200djoin\ufeffers\u00ad",
    "\x00control\x07chars\x1b[0m",
    "[MASK] [CLS]inside[SEP] [PAD] [unused7] |||IP_ADDRESS||| <|endoftext|>",
    "the   [MASK]  takes its left spaces",
    "        indented            code",
    "a" * 3000,
    "Ω≈ç√∫˜µ≤≥÷",
    "\ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
]


@pytest.fixture(scope="module")
def both(data, tmp_path_factory):
    """Ours and transformers' tokenizer on the same files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes((data / "tokenizer" / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **SPECIAL_TOKENS}
    config["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(data):
    rng = random.Random(0)
    lines = (data / "text" / "wikitext2-valid.txt").read_text().splitlines()
    code = [json.loads(line)["text"][:3000] for line in (data / "text" / "code_python.jsonl").read_text().splitlines()]
    novel = (data / "text" / "eltec_eng" / "ENG18652_Carroll.txt").read_text().split("\n\n")
    return AWKWARD + rng.sample([x for x in lines if x.strip()], 60) + rng.sample(code, 12) + rng.sample(novel, 40)


def test_the_documented_ids(real_backend):
    ids = Tokenizer(real_backend)("Hello world! The capital of France is Paris.").input_ids
    assert ids == [50281, 12092, 1533, 2, 380, 5347, 273, 6181, 310, 7785, 15, 50282]


OPTIONS = [
    {},
    {"add_special_tokens": False},
    {"padding": True},
    {"padding": True, "padding_side": "left", "pad_to_multiple_of": 16},
    {"padding": "max_length", "max_length": 40, "truncation": True},
    {"truncation": True, "max_length": 17},
    {"max_length": 9, "truncation": "only_first", "stride": 3, "return_overflowing_tokens": True, "padding": True},
    {"max_length": 12, "truncation": True, "stride": 5}
    | dict.fromkeys(("return_overflowing_tokens", "return_offsets_mapping"), True),
    {f"return_{what}": True for what in ("offsets_mapping", "special_tokens_mask", "token_type_ids", "length")},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_a_batch(both, texts, options):
    ours, theirs = both
    a, b = ours(texts, **options), theirs(texts, **options)
    assert set(a) == set(b)
    for name in b:
        shown = [[list(map(tuple, row)) if name == "offset_mapping" else row for row in x[name]] for x in (a, b)]
        assert shown[0] == shown[1], name
    for row in range(len(a.input_ids)):
        assert a.word_ids(row) == b.word_ids(row)
        assert a.sequence_ids(row) == b.sequence_ids(row)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True, "truncation": True, "max_length": 20},
        {"truncation": "only_second", "max_length": 40, "stride": 4, "return_overflowing_tokens": True},
        {"return_token_type_ids": True},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_pairs(both, texts, options):
    ours, theirs = both
    firsts, seconds = ["a short question?"] * 30, texts[16:46]
    a, b = ours(firsts, seconds, **options), theirs(firsts, seconds, **options)
    assert dict(a) == dict(b)
    assert a.sequence_ids(3) == b.sequence_ids(3)
    assert ours("one", "two").input_ids == theirs("one", "two").input_ids


def test_words(both):
    ours, theirs = both
    words = [["Pre", "split", "words", "[MASK]", "naïve"], ["unbelievable", "!"]]
    a, b = ours(words, is_split_into_words=True), theirs(words, is_split_into_words=True)
    assert a.input_ids == b.input_ids
    assert [a.word_ids(i) for i in (0, 1)] == [b.word_ids(i) for i in (0, 1)]
    assert ours(words[0], is_split_into_words=True).input_ids == b.input_ids[0]


def test_a_space_before_each_word_where_asked_for(both, tmp_path):
    ours, theirs = both
    ours.save_pretrained(tmp_path)
    spaced = Tokenizer.from_pretrained(tmp_path, add_prefix_space=True)
    words = ["Germany", "won"]
    assert spaced(words, is_split_into_words=True).input_ids == theirs(" Germany won").input_ids
    assert ours(words, is_split_into_words=True).input_ids != theirs(" Germany won").input_ids


def test_decoding(both, texts):
    ours, theirs = both
    for text in texts:
        ids = theirs(text).input_ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    rows = theirs(texts[16:20]).input_ids
    assert ours.batch_decode(rows) == theirs.batch_decode(rows)
    assert ours.decode(torch.tensor([6181])) == ours.decode(6181) == ours.decode(np.int64(6181)) == " France"
    assert ours.decode(torch.tensor([[6181], [7785]])) == [" France", " Paris"]
    assert ours.decode(ours("Stop , now .").input_ids[1:-1], clean_up_tokenization_spaces=True) == "Stop, now."


@settings(max_examples=150)
@given(st.text(max_size=60))
def test_any_text(both, text):
    ours, theirs = both
    a, b = ours(text, return_offsets_mapping=True), theirs(text, return_offsets_mapping=True)
    assert a.input_ids == b.input_ids
    assert a.offset_mapping == b.offset_mapping
    assert ours.decode(a.input_ids, skip_special_tokens=True) == theirs.decode(b.input_ids, skip_special_tokens=True)


def test_vocabulary(both):
    ours, theirs = both
    assert len(ours) == len(theirs) == 50368
    assert ours.vocab_size == theirs.vocab_size
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.convert_ids_to_tokens([50281, 12092, 50282]) == ["[CLS]", "Hello", "[SEP]"]
    assert ours.convert_ids_to_tokens([50281, 12092, 50282], skip_special_tokens=True) == ["Hello"]
    assert ours.convert_tokens_to_ids("Hello") == 12092
    assert ours.convert_tokens_to_ids(["Hello", "no such token"]) == [12092, ours.unk_token_id]
    assert ours.convert_ids_to_tokens(50284) == ours.mask_token == "[MASK]"
    for name in ("cls", "sep", "pad", "mask", "unk", "bos", "eos"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert ours.num_special_tokens_to_add() == 2
    assert ours.num_special_tokens_to_add(pair=True) == 3
    assert ours.tokenize("Hello world") == theirs.tokenize("Hello world")
    assert ours.encode("Hello", add_special_tokens=False) == [12092]
    with pytest.raises(AttributeError, match="nonsense"):
        ours.nonsense  # noqa: B018


def test_tensors_and_the_encoding(both):
    ours, _ = both
    batch = ours(["one", "two words here"], padding=True, return_tensors="pt")
    assert batch.input_ids.dtype == torch.int64
    assert batch["attention_mask"].shape == batch.input_ids.shape
    assert batch.to("cpu") is batch
    assert ours("one", return_tensors="pt").input_ids.shape[0] == 1
    assert isinstance(ours("one", return_tensors="np").input_ids, np.ndarray)
    assert batch.tokens(0)[0] == "[CLS]"
    assert batch.word_ids(0) == [None, 0, None, None, None]
    assert batch.tokens(0)[2:] == ["[SEP]", "[PAD]", "[PAD]"]
    with pytest.raises(AttributeError, match="input_ids"):
        batch.nonsense  # noqa: B018


def test_padding_of_rows(both):
    ours, theirs = both
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    a, b = ours.pad(rows, return_tensors="pt"), theirs.pad(rows, return_tensors="pt")
    assert torch.equal(a.input_ids, b["input_ids"])
    assert torch.equal(a.attention_mask, b["attention_mask"])
    labelled = ours.pad(
        [{"input_ids": [5, 6], "labels": [1, 2]}, {"input_ids": [8], "labels": [3]}], padding_side="left"
    )
    assert labelled.labels == [[1, 2], [-100, 3]]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None,), {}, "text is None"),
        ((5,), {}, "text is a int"),
        ((["a", 5],), {}, "text holds a int"),
        ((["a", "b"], ["c"]), {}, "text holds 2 texts and text_pair 1"),
        (("a",), {"truncation": "sideways"}, "truncation is 'sideways'"),
        (("a",), {"truncation": "only_second", "max_length": 5}, "there is no text_pair"),
        (("a",), {"padding": "sideways"}, "padding is 'sideways'"),
        (("a",), {"padding": True, "padding_side": "top"}, "padding_side is 'top'"),
        (("a",), {"return_tensors": "tf"}, "return_tensors is 'tf'"),
        ((["a", "b c d"],), {"return_tensors": "pt"}, "padding=True makes them equal"),
        (("a b c d e f",), {"max_length": 4, "truncation": True, "stride": 3}, "cannot be tokenized with truncation"),
        (("a b c d e f",), {"max_length": 4, "truncation": True, "stride": -1}, "stride is -1"),
        (("a " * 50, "b"), {"max_length": 20, "truncation": "only_second"}, "cannot be tokenized with truncation"),
        (("a",), {"is_split_into_words": True}, "give a list of words"),
        (("a",), {"max_length": -1, "truncation": True}, "max_length is -1"),
        (("lone \ud800",), {}, "cannot be tokenized"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_error(both, arguments, options, message):
    with pytest.raises(InputError, match=message):
        both[0](*arguments, **options)


def test_without_a_padding_token():
    bare = Tokenizer(Backend(models.BPE()))
    assert bare.mask_token is None
    assert bare.mask_token_id is None
    with pytest.raises(InputError, match="no padding token"):
        bare.pad([{"input_ids": [1]}, {"input_ids": [1, 2]}])


def test_saving_loads_in_transformers_and_again(both, tmp_path):
    ours, theirs = both
    ours.save_pretrained(tmp_path / "a")
    again = Tokenizer.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "The [MASK] saves, naïvely."
    assert peer(text).input_ids == again(text).input_ids == theirs(text).input_ids
    assert peer.mask_token_id == again.mask_token_id
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def test_adding_tokens(tmp_path):
    save_tokenizer(train_tokenizer(["some words to learn"] * 4, 272), tmp_path, 32)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<new>", "<newer>", "<new>"]) == 2
    assert len(tokenizer) == size + 2
    assert tokenizer.add_special_tokens({"bos_token": "<bos>"}) == 1
    assert tokenizer.bos_token_id == size + 2
    assert "<bos>" in tokenizer.all_special_tokens
    assert tokenizer.special_tokens_map["bos_token"] == "<bos>"
    assert tokenizer.decode(tokenizer("a <new> b").input_ids, skip_special_tokens=True) == "a <new> b"
    tokenizer.pad_token = "<empty>"
    assert tokenizer.pad_token_id == size + 3
    tokenizer.add_special_tokens({"sep_token": AddedToken("<sep>", special=True)})
    assert tokenizer.sep_token == "<sep>"
    assert tokenizer.sep_token_id == size + 4
    with pytest.raises(InputError, match="nonsense_token"):
        tokenizer.add_special_tokens({"nonsense_token": "x"})
