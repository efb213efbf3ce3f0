"""What holds for every task: order, batches, bounded look-ahead, bad inputs, one line a mistake."""

import itertools

import numpy as np
import pytest

from modernbert import AutoModelForMaskedLM, pipeline
from modernbert.errors import InputError
from modernbert.pipelines import ALIASES, TASKS

WORDS = ["the", "dog", "ran", "across", "the", "road", "and", "a", "cat", "looked", "at", "it", "from", "a", "window"]
TEXTS = [" ".join(WORDS[i % 5 : i % 5 + 1 + (7 * i) % 15]) for i in range(60)]
# Task -> the checkpoint's head, options of every call, and how a text becomes an input.
CASES = {
    "fill-mask": ("MaskedLM", {}, lambda t: f"{t} [MASK]"),
    "text-classification": ("SequenceClassification", {"top_k": None}, lambda t: t),
    "zero-shot-classification": ("SequenceClassification", {"candidate_labels": ["a", "b"]}, lambda t: t),
    "token-classification": ("TokenClassification", {"ignore_labels": []}, lambda t: t),
    "question-answering": ("QuestionAnswering", {"top_k": 2}, lambda t: {"question": "Who ran?", "context": t}),
    "multiple-choice": ("MultipleChoice", {}, lambda t: {"prompt": t, "choices": t.split()}),
    "feature-extraction": ("Model", {}, lambda t: t),
    "sentence-embedding": ("Model", {}, lambda t: t),
    "sparse-embedding": ("MaskedLM", {"form": "tokens"}, lambda t: t),
    "late-interaction": ("MultiVector", {}, lambda t: t),
    "text-ranking": ("Model", {}, lambda t: {"query": t, "documents": t.split()}),
    "text-generation": ("CausalLM", {"do_sample": False, "max_new_tokens": 5}, lambda t: t),
    "text-scoring": ("CausalLM", {"max_length": 8, "stride": 3}, lambda t: t),
}
EMPTY = {"question": ("question", "context"), "prompt": ("prompt",), "query": ("query",)}


def equal(a, b):
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@pytest.fixture(scope="module", params=CASES)
def case(request, heads):
    head, options, make = CASES[request.param]
    return request.param, pipeline(request.param, heads / head, **options), make


def test_every_task_is_tried():
    assert set(CASES) == set(TASKS)
    assert {ALIASES[name] for name in ALIASES} <= set(TASKS)


def test_answers_do_not_depend_on_the_batch_and_keep_their_order(case, heads):
    task, serve, make = case
    inputs = [make(text) for text in TEXTS]
    whole = list(serve.stream(inputs))
    assert len(whole) == len(inputs)
    for i in (0, 7, 31):
        assert equal(next(serve.stream([inputs[i]])), whole[i])
    head, options, _ = CASES[task]
    for batching in ({"batch_tokens": 40}, {"batch_size": 3}):
        other = list(pipeline(task, heads / head, **options, **batching).stream(iter(inputs)))
        assert all(equal(a, b) for a, b in zip(other, whole, strict=True)), batching


def test_an_endless_stream_is_read_no_further_than_the_look_ahead(case):
    _, serve, make = case
    read = itertools.count()
    endless = (make(TEXTS[next(read) % len(TEXTS)]) for _ in itertools.repeat(None))
    stream = serve.stream(endless)
    for _ in range(5):
        next(stream)
    assert next(read) <= 4096 + 64


def test_a_bad_input_is_reported_in_its_place(case):
    _, serve, make = case
    good = [make(text) for text in TEXTS[:4]]
    stream = serve.stream([*good[:2], None, *good[2:]], on_error="return")
    answers = list(stream)
    assert len(answers) == 5
    assert isinstance(answers[2], InputError)
    expected = list(serve.stream(good))
    assert all(equal(a, b) for a, b in zip([*answers[:2], *answers[3:]], expected, strict=True))
    stream = serve.stream([*good[:2], None, *good[2:]])
    assert equal(next(stream), expected[0])
    assert equal(next(stream), expected[1])  # answers before the mistake are not lost
    with pytest.raises(InputError, match="None"):
        next(stream)


BAD = [
    ("", "empty or only spaces"),
    (" \n\t ", "empty or only spaces"),
    (None, "None"),
    (7, "int"),
    ("a lone \ud800 surrogate", "lone surrogate, U\\+D800 at character"),
    ([], "empty list|list"),
    (b"bytes", "bytes"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=lambda v: repr(v)[:20])
def test_bad_inputs_are_one_clear_error(case, bad, message):
    task, serve, make = case
    made = make("x")
    if isinstance(made, dict):  # in the place of the task's first text
        key = next(iter(made))
        given = {**made, key: bad}
    else:
        given = bad
    with pytest.raises(InputError, match=message) as error:
        serve(given)
    assert "\n" not in str(error.value)
    if not isinstance(made, dict) and bad != []:
        with pytest.raises(InputError, match=message):
            serve(["fine", bad] if task != "fill-mask" else ["fine [MASK]", bad])


def test_two_hundred_thousand_words(case):
    """Refused where a text must fit the context; read in windows where the task can do that, cut where it is usual."""
    task, serve, make = case
    text = "word " * 200_000
    if task == "token-classification":
        tokens = serve(text, ignore_labels=[])
        assert len(tokens) == len(serve.tokenizer(text).input_ids) - 2
        assert [t["index"] for t in tokens] == list(range(1, len(tokens) + 1))
        assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(tokens))
    elif task == "text-scoring":
        assert serve(text, max_length=512, stride=400)["tokens"] == len(serve.tokenizer(text).input_ids) - 2
    elif task == "question-answering":
        assert set(serve({"question": "Which?", "context": text}, top_k=1)) == {"score", "start", "end", "answer"}
    elif task == "late-interaction":
        assert len(serve(text)) == 512
    elif task in ("multiple-choice", "text-ranking"):
        key = next(iter(make("x")))
        with pytest.raises(InputError, match="tokens and the model's context holds 512"):
            serve({**make("x y"), key: text})
    else:
        with pytest.raises(InputError, match="tokens and the model's context holds 512: 'word word"):
            serve(make(text))


def test_unknown_options_name_the_known_ones(case):
    task, serve, make = case
    with pytest.raises(InputError, match=f"{task} has no option loudly; there are"):
        serve(make("x y"), loudly=True)
    with pytest.raises(InputError, match="on_error is 'ignore'; choose raise or return"):
        serve([make("x y")], on_error="ignore")


def test_the_task_follows_from_the_checkpoint(heads):
    for head, task in {
        "MaskedLM": "fill-mask",
        "SequenceClassification": "text-classification",
        "TokenClassification": "token-classification",
        "QuestionAnswering": "question-answering",
        "MultipleChoice": "multiple-choice",
        "Model": "feature-extraction",
        "CausalLM": "text-generation",
        "DecoderSequenceClassification": "text-classification",
        "DecoderModel": "feature-extraction",
    }.items():
        assert pipeline(model=heads / head).task == task
    model = AutoModelForMaskedLM.from_pretrained(heads / "MaskedLM")
    assert pipeline(model=model, tokenizer=str(heads / "MaskedLM")).task == "fill-mask"
    with pytest.raises(InputError, match="text-classification needs one that was trained for it"):
        pipeline("text-classification")
    assert pipeline("ner", heads / "TokenClassification").task == "token-classification"


def test_a_progress_bar_counts(heads, capsys):
    classify = pipeline("text-classification", heads / "SequenceClassification")
    assert classify(TEXTS, progress=True) == classify(TEXTS)
    assert "60/60" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "inputs", "options", "message"),
    [
        ("text-classification", {"text": "a", "pair": "b"}, {}, "an input has pair; a pair has text and text_pair"),
        ("text-classification", {"text_pair": "b"}, {}, "an input has text_pair and lacks text"),
        ("text-classification", "a", {"function_to_apply": "tanh"}, "function_to_apply is 'tanh'; choose one of"),
        ("text-classification", "a", {"top_k": 0}, "top_k is 0"),
        ("zero-shot-classification", "a", {"candidate_labels": []}, r"candidate_labels is \[\]"),
        ("zero-shot-classification", "a", {"candidate_labels": ["a", " "]}, "none of them empty"),
        ("text-classification", "a", {"truncation": "best"}, "truncation is 'best'; choose True, False or one of"),
        ("text-classification", "a", {"max_length": 0}, "max_length is 0"),
        ("text-classification", "a b c d", {"max_length": 4, "truncation": False}, "6 tokens and max_length is 4"),
        ("feature-extraction", "a", {"tokenize_kwargs": {"stride": 3}}, "tokenize_kwargs has no option stride; there"),
        ("zero-shot-classification", "a", {"hypothesis_template": "no place"}, "it needs {} where"),
        ("zero-shot-classification", "a", {"hypothesis_template": "{a}"}, "it needs {} where"),
        ("token-classification", "a", {"aggregation_strategy": "best"}, "aggregation_strategy is 'best'"),
        ("token-classification", "a", {"stride": 600}, "stride is 600; windows hold 510"),
        ("token-classification", "a b", {"is_split_into_words": True}, "with is_split_into_words it is a list of wor"),
        ("token-classification", [["a", ""]], {"is_split_into_words": True}, "a word is empty"),
        ("question-answering", {"question": "Who?"}, {}, "an input has question and lacks context"),
        ("question-answering", {"question": "Who?", "context": "I."}, {"max_seq_len": 900}, "max_seq_len is 900"),
        ("question-answering", {"question": "Who?", "context": "I."}, {"max_answer_len": 0}, "max_answer_len is 0"),
        ("question-answering", {"question": "who " * 300, "context": "word " * 400}, {},
         r"a question has \d+ tokens and leaves .* of max_seq_len 384 for the context"),
        ("question-answering", {"question": "a b c", "context": "I."}, {"max_question_len": 2}, "has 3 tokens; max_q"),
        ("multiple-choice", {"prompt": "a", "choices": []}, {}, r"choices is \[\]; give a list"),
        ("multiple-choice", {"prompt": "a", "choices": "b"}, {}, "choices is 'b'; give a list"),
        ("feature-extraction", "a", {"truncation": True, "tokenize_kwargs": {"truncation": True}}, "given twice"),
        ("text-generation", "a", {"max_length": 3, "max_new_tokens": None}, "max_length is 3 and the prompt has 3"),
        ("text-generation", "a", {"seed": -1}, "seed is -1"),
        ("text-generation", "a", {"stop_sequence": "a", "stop_strings": "b"}, "stop_sequence and stop_strings say"),
        ("text-generation", "a", {"return_tensors": True, "return_full_text": True}, "return_tensors gives ids"),
        ("text-scoring", "a", {"stride": 8}, "stride is 8; a window of 8 tokens"),
        ("sentence-embedding", "a", {"pooling": "median"}, "pooling is 'median'"),
        ("sentence-embedding", "a", {"prompt": "x", "prompt_name": "y"}, "prompt and prompt_name are given"),
    ],
)  # fmt: skip
def test_mistakes_in_options_are_one_clear_error(heads, task, inputs, options, message):
    serve = pipeline(task, heads / CASES[task][0], **CASES[task][1])
    with pytest.raises(InputError, match=message):
        serve(inputs, **options)
