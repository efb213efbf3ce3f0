"""question-answering beside the obvious search over all spans; multiple-choice beside the model; tags of long texts."""

import itertools
import json

import pytest
import torch

from modernbert import AutoModelForMultipleChoice, AutoModelForQuestionAnswering, pipeline
from modernbert.errors import InputError

CONTEXT = (
    "The dog ran across the road. The road was long and the dog was tired, but it ran on to the old house. "
    "A cat looked out of the window of the house and saw the dog. "
) * 12


def obvious(model, tokenizer, question, context, *, window, stride, longest):
    """For each window its encoding and every span of it as (score, first, last), best first."""
    cut = {"truncation": "only_second", "max_length": window, "stride": stride, "return_overflowing_tokens": True}
    batch = tokenizer([question], [context], **cut)
    for encoding in batch.encodings:
        output = model(torch.tensor([encoding.ids]))
        taking_part = [i for i, s in enumerate(encoding.sequence_ids) if s == 1 or i == 0]
        start = dict(zip(taking_part, output.start_logits[0, taking_part].softmax(0).tolist(), strict=True))
        end = dict(zip(taking_part, output.end_logits[0, taking_part].softmax(0).tolist(), strict=True))
        spans = [
            (start[a] * end[b], a, b) for a, b in itertools.product(taking_part[1:], repeat=2) if a <= b < a + longest
        ]
        yield encoding, sorted(spans, reverse=True)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_k": 3, "align_to_words": False}, {"max_answer_len": 2}])
def test_answers_are_those_of_the_obvious_search(heads, options):
    folder = heads / "QuestionAnswering"
    serve = pipeline("question-answering", folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    align, top_k = options.get("align_to_words", True), options.get("top_k", 1)
    merged = {}
    longest = options.get("max_answer_len", 15)
    candidates = obvious(model, serve.tokenizer, "Who ran?", CONTEXT, window=100, stride=30, longest=longest)
    windows = 0
    for encoding, spans in candidates:
        windows += 1
        for score, a, b in spans[: 2 * top_k + 10 if align else top_k]:
            start, end = encoding.offsets[a][0], encoding.offsets[b][1]
            if align:
                start = encoding.word_to_chars(encoding.word_ids[a], 1)[0]
                end = encoding.word_to_chars(encoding.word_ids[b], 1)[1]
            entry = merged.setdefault(CONTEXT[start:end].lower(), [0.0, start, end])
            entry[0] += score
    assert windows > 3
    best = sorted(merged.values(), reverse=True)[:top_k]
    answers = serve(question="Who ran?", context=CONTEXT, max_seq_len=100, doc_stride=30, **options)
    answers = answers if isinstance(answers, list) else [answers]
    assert [(a["start"], a["end"]) for a in answers] == [(start, end) for _, start, end in best]
    assert [a["answer"] for a in answers] == [CONTEXT[start:end] for _, start, end in best]
    assert [a["score"] for a in answers] == pytest.approx([score for score, _, _ in best], abs=1e-5)


def test_no_answer_is_an_answer_when_asked_for(heads):
    serve = pipeline("question-answering", heads / "QuestionAnswering")
    answers = serve(question="Who?", context="A dog.", handle_impossible_answer=True, top_k=50)
    assert [a for a in answers if a["answer"] == ""] == [
        {"score": answers[[a["answer"] for a in answers].index("")]["score"], "start": 0, "end": 0, "answer": ""}
    ]
    assert not [a for a in serve(question="Who?", context="A dog.", top_k=50) if a["answer"] == ""]


def test_the_ways_to_ask(heads):
    serve = pipeline("question-answering", heads / "QuestionAnswering")
    one = serve(question="Who ran?", context=CONTEXT)
    assert serve({"question": "Who ran?", "context": CONTEXT}) == one
    assert serve([{"question": "Who ran?", "context": CONTEXT}]) == [one]
    assert serve(question=["Who ran?", "Who?"], context=CONTEXT)[0] == one
    assert serve(question=["Who ran?"], context=[CONTEXT]) == [one]
    with pytest.raises(InputError, match="there are 2 questions and 1 contexts"):
        serve(question=["a", "b"], context=["c"])
    with pytest.raises(InputError, match="context is missing"):
        serve(question="a")
    with pytest.raises(InputError, match="give question and context"):
        serve()


def test_answers_lie_in_the_context_whatever_the_question_says(heads):
    serve = pipeline("question-answering", heads / "QuestionAnswering")
    answers = serve(question="where is [CLS] the dog now", context="abc def", top_k=20)
    assert all(answer["end"] <= 7 and answer["answer"] for answer in answers)


def test_choices_are_scored_by_the_model_whatever_their_number(heads, data):
    serve = pipeline("multiple-choice", heads / "MultipleChoice")
    model = AutoModelForMultipleChoice.from_pretrained(heads / "MultipleChoice")
    lines = (data / "multiple_choice" / "codah-dev.tsv").read_text().splitlines()[:6]
    items = [
        {"prompt": row[1], "choices": row[2 : 3 + i % 4]} for i, row in enumerate(line.split("\t") for line in lines)
    ]
    answers = serve(items)
    for item, answer in zip(items, answers, strict=True):
        n = len(item["choices"])
        batch = serve.tokenizer([item["prompt"]] * n, item["choices"], padding=True, return_tensors="pt")
        scores = model(batch.input_ids[None], batch.attention_mask[None]).logits[0].softmax(0)
        assert answer["scores"] == pytest.approx(scores.tolist(), abs=1e-6)
        assert answer["choice"] == item["choices"][answer["index"]]
        assert answer["score"] == max(answer["scores"])
    assert serve(prompt=items[3]["prompt"], choices=items[3]["choices"]) == answers[3]


def test_tokens_of_a_long_text_are_all_there_once(heads, data):
    lines = (data / "text" / "wikipedia" / "articles.jsonl").read_text().splitlines()
    text = next(t for t in (json.loads(line)["text"] for line in lines) if len(t) > 8000)
    serve = pipeline("token-classification", heads / "TokenClassification", ignore_labels=[])
    ids = serve.tokenizer(text).input_ids[1:-1]
    for stride in (0, 20, 300):
        tokens = serve(text, stride=stride)
        assert serve.tokenizer.convert_tokens_to_ids([t["word"] for t in tokens]) == ids


@pytest.mark.parametrize("stride", [0, 1, 2, 3])
@pytest.mark.parametrize("context", [6, 8, 13])
def test_tokens_that_share_a_character_are_kept_across_windows(heads, context, stride):
    """An emoji is several tokens of one character, and a window may begin among them."""
    serve = pipeline("token-classification", heads / "TokenClassification", ignore_labels=[])
    text = "🙂👩‍👩‍👧 ab 🙂🙂 cd 漢字 🙂"
    whole = serve(text)
    serve.tokenizer.model_max_length = context
    parts = serve(text, stride=stride)
    assert [(t["index"], t["word"], t["start"], t["end"]) for t in parts] == [
        (t["index"], t["word"], t["start"], t["end"]) for t in whole
    ]
