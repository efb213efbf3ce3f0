"""Tokens that only settings or callers name, as transformers has them; and settings that make no sense."""

import json
import shutil

import pytest
import transformers
from tokenizers import Regex, normalizers

import modernbert
from modernbert import Tokenizer
from modernbert.errors import InputError
from modernbert.pipelines import small_model

TEXT = "hello <BOS> world <x> <y>[MASK] <Z>a"
NEXT = len(Tokenizer.from_pretrained(small_model()))
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def folder_with(tmp_path, changes, **files):
    """The small model's tokenizer with other settings."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(small_model() / "tokenizer.json", folder)
    config = json.loads((small_model() / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def rebuilt(tmp_path, **changes):
    """The small model's tokenizer with other parts of `tokenizer.json`."""
    folder = folder_with(tmp_path, {})
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**values, **changes}))
    return folder


def agree(ours, theirs):
    ids = theirs(TEXT).input_ids
    assert ours(TEXT).input_ids == ids
    assert len(ours) == len(theirs)
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    for name in ("bos", "eos", "cls", "mask"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")


NAMED = {
    "a named token": {"bos_token": "<BOS>"},
    "a named token with flags": {"bos_token": {"content": "<BOS>", **FLAGS, "lstrip": True, "__type": "AddedToken"}},
    "a word as a named token": {"bos_token": "hello"},
    "another mask": {"mask_token": "<x>"},
    "no mask": {"mask_token": None},
    "additional ones": {"additional_special_tokens": ["<x>", "<y>"]},
    "none additional": {"additional_special_tokens": None},
    "extra ones": {"extra_special_tokens": ["<x>", "<y>"]},
    "extra ones with names": {"extra_special_tokens": {"image_token": "<x>"}},
    "by id": {"added_tokens_decoder": {str(NEXT): {"content": "<x>", "special": True, **FLAGS}}},
    "by id, no special one": {
        "added_tokens_decoder": {
            str(NEXT): {"content": "<x>", "special": False, **FLAGS, "lstrip": True, "single_word": True}
        }
    },
    "by an id far off": {"added_tokens_decoder": {"5000": {"content": "<x>", "special": True, **FLAGS}}},
    "all at once": {
        "bos_token": "<BOS>",
        "additional_special_tokens": ["<x>", "<y>"],
        "added_tokens_decoder": {str(NEXT): {"content": "<y>", "special": True, **FLAGS}},
    },
}


@pytest.mark.parametrize("changes", NAMED.values(), ids=NAMED)
def test_tokens_that_only_the_settings_name_have_transformers_ids(tmp_path, changes):
    folder = folder_with(tmp_path, changes)
    ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    agree(ours, theirs)
    ours.save_pretrained(tmp_path / "again")
    agree(Tokenizer.from_pretrained(tmp_path / "again"), theirs)
    agree(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize(
    "given",
    [
        {"bos_token": "<BOS>"},
        {"additional_special_tokens": ["<x>"]},
        {"bos_token": "<BOS>", "additional_special_tokens": ["<x>", "<y>"], "eos_token": "<Z>"},
    ],
    ids=" ".join,
)
def test_tokens_that_a_caller_names_have_transformers_ids(tmp_path, given):
    folder = folder_with(tmp_path, {})
    theirs = transformers.AutoTokenizer.from_pretrained(folder, **given)
    agree(Tokenizer.from_pretrained(folder, **given), theirs)
    agree(modernbert.AutoTokenizer.from_pretrained(folder, **given), theirs)
    later = Tokenizer.from_pretrained(folder)
    assert later.add_special_tokens(given) == len(theirs) - NEXT
    assert set(later.all_special_tokens) == set(theirs.all_special_tokens)


@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map": {"bos_token": "<BOS>", "additional_special_tokens": ["<x>"]}},
        {"special_tokens_map": {"mask_token": {"content": "<x>", **FLAGS}}},
        {"added_tokens": {"<x>": NEXT, "<y>": NEXT + 1}},
    ],
    ids=" ".join,
)
def test_files_of_the_first_releases_are_read_too(tmp_path, files):
    folder = folder_with(tmp_path, {}, **files)
    agree(Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder))


WRONG = {
    "cls_token is {}; it must be a text": {"cls_token": {}},
    "cls_token is 5; it must be a text": {"cls_token": 5},
    r"bos_token is \[\]": {"bos_token": []},
    "eos_token is {'content': None}": {"eos_token": {"content": None}},
    "additional_special_tokens is '<x>'; it must be a list": {"additional_special_tokens": "<x>"},
    "extra_special_tokens is None; it must be a text": {"extra_special_tokens": [None]},
    "added_tokens_decoder is": {"added_tokens_decoder": ["<x>"]},
    "added_tokens_decoder is {'-1'": {"added_tokens_decoder": {"-1": {"content": "<x>"}}},
    r"added_tokens_decoder\[7\] is 3": {"added_tokens_decoder": {"7": 3}},
    "padding_side is 'middle'; choose left or right": {"padding_side": "middle"},
    "truncation_side is 3; choose left or right": {"truncation_side": 3},
    "model_input_names is 5": {"model_input_names": 5},
    r"model_input_names is \[None\]": {"model_input_names": [None]},
    "model_max_length is -5; it must be a whole number of at least 1": {"model_max_length": -5},
    "model_max_length is 'long'": {"model_max_length": "long"},
    r"model_max_length is \[5\]": {"model_max_length": [5]},
    "model_max_length is inf": {"model_max_length": float("inf")},
    "model_max_length is nan": {"model_max_length": float("nan")},
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_make_no_sense_are_refused_by_name(tmp_path, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.from_pretrained(folder_with(tmp_path, WRONG[message]))


def test_settings_that_are_null_are_the_usual_ones(tmp_path):
    names = ("padding_side", "truncation_side", "model_input_names", "model_max_length", "added_tokens_decoder")
    tokenizer = Tokenizer.from_pretrained(folder_with(tmp_path, dict.fromkeys(names)))
    batch = tokenizer(["a b c", "a"], padding=True)
    assert batch.attention_mask[1][0] == 1


def test_a_regular_expression_past_the_engines_limit_is_one_error(tmp_path):
    replace = {"type": "Replace", "pattern": {"Regex": "(a+)+$b"}, "content": "x"}
    tokenizer = Tokenizer.from_pretrained(rebuilt(tmp_path, normalizer=replace))
    with pytest.raises(InputError, match=r"a text cannot be tokenized: .*retry-limit-in-match"):
        tokenizer("a" * 40)
    with pytest.raises(InputError, match=r"a text cannot be tokenized: .*retry-limit-in-match"):
        tokenizer.tokenize("a" * 40)
    tokenizer("b")


def test_a_tokenizer_that_multiplies_texts_is_refused_before_one_fills_the_memory(tmp_path):
    def grow(letter):
        return {"type": "Replace", "pattern": {"String": letter}, "content": letter * 100}

    many = {"type": "Sequence", "normalizers": [grow("a")] * 6}
    with pytest.raises(InputError, match="its normalizer can make a text 1,000,000,000,000 times longer; at most 1,0"):
        Tokenizer.from_pretrained(rebuilt(tmp_path, normalizer=many))
    shutil.rmtree(tmp_path / "tokenizer")
    many = {"type": "Sequence", "decoders": [grow("a"), {"type": "Fuse"}, grow("b")]}
    with pytest.raises(InputError, match="its decoder can make a text 10,201 times longer"):
        Tokenizer.from_pretrained(rebuilt(tmp_path, decoder=many))
    shutil.rmtree(tmp_path / "tokenizer")
    once = {"type": "Sequence", "normalizers": [grow("a"), {"type": "NFC"}]}
    assert len(Tokenizer.from_pretrained(rebuilt(tmp_path, normalizer=once))("a").input_ids) > 3


def test_ids_that_are_none_are_named():
    tokenizer = Tokenizer.from_pretrained(small_model())
    for ids, message in (([5, -1], "ids hold -1;"), (2**40, f"ids hold {2**40}"), ([3, 2.5, "x"], r"hold 2\.5, 'x'")):
        for call in (tokenizer.decode, tokenizer.convert_ids_to_tokens):
            with pytest.raises(InputError, match=message):
                call(ids)
    assert tokenizer.decode([2**31]) == ""
    with pytest.raises(InputError, match="tokens is 5; give a token or a list of them"):
        tokenizer.convert_tokens_to_ids(5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_is_an_encoding_as_in_transformers(side):
    ours = Tokenizer.from_pretrained(small_model(), padding_side=side)
    theirs = transformers.AutoTokenizer.from_pretrained(small_model(), padding_side=side)
    texts = ["hello world", "a"]
    a, b = ours(texts, padding=True), theirs(texts, padding=True)
    for row in (0, 1, -1):
        for name in ("ids", "tokens", "attention_mask", "special_tokens_mask", "word_ids", "offsets"):
            assert getattr(a[row], name) == getattr(b[row], name), (row, name)
    assert [e.ids for e in a[0:2]] == [e.ids for e in b[0:2]]
    assert ours("a", return_tensors="pt")[0].ids == theirs("a", return_tensors="pt")[0].ids
    assert ours("a b c")[0].tokens == theirs("a b c")[0].tokens
    with pytest.raises(IndexError, match="row is 2; the batch has 2 rows"):
        a[2]
    with pytest.raises(KeyError):
        a["nonsense"]
    assert dict(a) == dict(b)
    rows = ours.pad([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    assert rows[1:]["input_ids"] == rows["input_ids"][1:]
    with pytest.raises(InputError, match="was not made from text"):
        rows[0]


def test_rows_to_pad_that_are_none_are_refused():
    tokenizer = Tokenizer.from_pretrained(small_model())
    for given in ([], "a", 5, [[1, 2]], [{"input_ids": [1], "labels": [1]}, {"input_ids": [2]}]):
        with pytest.raises(InputError, match="encoded_inputs must be a dict of rows, or a list of dicts"):
            tokenizer.pad(given)


def test_a_pre_tokenizer_without_prefix_spaces_is_named(tmp_path):
    backend = Tokenizer.from_pretrained(small_model()).backend
    backend.normalizer = normalizers.Replace(Regex(" +"), " ")
    backend.pre_tokenizer = None
    with pytest.raises(InputError, match=r"add_prefix_space is given, and this tokenizer\.json has no setting"):
        Tokenizer(backend, add_prefix_space=True)
