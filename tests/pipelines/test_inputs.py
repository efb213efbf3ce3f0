"""What a pipeline takes for its inputs, and what it refuses because it would answer something else."""

import copy
import inspect
import io
import logging
import multiprocessing
import pickle
import pydoc

import numpy as np
import pyarrow
import pytest

import modernbert
from modernbert import AutoModel, QuantizationConfig, pipeline
from modernbert.errors import CheckpointError, InputError
from modernbert.pipelines import small_model
from modernbert.text.tokenizer import Tokenizer
from tests.pipelines.test_streams import CASES

pandas = pytest.importorskip("pandas")
TEXTS = ["a dog", "The cat ran across the road.", "two"]


@pytest.fixture(scope="module")
def embed(heads):
    return pipeline("sentence-embedding", heads / "Model")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pandas.DataFrame({"text": TEXTS, "label": 0}), r"a DataFrame, a table .* text, label; .* inputs\['text'\]"),
        (pandas.DataFrame(), "a DataFrame, a table with the columns nothing"),
        (pyarrow.table({"text": TEXTS}), "a Table, a table with the columns text"),
        ({"text": TEXTS}, "a text is a list"),
        ({"label": TEXTS}, "an input has label and lacks text"),
        ({"a dog", "a cat"}, "a set, which has no order; give a list"),
        (frozenset(TEXTS), "a frozenset, which has no order"),
        (np.array("a dog"), "inputs is a ndarray; give a text"),
        (bytearray(b"a dog"), "inputs is a bytearray"),
        (pandas.Series({"a": 1.5}), "a text is a float"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_table_is_refused_instead_of_the_names_of_its_columns_embedded(embed, table, message):
    with pytest.raises(InputError, match=message) as error:
        list(embed(table))
    assert "\n" not in str(error.value)
    if not isinstance(table, dict):
        with pytest.raises(InputError, match=message):
            list(embed.stream(table))


def test_a_stream_of_one_text_is_not_the_stream_of_its_characters(embed):
    with pytest.raises(InputError, match="inputs is a str; give a text, a list"):
        embed.stream("a dog")


def test_columns_of_tables_are_read(embed):
    expected = embed(TEXTS)
    frame = pandas.DataFrame({"text": TEXTS})
    assert np.array_equal(list(embed(frame["text"])), expected)
    assert np.array_equal(list(embed(np.array(TEXTS))), expected)
    assert np.array_equal(list(embed(row for row in frame.to_dict("records"))), expected)
    data = pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS})
    assert np.array_equal(list(embed(data)), expected)
    assert np.array_equal(list(embed(data["text"])), expected)


def test_tables_as_questions_are_refused(heads):
    answer = pipeline("question-answering", heads / "QuestionAnswering")
    frame = pandas.DataFrame({"q": ["Who?"], "c": ["Anna ran."]})
    with pytest.raises(InputError, match="question is a DataFrame, a table with the columns q, c"):
        answer(question=frame, context=frame)
    assert answer(question=frame["q"], context=frame["c"]) == answer(question=["Who?"], context=["Anna ran."])


def test_fields_by_their_order(heads):
    rank = pipeline("text-ranking", heads / "Model")
    assert rank("a dog", TEXTS) == rank(query="a dog", documents=TEXTS)
    assert rank("a dog", documents=TEXTS, top_k=1) == rank(query="a dog", documents=TEXTS, top_k=1)
    answer = pipeline("question-answering", heads / "QuestionAnswering")
    assert answer("Who ran?", TEXTS[1]) == answer(question="Who ran?", context=TEXTS[1])
    choose = pipeline("multiple-choice", heads / "MultipleChoice")
    assert choose("The dog", ["barks", "reads"]) == choose(prompt="The dog", choices=["barks", "reads"])
    for serve, field in ((rank, "query"), (answer, "question"), (choose, "prompt")):
        with pytest.raises(InputError, match=f"an input is a str; .* takes a dict with {field}"):
            serve("alone")
        with pytest.raises(InputError):
            serve({field: "a dog"}, TEXTS)


def test_help_and_signature_show_the_inputs_and_options_of_a_task(heads, embed):
    answer = pipeline("question-answering", heads / "QuestionAnswering")
    shown = inspect.signature(answer).parameters
    assert list(shown)[:4] == ["inputs", "context", "question", "top_k"]
    assert (shown["top_k"].default, shown["max_answer_len"].default) == (1, 15)
    assert "max_answer_len: Longest answer in tokens. (default: 15)" in pydoc.render_doc(answer)
    assert list(inspect.signature(type(embed)).parameters)[:2] == ["model", "tokenizer"]


# Line ends


def test_a_text_is_taken_as_it_is_line_end_and_all(embed, log):
    assert not np.array_equal(embed("a dog\n"), embed("a dog"))
    lines = io.StringIO("a dog\nThe cat ran across the road.\ntwo")
    vectors = list(embed(line for line in lines))
    assert np.array_equal(vectors[0], embed("a dog\n"))
    assert log.text.count("texts end with a line end") == 1  # and that is said once
    log.clear()
    lines.seek(0)
    assert np.array_equal(list(embed(line.rstrip("\n") for line in lines)), embed(TEXTS))
    assert list(embed(iter(["ends so\n", "does not", "so\n", "does not"])))
    assert not log.text


# Models that do not serve


def warnings_of_pipelines(log):
    warned = [record for record in log.records if record.levelno == logging.WARNING]
    return [record.getMessage() for record in warned if record.name.startswith("modernbert.pipelines")]


def test_only_an_encoder_that_was_not_trained_to_compare_says_how_vectors_are_made(log):
    for task in ("sentence-embedding", "text-ranking", "late-interaction", "sparse-embedding"):
        log.clear()
        pipeline(task)
        assert not [record for record in log.records if "means of its states" in record.getMessage()]
        assert not warnings_of_pipelines(log)
    for task in ("sentence-embedding", "text-ranking"):
        log.clear()
        pipeline(task, small_model())  # chosen by the caller
        assert [record.levelname for record in log.records if "means of its states" in record.getMessage()] == ["INFO"]
        assert not warnings_of_pipelines(log)
    log.clear()
    pipeline("fill-mask")
    assert not warnings_of_pipelines(log)


@pytest.mark.parametrize(
    ("task", "head", "message"),
    [
        ("text-scoring", "MaskedLM", "needs a causal language model, which is a decoder; .* is an encoder"),
        ("text-generation", "Model", "text-generation needs a causal language model, .* is an encoder"),
        ("sentence-embedding", "CausalLM", "sentence-embedding needs an encoder without a head, .*; .* is a decoder"),
        ("text-ranking", "CausalLM", "text-ranking needs a classifier with one label, .* or an encoder, .* a decoder"),
        ("fill-mask", "CausalLM", "fill-mask needs an encoder for masked language modelling; .* is a decoder"),
        ("token-classification", "DecoderModel", "token-classification needs an encoder"),
        ("text-generation", "DecoderSequenceClassification", "ModernBertDecoderForSequenceClassification"),
        ("text-scoring", "DecoderSequenceClassification", "ModernBertDecoderForSequenceClassification"),
    ],
)
def test_an_encoder_where_a_decoder_is_needed_is_said_in_the_words_of_the_task(heads, task, head, message):
    with pytest.raises(InputError, match=message):
        pipeline(task, heads / head)


def test_a_model_that_was_not_trained_on_entailment_is_said_once_and_briefly(heads, log):
    from modernbert import AutoModelForSequenceClassification

    labels = {i: f"intent number {i} of the bank" for i in range(77)}
    model = AutoModelForSequenceClassification.from_pretrained(heads / "Model", num_labels=77, id2label=labels)
    log.clear()
    classify = pipeline("zero-shot-classification", model, heads / "Model")
    classify(TEXTS, candidate_labels=["a", "b"])
    classify(TEXTS[0], candidate_labels=["a", "b"])
    (said,) = warnings_of_pipelines(log)
    assert "none begins with 'entail': it was not trained on entailment" in said
    assert "and 72 more" in said
    assert len(said) < 400


# Copies


def answer(serve, connection):
    connection.send(serve(TEXTS).tobytes())


def test_a_process_that_is_spawned_takes_a_pipeline_and_gives_the_same_bits(embed):
    """Over two seconds: the child imports PyTorch."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(embed, there))
    process.start()
    assert here.poll(120)
    assert here.recv() == embed(TEXTS).tobytes()
    process.join()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_give_the_same_bits_and_stay_optimized_or_plain(heads, dtype):
    serve = pipeline("sentence-embedding", heads / "Model", dtype=dtype)
    for copied in (copy.deepcopy(serve), pickle.loads(pickle.dumps(serve))):
        assert np.array_equal(copied(TEXTS), serve(TEXTS))
        assert (copied.model.model.runner is None) == (serve.model.model.runner is None)
    plain = AutoModel.from_pretrained(heads / "Model", dtype=dtype)
    serve = pipeline("sentence-embedding", plain, Tokenizer.from_pretrained(heads / "Model"))
    copied = pickle.loads(pickle.dumps(serve))
    assert np.array_equal(copied(TEXTS), serve(TEXTS))
    assert copied.model.model.runner is None


@pytest.mark.parametrize("task", CASES)
def test_a_copy_of_every_task_answers_alike(heads, task):
    head, options, make = CASES[task]
    serve = pipeline(task, heads / head, **options)
    copied = pickle.loads(pickle.dumps(serve))
    assert type(copied) is type(serve)
    item = make("the dog ran")
    assert np.array_equal(next(copied.stream([item])), next(serve.stream([item])))


def test_a_copy_of_a_quantized_model_gives_the_same_bits():
    serve = pipeline("sentence-embedding", small_model(), quantization_config=QuantizationConfig(tokens=200))
    assert np.array_equal(pickle.loads(pickle.dumps(serve))(TEXTS), serve(TEXTS))


HEAD_KINDS = {
    "SequenceClassification": ("text-classification", "zero-shot-classification"),
    "TokenClassification": ("token-classification",),
    "QuestionAnswering": ("question-answering",),
    "MultipleChoice": ("multiple-choice",),
}


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_a_model_with_the_head_of_another_task_is_refused_by_name(heads, head):
    others = [task for kind, tasks in HEAD_KINDS.items() if kind != head for task in tasks]
    for task in [*others, "fill-mask"]:
        with pytest.raises(InputError, match=f"{task} needs a model with a head for .*ModernBertFor{head}"):
            pipeline(task, heads / head)


@pytest.mark.parametrize("labels", [1, 3])
def test_classifiers_make_vectors_with_a_warning_and_cross_encoders_none(heads, tmp_path, log, labels):
    folder = tmp_path / "classifier"
    cls = modernbert.ModernBertForSequenceClassification
    cls.from_pretrained(heads / "SequenceClassification", num_labels=labels).save_pretrained(folder)
    Tokenizer.from_pretrained(heads / "Model").save_pretrained(folder)
    log.clear()
    if labels == 1:
        with pytest.raises(CheckpointError, match=r"one label .*text-ranking"):
            pipeline("sentence-embedding", folder)
        assert len(pipeline("text-ranking", folder)("a dog", ["a cat", "a dog"])) == 2
    else:
        pipeline("sentence-embedding", folder)
        assert [r.getMessage() for r in log.records if "its head is not used" in r.getMessage()]


def test_options_given_when_a_pipeline_is_made_are_checked_then(heads):
    for task, head, options, message in (
        ("ner", "TokenClassification", {"aggregation_strategy": "foo"}, "aggregation_strategy is 'foo'"),
        ("fill-mask", "MaskedLM", {"top_k": 0}, "top_k is 0"),
        ("zero-shot-classification", "SequenceClassification", {"hypothesis_template": "x"}, "hypothesis_template is"),
        ("text-generation", "CausalLM", {"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline(task, heads / head, **options)
    pipeline("zero-shot-classification", heads / "SequenceClassification", hypothesis_template="It is {}.")


def test_small_mistakes_are_told_what_to_write_instead(heads, embed):
    with pytest.raises(InputError, match=r"spans is \(0, 3\); give a list of pairs of characters"):
        embed({"text": "hello", "spans": (0, 3)})
    with pytest.raises(InputError, match=r'give a pair of texts as \{"text": ..., "text_pair": ...\}'):
        pipeline("text-classification", heads / "SequenceClassification")([("a", "b")])
