"""What scripts for transformers call on a tokenizer and its encodings gives what it gives there."""

import copy
import json
import logging
import pickle
import sys

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken
from transformers.utils import PaddingStrategy

from modernbert import Tokenizer
from modernbert.errors import InputError
from modernbert.pipelines import small_model
from modernbert.text.encoding import BatchEncoding
from tests.conftest import DATA, SPECIAL_TOKENS

PAIRS = [("what is a dog?", "An animal, naïvely."), ("who", "Anna ran across the road.")]
TEXTS = ["a dog", "The naïve cat ran.", "[MASK] two"]
TALK = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "a dog "}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ cls_token }}{% endif %}{{ tools | tojson if tools else '' }}"
)


@pytest.fixture(scope="module", params=["small", "real"])
def folder(request, tmp_path_factory):
    if request.param == "small":
        return small_model()
    file = DATA / "tokenizer" / "tokenizer.json"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    made = tmp_path_factory.mktemp("tokenizer")
    (made / "tokenizer.json").write_bytes(file.read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **SPECIAL_TOKENS}
    (made / "tokenizer_config.json").write_text(
        json.dumps(config | {"model_input_names": ["input_ids", "attention_mask"]})
    )
    return made


@pytest.fixture(scope="module")
def both(folder):
    """Ours and transformers' tokenizer on the same files."""
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def fresh(both):
    """The same, to be changed."""
    return copy.deepcopy(both)


def plain(value):
    """A value without the classes that hold it."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value).__name__, str(value.dtype), value.tolist()
    if isinstance(value, dict) or hasattr(value, "keys"):
        return {k: plain(value[k]) for k in value}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, AddedToken) else value


CALLS = {
    "pairs": lambda t: t(PAIRS),
    "pairs as lists": lambda t: t([list(p) for p in PAIRS], padding=True, truncation=True, return_tensors="pt"),
    "the second of pairs is cut": lambda t: t(PAIRS, truncation="only_second", max_length=12),
    "texts beside pairs": lambda t: t([PAIRS[0], "alone"]),
    "pairs of words": lambda t: t([(["a", "dog"], ["ran"])], is_split_into_words=True),
    "targets": lambda t: t("a dog", text_target="two cats"),
    "targets alone": lambda t: t(text_target=TEXTS),
    "pairs of targets": lambda t: t(TEXTS[:2], text_target=["x", "y"], text_pair_target=["z", "w"], verbose=False),
    "special tokens as characters": lambda t: t("a [MASK] b", split_special_tokens=True),
    "an enumeration": lambda t: t(TEXTS, padding=PaddingStrategy.LONGEST),
    "lengths of a text and of texts": lambda t: [t("a dog", return_length=True), t(TEXTS, return_length=True)],
    "no mask": lambda t: t(TEXTS, return_attention_mask=False, padding=True),
    "tokenize": lambda t: [t.tokenize("a dog"), t.tokenize("a", "dog"), t.tokenize("a", add_special_tokens=True)],
    "encode": lambda t: [t.encode("a dog"), t.encode(TEXTS), t.encode("a", "b", return_tensors="pt")],
    "pad a row": lambda t: t.pad({"input_ids": [5, 6]}, padding="max_length", max_length=4),
    "pad rows of tensors": lambda t: t.pad([{"input_ids": torch.tensor([5, 6])}, {"input_ids": torch.tensor([5])}]),
    "pad rows of arrays": lambda t: t.pad([{"input_ids": np.array([5, 6])}, {"input_ids": np.array([5])}]),
    "pad an encoding": lambda t: t.pad(t(TEXTS), padding_side="left"),
    "a mask": lambda t: t.get_special_tokens_mask(t.encode("a [MASK]"), already_has_special_tokens=True),
    "vocabulary": lambda t: [t.vocab, t.get_added_vocab(), t.added_tokens_encoder],
    "added tokens": lambda t: t.added_tokens_decoder,
    "lengths": lambda t: [t.max_len_single_sentence, t.max_len_sentences_pair],
    "names": lambda t: [t.is_fast, t.name_or_path, t.pad_token_type_id, t.chat_template],
    "switches": lambda t: [t.add_prefix_space, t.add_bos_token, t.add_eos_token, t.split_special_tokens],
    "spaces are cleaned": lambda t: t.clean_up_tokenization_spaces,
    "backend": lambda t: [t.backend_tokenizer.to_str() == t._tokenizer.to_str(), str(t.decoder)],
    "spaces": lambda t: t.clean_up_tokenization("a , b ' s . do n't  ! it 's we 've"),
    "decode": lambda t: t.decode(t.encode("a , b"), skip_special_tokens=True, spaces_between_special_tokens=False),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call(both, name):
    ours, theirs = (plain(CALLS[name](tokenizer)) for tokenizer in both)
    assert ours == theirs


def test_older_calls(both):
    ours, theirs = both
    assert dict(ours.encode_plus(*PAIRS[0], max_length=20, pad_to_max_length=True)) == dict(
        theirs(*PAIRS[0], max_length=20, padding="max_length")
    )
    assert dict(ours.batch_encode_plus(PAIRS, padding=True)) == dict(theirs(PAIRS, padding=True))
    for first, second in (([5, 6, 7], None), ([5, 6], [7, 8])):
        built = ours.build_inputs_with_special_tokens(first, second)
        assert built == [
            ours.cls_token_id,
            *first,
            ours.sep_token_id,
            *((*second, ours.sep_token_id) if second else ()),
        ]
        mask = ours.get_special_tokens_mask(first, second)
        assert mask == ours.get_special_tokens_mask(built, already_has_special_tokens=True)
        assert ours.prepare_for_model(first, second).input_ids == built
    question, answer = (ours.encode(text, add_special_tokens=False) for text in PAIRS[1])
    for cut in (
        {},
        {"truncation": True, "max_length": 6},
        {"truncation": "only_second", "max_length": 7, "padding": "max_length"},
    ):
        types = theirs(*PAIRS[1], return_token_type_ids=True).token_type_ids
        assert ours.create_token_type_ids_from_sequences(question, answer) == types
        wanted = theirs(*PAIRS[1], **cut, return_special_tokens_mask=True)
        assert dict(ours.prepare_for_model(question, answer, **cut, return_special_tokens_mask=True)) == dict(wanted)


@pytest.mark.parametrize("side", ["right", "left"])
def test_places_in_an_encoding(both, side):
    a, b = (t([*PAIRS, ("x", "y")], padding=True, padding_side=side) for t in both)
    assert (a.n_sequences, a.is_fast, plain(a.data)) == (2, True, plain(b.data))
    for row in range(3):
        for attribute in ("ids", "tokens", "offsets", "attention_mask", "special_tokens_mask", "sequence_ids"):
            assert getattr(a[row], attribute) == getattr(b[row], attribute)
        assert (a.tokens(row), a.words(row), a.sequence_ids(row)) == (
            b.tokens(row),
            b.word_ids(row),
            b.sequence_ids(row),
        )
        for i in range(len(a.input_ids[row])):
            for name in ("token_to_sequence", "token_to_word", "token_to_chars"):
                assert getattr(a, name)(row, i) == getattr(b, name)(row, i)
        for sequence in (0, 1):
            for i in range(12):
                for name in ("char_to_token", "char_to_word", "word_to_tokens"):
                    found = [getattr(batch, name)(row, i, sequence_index=sequence) for batch in (a, b)]
                    assert found[0] == found[1], name
            assert a.word_to_chars(row, 0, sequence) == b.word_to_chars(row, 0, sequence)
    assert a.word_to_chars(0, 99) is None
    assert a.char_to_token(2) == b.char_to_token(0, 2)
    assert a.token_to_chars(1).start == 0
    assert a.token_to_chars(0, -1) == a.token_to_chars(0, len(a.input_ids[0]) - 1)
    assert len(a[0:2]) == 2
    for wrong in (
        lambda: a.char_to_token(-1),
        lambda: a.char_to_token("x"),
        lambda: BatchEncoding({}).char_to_token(0),
    ):
        with pytest.raises(InputError):
            wrong()


def test_an_encoding_is_a_dict_that_makes_tensors(both):
    ours, theirs = both
    batch = ours(TEXTS, padding=True)
    assert plain(batch.copy().convert_to_tensors("pt")) == plain(theirs(TEXTS, padding=True, return_tensors="pt"))
    assert isinstance(batch.input_ids, list)
    alone = BatchEncoding({"input_ids": [1, 2]}, tensor_type="np", prepend_batch_axis=True)
    assert alone.input_ids.shape == (1, 2)
    assert BatchEncoding({"input_ids": torch.ones(1)}).to("cpu", non_blocking=True).n_sequences is None
    assert pickle.loads(pickle.dumps(batch)).word_ids(1) == batch.word_ids(1)
    with pytest.raises(InputError, match="text is 'a dog' and makes no tensor"):
        BatchEncoding({"text": "a dog"}).convert_to_tensors("pt")


def test_special_tokens_are_set_by_token_and_by_id(fresh):
    for name, value in (("pad_token_id", 5), ("eos_token", "[SEP]"), ("mask_token", None), ("bos_token_id", 7)):
        for t in fresh:
            setattr(t, name, value)
        ours, theirs = fresh
        assert ours.special_tokens_map == theirs.special_tokens_map
        assert getattr(ours, name) == getattr(theirs, name) == value
    with pytest.raises(InputError, match=r"pad_token_id is 999999; the tokenizer has ids 0 to \d+"):
        ours.pad_token_id = 999999


def test_a_special_token_that_is_taken_away_stays_away(fresh, tmp_path):
    fresh[0].mask_token = None
    fresh[0].save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).mask_token is None


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_additional_special_tokens(fresh, key):
    for added in ({"bos_token": "<b>", key: ["<x>", AddedToken("<y>", lstrip=True)]}, {key: ["<z>"]}):
        counts = [t.add_special_tokens(added) for t in fresh]
        ours, theirs = fresh
        assert counts[0] == counts[1]
        assert ours.additional_special_tokens == ours.extra_special_tokens == theirs.extra_special_tokens
        assert ours.additional_special_tokens_ids == theirs.extra_special_tokens_ids
        assert ours.all_special_tokens == theirs.all_special_tokens
        assert ours("a <x> <y>b<z>").input_ids == theirs("a <x> <y>b<z>").input_ids
    more = {key: ["<w>"]}
    assert ours.add_special_tokens(more, replace_additional_special_tokens=False) == 1
    assert ours.additional_special_tokens == ["<z>", "<w>"]
    ours.additional_special_tokens = ["<v>"]
    assert (ours.additional_special_tokens, ours.convert_tokens_to_ids("<v>")) == (["<v>"], len(ours) - 1)
    for wrong, message in (
        (["<x>"], "give a dict of"),
        ({key: "<x>"}, "give a list"),
        ({"odd_token": "<x>"}, "no special"),
    ):
        with pytest.raises(InputError, match=message):
            ours.add_special_tokens(wrong)


def test_no_call_leaves_a_trace(both):
    hashed = pytest.importorskip("datasets").fingerprint.Hasher.hash
    ours, _ = both
    before = hashed(ours), ours.backend.to_str()
    ours(TEXTS, truncation=True, max_length=4, padding=True)
    ours(TEXTS, split_special_tokens=True, padding="max_length", max_length=9, truncation=True)
    ours.get_special_tokens_mask([5])
    ours.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    with pytest.raises(InputError):
        ours("a b c d e f", max_length=4, truncation=True, stride=3)
    assert (hashed(ours), ours.backend.to_str()) == before
    ours.backend.enable_truncation(3)
    assert len(ours("a b c d e f").input_ids) > 3
    assert hashed(pickle.loads(pickle.dumps(ours))) == before[0]


def test_files_are_returned_and_their_names_may_have_a_prefix(both, tmp_path):
    ours, theirs = both
    assert ours.save_pretrained(save_directory=tmp_path) == theirs.save_pretrained(tmp_path)
    assert "name_or_path" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert [file.rpartition("/")[2] for file in ours.save_pretrained(tmp_path, filename_prefix="x")] == [
        "x-tokenizer_config.json",
        "x-tokenizer.json",
    ]
    assert len(ours.save_vocabulary(tmp_path)) == 2
    with pytest.raises(InputError, match="legacy_format"):
        ours.save_pretrained(tmp_path, legacy_format=True)
    assert "vocab_size" in repr(ours)


def test_arguments_of_loading_are_taken_or_refused(folder, log):
    log.set_level(logging.INFO)
    tokenizer = Tokenizer.from_pretrained(
        pretrained_model_name_or_path=folder, use_fast=True, trust_remote_code=True, use_auth_token=None, proxies=None
    )
    (said,) = [r.getMessage() for r in log.records if "ever executed" in r.getMessage()]
    assert said.startswith("trust_remote_code ")
    assert "trust_remote_code" not in tokenizer.init_kwargs
    for name in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        setattr(tokenizer, name, getattr(tokenizer, name))
        with pytest.raises(InputError, match=f"{name} is True; "):
            setattr(tokenizer, name, True)
    with pytest.raises(InputError, match=r"add_eos_token is True; tokenizer\.json has the template"):
        Tokenizer.from_pretrained(folder, add_eos_token=True)
    again = Tokenizer(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]", model_max_length=9)
    assert again("a dog").input_ids == Tokenizer(tokenizer_object=again.backend)("a dog").input_ids
    assert (again.pad_token, again.model_max_length) == ("[PAD]", 9)
    with pytest.raises(InputError, match="backend is None"):
        Tokenizer()


TALKS = {
    "ids": {},
    "text": {"tokenize": False},
    "a prompt": {"tokenize": False, "add_generation_prompt": True},
    "to be continued": {"tokenize": False, "continue_final_message": True},
    "another field": {"tokenize": False, "continue_final_message": "content"},
    "ids alone": {"return_dict": False},
    "cut": {"truncation": True, "max_length": 5, "return_tensors": "pt"},
    "tools": {"tokenize": False, "tools": [{"name": "é<b>"}]},
    "masks": {"return_assistant_tokens_mask": True},
    "another": {"tokenize": False, "chat_template": "{{ messages|length }}{{ x }}", "x": "é"},
}  # fmt: skip


@pytest.mark.parametrize("name", TALKS)
def test_conversations(fresh, name):
    ours, theirs = fresh
    for t in fresh:
        t.chat_template = TEMPLATE
    for talk in (TALK, [TALK, TALK[1:]]):
        padding = {"padding": True} if "return_tensors" in TALKS[name] else {}
        found = [plain(t.apply_chat_template(talk, **TALKS[name], **padding)) for t in (ours, theirs)]
        assert found[0] == found[1]


def test_templates_are_kept_and_those_of_files_are_read(fresh, tmp_path):
    ours, theirs = fresh
    several = {"default": TEMPLATE, "tool_use": "tools {{ tools }}"}
    ours.chat_template = several
    ours.save_pretrained(tmp_path / "a")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert Tokenizer.from_pretrained(tmp_path / "a").chat_template == peer.chat_template == several
    for how in ({"tools": []}, {"chat_template": "tool_use"}, {}):
        found = [t.apply_chat_template(TALK, tokenize=False, **how) for t in (ours, peer)]
        assert found[0] == found[1]
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(tmp_path / "b")
    assert Tokenizer.from_pretrained(tmp_path / "b").chat_template == TEMPLATE


@pytest.mark.parametrize("templates", [TEMPLATE, {"default": TEMPLATE, "tool_use": "x"}, {"other": "y"}], ids=str)
@pytest.mark.parametrize("as_files", [True, False])
def test_templates_are_in_the_files_that_transformers_has(fresh, tmp_path, templates, as_files):
    for name, tokenizer, other in zip("ab", fresh, (transformers.AutoTokenizer, Tokenizer), strict=True):
        tokenizer.chat_template = templates
        tokenizer.save_pretrained(tmp_path / name, save_jinja_files=as_files)
        assert other.from_pretrained(tmp_path / name).chat_template == templates
    found = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in "ab"]
    assert found[0] == found[1]
    (tmp_path / "a/chat_template.jinja").write_text("the file's")
    read = [t.from_pretrained(tmp_path / "a").chat_template for t in (Tokenizer, transformers.AutoTokenizer)]
    assert read[0] == read[1]
    assert "the file's" in str(read[0])


def test_a_template_cannot_be_saved_outside_of_its_folder(fresh, tmp_path):
    fresh[0].chat_template = {"default": "a", "../../b": "c"}
    with pytest.raises(InputError, match=r"a chat template's name is '\.\./\.\./b'; no file can have it"):
        fresh[0].save_pretrained(tmp_path / "a")
    assert not list(tmp_path.rglob("*.jinja"))


@pytest.mark.parametrize("inside", ["m.thoughts", "m.thoughts | trim"])
def test_a_field_of_the_last_message_is_continued_and_null_is_missing(fresh, inside):
    template = "{% for m in messages %}{{ m }}<{{ " + inside + " }}>{{ m.content }}{% endfor %}"
    talk = [{"role": "user", "content": "a b", "thoughts": "a ", "tool_calls": None, "inner": {"null": None}}]
    how = {"chat_template": template, "tokenize": False, "continue_final_message": "thoughts"}
    found = [t.apply_chat_template(talk, **how) for t in fresh]
    assert found[0].split("<")[1] == found[1].split("<")[1]
    found = [t.apply_chat_template(talk, **{**how, "continue_final_message": False}) for t in fresh]
    assert found[0] == found[1]
    assert "tool_calls" not in found[0]
    for wrong in ({"chat_template": "x"}, {"continue_final_message": "none"}):
        with pytest.raises(InputError, match="continue_final_message is '"):
            fresh[0].apply_chat_template(talk, **{**how, **wrong})


def test_what_transformers_refuses_is_refused(fresh):
    for t in fresh:
        with pytest.raises(ValueError, match="multiple of"):
            t("a b", padding=True, truncation=True, max_length=12, pad_to_multiple_of=8)
        with pytest.raises(AttributeError, match="add_special_tokens"):
            type(t).from_pretrained(t.name_or_path, add_special_tokens=True)


def test_special_tokens_by_their_ids(fresh):
    for t in fresh:
        t.extra_special_tokens_ids = [5, 6]
        assert t.extra_special_tokens == t.convert_ids_to_tokens([5, 6])
        assert t.extra_special_tokens_ids == [5, 6]
    assert fresh[0].SPECIAL_TOKENS_ATTRIBUTES == fresh[1].SPECIAL_TOKENS_ATTRIBUTES


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "no chat template; give chat_template="),
        ({"chat_template": "{{ raise_exception('roles must alternate') }}"}, "fails: roles must alternate"),
        ({"chat_template": "{{ "}, "the chat template fails"),
        ({"chat_template": "{{ messages.append(1) }}"}, "is unsafe"),
        ({"chat_template": "{{ messages.__class__.__mro__ }}"}, "the chat template fails"),
        ({"chat_template": "x", "continue_final_message": True}, "leaves out or changes the last message"),
        ({"chat_template": "x", "tools": [len]}, "give the JSON schema"),
        ({"chat_template": "x", "conversation": []}, "give a list of messages"),
        ({"chat_template": "x", "conversation": ["a"]}, "give a list of messages"),
        ({"chat_template": "x", "add_generation_prompt": True, "continue_final_message": True}, "give one of them"),
    ],
    ids=str,
)
def test_what_a_template_cannot_do(how, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.from_pretrained(small_model()).apply_chat_template(**{"conversation": TALK, **how})


def test_without_jinja_a_template_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="chat templates need jinja2: pip install jinja2"):
        Tokenizer.from_pretrained(small_model()).apply_chat_template(TALK, chat_template="seen nowhere else")


def test_a_new_vocabulary(both):
    texts = ["some words here", "and there are some more words"] * 5
    options = {"show_progress": False, "new_special_tokens": ["<n>"]}
    ours, theirs = (t.train_new_from_iterator(iter(texts), 300, **options) for t in both)
    assert ours.get_vocab() == theirs.get_vocab()
    assert dict(ours(PAIRS)) == dict(theirs(PAIRS))
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.additional_special_tokens == ["<n>"]
    assert ours.model_max_length == theirs.model_max_length
    renamed = both[0].train_new_from_iterator(texts, 300, special_tokens_map={"[CLS]": "<cls>"}, show_progress=False)
    assert renamed.tokenize("some words", add_special_tokens=True)[0] == renamed.cls_token == "<cls>"
    assert renamed.convert_tokens_to_ids("[CLS]") == renamed.unk_token_id
    with pytest.raises(InputError, match="BpeTrainer has no option of that name"):
        both[0].train_new_from_iterator(texts, 300, nonsense=3)
