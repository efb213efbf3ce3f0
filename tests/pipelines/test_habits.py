"""What scripts for transformers give to a pipeline or ask of it."""

import logging

import numpy as np
import pyarrow
import pytest
import torch
import transformers
from transformers.pipelines.pt_utils import KeyDataset

import modernbert
from modernbert import AutoModelForSequenceClassification, Tokenizer, pipeline
from modernbert.errors import InputError
from modernbert.pipelines import TASKS, Pipeline
from tests.pipelines.peers import close
from tests.pipelines.test_streams import CASES, equal

pandas = pytest.importorskip("pandas")
datasets = pytest.importorskip("datasets")
TEXTS = ["a dog", "The cat ran across the road.", "two"]


@pytest.fixture(scope="module")
def folder(heads):
    return heads / "SequenceClassification"


@pytest.fixture(scope="module")
def classify(folder):
    return pipeline("text-classification", folder)


@pytest.fixture
def lines(log):
    """What is logged about arguments without effect."""
    log.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in log.records if "has no effect" in record.getMessage()]


HARMLESS = {
    "framework": "pt",
    "feature_extractor": None,
    "image_processor": None,
    "use_auth_token": None,
    "use_fast": True,
    "binary_output": False,
    "trust_remote_code": False,
    "num_workers": 0,
    "config": None,
    "model_kwargs": {},
}


@pytest.mark.parametrize("task", TASKS)
def test_arguments_that_mean_nothing_are_taken_in_silence(heads, task, lines):
    head, options, make = CASES[task]
    made = pipeline(task, heads / head, **options, **HARMLESS)
    item = make("the dog ran")
    plain = pipeline(task, heads / head, **options)
    assert equal(next(iter(made.stream([item], num_workers=None))), next(iter(plain.stream([item]))))
    assert not lines()


@pytest.mark.parametrize("task", TASKS)
def test_a_line_says_what_has_no_effect(heads, task, lines):
    head, options, make = CASES[task]
    given = {"trust_remote_code": True, "use_fast": False, "num_workers": 2, "binary_output": True}
    made = pipeline(task, heads / head, **options, **given)
    made([make("the dog ran")], num_workers=4)
    assert {line.split()[0] for line in lines()} == set(given)
    assert f"trust_remote_code has no effect on {task}: no code of a repository is ever executed" in lines()
    for name, value in (("framework", "tf"), ("feature_extractor", "x")):
        with pytest.raises(
            InputError, match=f"{name} is '{value}'; {task} takes texts and runs in PyTorch: it must be "
        ):
            pipeline(task, heads / head, **options, **{name: value})


@pytest.mark.parametrize("task", TASKS)
def test_every_task_takes_the_options_of_tokenizing(heads, task):
    head, options, make = CASES[task]
    serve = pipeline(task, heads / head, **options)
    short = make("the dog ran")
    for given in (
        {"truncation": True, "padding": True},
        {"tokenizer_kwargs": {"truncation": True}},
        {"tokenize_kwargs": {"padding": "longest"}},
        {"tokenizer_kwargs": None, "batch_size": 2},
    ):
        assert equal(next(serve.stream([short], **given)), next(serve.stream([short]))), given
    with pytest.raises(InputError, match="tokenizer_kwargs has no option stride; there are truncation, "):
        serve(short, tokenizer_kwargs={"stride": 3})
    with pytest.raises(InputError, match="tokenizer_kwargs is 'x'; give a dict of truncation, "):
        serve(short, tokenizer_kwargs="x")


def test_a_prompt_is_cut_where_asked_for(heads):
    serve = pipeline("text-generation", heads / "CausalLM", do_sample=False, return_full_text=False)
    with pytest.raises(InputError, match="the model's context holds"):
        serve("word " * 600)
    assert serve("word " * 600, truncation=True) == serve("word " * 600, tokenizer_kwargs={"truncation": True})


@pytest.mark.parametrize("task", ["fill-mask", "zero-shot-classification", "multiple-choice", "text-ranking"])
def test_long_texts_are_cut_where_asked_for(heads, task):
    head, options, make = CASES[task]
    serve = pipeline(task, heads / head, **options)
    long = make("word " * 600)
    if isinstance(long, dict):
        long = {name: value[:2] if isinstance(value, list) else value for name, value in long.items()}
    elif task == "fill-mask":
        long = f"[MASK] {long}"
    with pytest.raises(InputError, match="the model's context holds"):
        serve(long)
    for given in ({"truncation": True}, {"max_length": 512}, {"tokenizer_kwargs": {"truncation": True}}):
        assert serve(long, **given) == serve(long, truncation=True)
    pipeline(task, heads / head, **options, tokenizer_kwargs={"truncation": True})(long)


def test_words_are_read_in_windows_unless_they_are_to_be_cut(heads):
    tag = pipeline("ner", heads / "TokenClassification", ignore_labels=[])
    assert len(tag("word " * 600)) == 602
    assert len(tag("word " * 600, truncation=True)) == 510
    assert len(tag("word " * 600, max_length=12)) == 10


def test_batches_of_a_call_are_its_own(classify, monkeypatch):
    sizes = []
    run = type(classify).run
    monkeypatch.setattr(type(classify), "run", lambda self, rows, o: sizes.append(len(rows)) or run(self, rows, o))
    assert classify(TEXTS, batch_size=1) == classify(TEXTS)
    assert sizes == [1, 1, 1, 3]
    assert list(classify(iter(TEXTS), batch_size=2)) == classify(TEXTS, batch_tokens=10)
    with pytest.raises(InputError, match="batch_size is -1"):
        classify(TEXTS, batch_size=-1)


def test_all_scores_and_the_number_of_labels(folder, classify):
    theirs = transformers.pipeline("text-classification", model=str(folder))
    every = classify(TEXTS[0], top_k=None)
    close(every, theirs(TEXTS[0], top_k=None))
    assert classify(TEXTS[0], return_all_scores=True) == [every]
    assert classify(TEXTS[:1], return_all_scores=True) == [every]
    assert classify(TEXTS[0], return_all_scores=False) == classify(TEXTS[0])
    made = pipeline("text-classification", folder, return_all_scores=True)
    assert made(TEXTS[:1]) == [every]
    close(pipeline("text-classification", folder, top_k=1)(TEXTS[0], top_k=None), every)
    pair = [[[TEXTS[0], TEXTS[1]]]]
    close(classify(pair), theirs(pair))


def test_none_is_the_pipelines_own_value(heads):
    ours, theirs = (p("fill-mask", str(heads / "MaskedLM"), top_k=2) for p in (pipeline, transformers.pipeline))
    close(ours("a [MASK]", top_k=None), theirs("a [MASK]", top_k=None))
    assert len(ours("a [MASK]", top_k=None)) == 2


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, i):
        return TEXTS[i % len(TEXTS)]  # never an IndexError


def test_inputs_of_other_libraries(folder, classify):
    expected = classify(TEXTS)
    data = datasets.Dataset.from_dict({"text": TEXTS})
    for several in (np.array(TEXTS), pandas.Series(TEXTS), data["text"], pyarrow.array(TEXTS), pandas.Index(TEXTS)):
        assert classify(several) == expected, type(several)
    theirs = transformers.pipeline("text-classification", model=str(folder))
    for dataset in (Texts(), KeyDataset(data, "text")):
        answers = classify(dataset, batch_size=2)
        assert not isinstance(answers, list)
        close(list(answers), list(theirs(dataset)))
    assert list(classify(data)) == expected  # rows are dicts with "text"
    for table, message in (
        (pandas.DataFrame({"text": TEXTS}), "a DataFrame, a table with the columns text; give one of them"),
        (datasets.DatasetDict({"train": data}), r"a DatasetDict of tables, train; give .* inputs\['train'\]\['text'\]"),
        (transformers.BatchEncoding({"input_ids": [1]}), "inputs is a BatchEncoding; give a text"),
    ):
        with pytest.raises(InputError, match=message):
            classify(table)


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_says_what_it_is_and_goes_step_by_step(heads, task, tmp_path):
    head, options, make = CASES[task]
    serve = pipeline(task, heads / head, **options)
    for part in (f"task='{task}'", "dtype=float32", "device=cpu", "dimensions=", str(heads / head)):
        assert part in repr(serve)
    assert (serve.device, serve.dtype, serve.framework) == (torch.device("cpu"), torch.float32, "pt")
    assert serve.torch_dtype is serve.dtype
    item = make("the dog ran")
    answer = next(serve.stream([item]))
    assert equal(serve.postprocess(serve.forward(serve.preprocess(item))), answer)
    assert equal(serve.predict([item])[0], answer)
    assert equal(serve.transform([item])[0], answer)
    serve.save_pretrained(tmp_path)
    assert equal(next(pipeline(task, tmp_path, **options).stream([item])), answer)


def test_steps_that_transformers_has_are_no_place_for_a_task_of_ones_own():
    with pytest.raises(TypeError, match="Own defines postprocess; a task defines resolve, prepare, run and finish"):
        type("Own", (Pipeline,), {"postprocess": lambda self, x: x})


def test_classes_are_made_of_a_model_and_its_tokenizer(folder, classify):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    made = modernbert.TextClassificationPipeline(
        model=model, tokenizer=tokenizer, device=-1, torch_dtype="float32", framework="pt", return_all_scores=True
    )
    close(made(TEXTS), classify(TEXTS, top_k=None))
    for name in ("FillMask", "TokenClassification", "QuestionAnswering", "FeatureExtraction", "ZeroShotClassification"):
        assert issubclass(getattr(modernbert.pipelines, f"{name}Pipeline"), modernbert.Pipeline)


def test_arguments_of_loading(folder, classify):
    config = modernbert.AutoConfig.from_pretrained(folder)
    for given in ({"config": config}, {"config": str(folder)}, {"model_kwargs": {"attn_implementation": "eager"}}):
        close(pipeline("text-classification", folder, **given)(TEXTS), classify(TEXTS))
    eager = pipeline("text-classification", folder, model_kwargs={"attn_implementation": "eager", "dtype": "bfloat16"})
    assert eager.dtype == torch.bfloat16
    model = eager.model
    pipeline("text-classification", model, folder, config=model.config)
    for given, message in (
        ({"model_kwargs": {"attn_implementation": "eager"}}, "attn_implementation is for loading"),
        ({"config": config.replace(num_labels=9)}, "config is for loading, and model is loaded already"),
        ({"model_kwargs": "x"}, "model_kwargs is 'x'; give a dict"),
        ({"dtype": "float32", "model_kwargs": {"dtype": "bfloat16"}}, "dtype is given twice"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline("text-classification", model, folder, **given)


def test_labels_of_each_text(heads):
    serve = pipeline("zero-shot-classification", heads / "SequenceClassification")
    labels = [["x", "y"], ["z"], "x, z"]
    expected = [serve(text, candidate_labels=own) for text, own in zip(TEXTS, labels, strict=True)]
    assert serve([{"sequence": t, "candidate_labels": own} for t, own in zip(TEXTS, labels, strict=True)]) == expected
    assert serve(TEXTS[:2], labels[:2]) == serve(sequences=TEXTS[:2], candidate_labels=labels[:2]) == expected[:2]
    assert serve(pandas.Series(TEXTS[:2]), candidate_labels=labels[:2]) == expected[:2]
    assert serve({"sequence": TEXTS[1]}, candidate_labels=["z"]) == expected[1]
    for inputs, given, message in (
        (TEXTS, labels[:2], "holds 2 lists of labels, for 3 texts; give one a text"),
        (TEXTS[:2], [["x"], []], r"candidate_labels is \[\]"),
        (TEXTS, None, "candidate_labels is None; give one label or more"),
    ):
        with pytest.raises(InputError, match=message):
            serve(inputs, candidate_labels=given)
