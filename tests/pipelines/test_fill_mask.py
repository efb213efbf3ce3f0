"""fill-mask: shaped as in transformers, with its scores; several masks, targets, batches, streams, clear errors."""

import copy

import pytest
import torch
import transformers

from modernbert import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    pipeline,
)
from modernbert.errors import InputError, NotFoundError
from modernbert.pipelines import TASKS
from modernbert.training.pretraining.train_tokenizer import save_tokenizer, train_tokenizer
from tests.conftest import SMALL
from tests.pipelines.peers import close

TEXTS = [
    "The dog ran across the [MASK].",
    "Paris is the [MASK] of France.",
    "[MASK]",
    "One [MASK] and another [MASK] here.",
    "A longer text, so that lengths differ: " + "word " * 20 + "[MASK] end.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a tokenizer of 400 ids."""
    folder = tmp_path_factory.mktemp("model")
    text = "The dog ran across the road. Paris is the capital of France. One word and another here. " * 4
    backend = train_tokenizer([text], 400)
    ids = {name: backend.token_to_id(f"[{name.upper()}]") for name in ("cls", "sep", "pad")}
    torch.manual_seed(0)
    sizes = {**SMALL, "num_hidden_layers": 3, "max_position_embeddings": 128, "initializer_range": 0.3}
    sizes |= {"vocab_size": backend.get_vocab_size(), "pad_token_id": ids["pad"]}
    sizes |= dict.fromkeys(("cls_token_id", "bos_token_id"), ids["cls"])
    sizes |= dict.fromkeys(("sep_token_id", "eos_token_id"), ids["sep"])
    config = ModernBertConfig(**sizes)
    ModernBertForMaskedLM(config).save_pretrained(folder)
    save_tokenizer(backend, folder, 128)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return pipeline("fill-mask", str(folder))


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.pipeline("fill-mask", model=str(folder))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("top_k", [1, 5, 7])
def test_one_text(ours, theirs, text, top_k):
    close(ours(text, top_k=top_k), theirs(text, top_k=top_k))


def test_targets(ours, theirs, folder, log):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = ours("Paris is the [MASK] of France.", targets=["capital", "dog", "capital"])
    assert {a["token_str"] for a in answers} == {" capital", " dog"}
    assert {a["token"] for a in answers} == set(tokenizer.convert_tokens_to_ids(["Ġcapital", "Ġdog"]))
    everything = {a["token"]: a["score"] for a in ours("Paris is the [MASK] of France.", top_k=400)}
    for answer in answers:
        assert answer["score"] == everything[answer["token"]]
    start = ours("[MASK] is the capital of France.", targets="Paris")[0]
    assert start["token_str"] == " Paris"  # this vocabulary has no "Paris"
    assert not log.text
    first = ours("[MASK] is the capital of France.", targets="Parisians")[0]
    assert "'Parisians' is " in log.text  # it has no token for the whole word, and says so
    assert "Parisians".startswith(first["token_str"])
    assert first["token_str"]
    several = ours("[MASK] is the [MASK].", targets=["Paris", "road"], top_k=1)
    assert len(several) == 2
    assert all(len(answers) == 1 for answers in several)
    close(ours(TEXTS[0], targets=[" dog", " road"]), theirs(TEXTS[0], targets=["Ġdog", "Ġroad"]))


def test_a_target_without_a_spaced_token_is_never_scored_as_a_bare_space(folder, ours, log):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mark = tokenizer.convert_tokens_to_ids("!")
    for text in ("Look at that [MASK]", "Look at that[MASK]", "[MASK] Look"):
        (answer,) = ours(text, targets=["!"])
        assert (answer["token"], answer["token_str"]) == (mark, "!")
        assert answer["score"] == {a["token"]: a["score"] for a in ours(text, top_k=10_000)}[mark]
    assert not log.text
    (answer,) = ours("It is a [MASK] .", targets=["🙂"])  # no token alone: the first byte, not the space before it
    assert answer["token_str"].strip()
    assert "'🙂' is " in log.text


def test_loaded_models_devices_and_dtypes(folder, ours):
    model = AutoModelForMaskedLM.from_pretrained(
        folder
    ).optimize_for_inference()  # as a pipeline does when it loads one
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert pipeline("fill-mask", model, tokenizer)(TEXTS[0]) == ours(TEXTS[0])
    assert pipeline("fill-mask", model, str(folder), top_k=2)(TEXTS[0]) == ours(TEXTS[0], top_k=2)
    assert pipeline("fill-mask", folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert pipeline("fill-mask", folder, torch_dtype=torch.bfloat16, device="cpu").model.dtype == torch.bfloat16
    assert pipeline("fill-mask", model, tokenizer, batch_size=2)(TEXTS) == ours(TEXTS)
    half = pipeline("fill-mask", copy.deepcopy(model), tokenizer, dtype="bfloat16", device="cpu")
    assert half.model.dtype == torch.bfloat16
    with pytest.raises(InputError, match="attn_implementation is for loading"):
        pipeline("fill-mask", model, tokenizer, attn_implementation="eager")
    with pytest.raises(InputError, match="give tokenizer="):
        pipeline("fill-mask", model)
    with pytest.raises(InputError, match="this is a ModernBertModel"):
        pipeline("fill-mask", ModernBertModel(model.config), tokenizer)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("no mask here", {}, r"there is no \[MASK\] in 'no mask here'"),
        (["fine [MASK]", "not fine"], {}, r"there is no \[MASK\] in 'not fine'"),
        ("[MASK]", {"top_k": 0}, "top_k is 0"),
        ("[MASK]", {"targets": []}, "targets is"),
        ("[MASK]", {"topk": 3}, "no option topk; there are .*top_k, targets"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_error(ours, inputs, options, message):
    with pytest.raises(InputError, match=message):
        ours(inputs, **options)


def test_unknown_tasks_and_models(folder):
    with pytest.raises(InputError, match=f"task is 'fill'; choose one of {', '.join(TASKS)}"):
        pipeline("fill")
    with pytest.raises(InputError, match="task is None"):
        pipeline()
    with pytest.raises(NotFoundError, match="neither a folder"):
        pipeline("fill-mask", "./nowhere/at/all")
    with pytest.raises(InputError, match="batch_tokens is 0"):
        pipeline("fill-mask", folder, batch_tokens=0)


def test_an_empty_list_is_refused_and_an_empty_iterable_ends(ours):
    with pytest.raises(InputError, match="inputs is an empty list"):
        ours([])
    assert list(ours(iter([]))) == []


# What everyone would accept in these places.
SENSIBLE = {
    "The dog ran across the [MASK].": "room road street field river grass garden yard lawn floor water path sea",
    "She opened the [MASK] and went into the room.": "door window gate doors",
    "He looked at her with tears in his [MASK].": "eyes face heart",
    "The sun was shining in the [MASK].": "sky morning garden east west sun air distance window night evening day",
    "They sat down at the [MASK] to eat their dinner.": "table fire door house window end kitchen",
    "I do not [MASK] what you mean.": "know understand see think believe",
    "He shook his [MASK] and said no.": "head",
    "My father and [MASK] live in a small house.": "mother I brother sister son father wife mamma",
    "I have never [MASK] him before.": "seen met heard known",
    "He put his hand in his [MASK] and took out some money.": "pocket hand pockets hands purse bag",
    "The [MASK] is the capital of the country.": "city town capital country state name county area village",
}


@pytest.mark.parametrize("text", SENSIBLE)
def test_the_small_model_gives_sensible_words(text):
    answers = pipeline("fill-mask")(text)
    assert {a["token_str"].strip() for a in answers} & set(SENSIBLE[text].split()), [a["token_str"] for a in answers]
