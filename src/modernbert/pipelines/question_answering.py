"""question-answering: the span of a text that answers a question about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Encoding

from modernbert.auto import AutoModelForQuestionAnswering
from modernbert.errors import InputError
from modernbert.models.heads import ModernBertForQuestionAnswering
from modernbert.pipelines.base import Job, Pipeline, Row
from modernbert.pipelines.checks import check_count, check_fields, check_iterable, check_switch, check_text, short


class QuestionAnsweringPipeline(Pipeline):
    """Finds answers in texts.

    A call takes `question` and `context` (texts, or lists of them; one context may serve many questions), or a dict
    {"question", "context"}, a list of these or an iterable of them. Options:

    - `top_k` (1): answers a question;
    - `max_seq_len` (384 or the model's context): tokens of a window, question and special tokens included; a longer
      context is read in windows;
    - `doc_stride` (128, or half a window): tokens that windows share;
    - `max_question_len`: longest question, in tokens; if not given, what leaves room for the context;
    - `max_answer_len` (15): longest answer, in tokens;
    - `handle_impossible_answer` (False): let "" be an answer, scored by the first token;
    - `align_to_words` (True): widen an answer to whole words.

    For each question it gives {"score", "start", "end", "answer"}, characters of the context, or a list of them, best
    first, where there are several. Scores of spans that read the same are added up.
    """

    task = "question-answering"
    auto_model = AutoModelForQuestionAnswering
    options = (
        "top_k",
        "max_seq_len",
        "doc_stride",
        "max_question_len",
        "max_answer_len",
        "handle_impossible_answer",
        "align_to_words",
    )

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        if not isinstance(model, ModernBertForQuestionAnswering):
            raise InputError(f"{self.task} needs a question answering model; this is a {type(model).__name__}")
        super().__init__(model, tokenizer, **options)

    def __call__(self, inputs: Any = None, context: Any = None, *, question: Any = None, **options: Any) -> Any:
        """Answer inputs, or `(question, context)`; see the class and `Pipeline.__call__`."""
        if context is not None and question is None:
            inputs, question = None, inputs
        if (inputs is None) == (question is None and context is None):
            raise InputError("give question and context, or dicts that hold them, and not both")
        return super().__call__(_paired(question, context) if inputs is None else inputs, **options)

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Defaults, checked."""
        window = settings.get("max_seq_len")
        window = min(self.context, 384) if window is None else check_count("max_seq_len", window)
        if window > self.context:
            raise InputError(f"max_seq_len is {window}; the model's context holds {self.context} tokens")
        stride = settings.get("doc_stride")
        stride = min(window // 2, 128) if stride is None else check_count("doc_stride", stride, 0)
        if stride > window:
            raise InputError(f"doc_stride is {stride}; it must not be larger than max_seq_len, {window}")
        longest = settings.get("max_question_len")
        return {
            "top_k": check_count("top_k", settings.get("top_k", 1)),
            "window": window,
            "stride": stride,
            "longest_question": None if longest is None else check_count("max_question_len", longest),
            "max_answer_len": check_count("max_answer_len", settings.get("max_answer_len", 15)),
            "impossible": check_switch("handle_impossible_answer", settings.get("handle_impossible_answer")),
            "align": check_switch("align_to_words", settings.get("align_to_words"), True),
        }

    def prepare(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        """One row a window of the context."""
        jobs = []
        for item in items:
            check_fields(item, ["question", "context"], self.task)
            question = check_text(item["question"], "a question")
            context = check_text(item["context"], "a context")
            windows = self._windows(question, context, settings)
            rows = [Row(window.ids, self._allowed(window)) for window in windows]
            jobs.append(Job(rows, (context, windows)))
        return jobs

    def _windows(self, question: str, context: str, settings: dict[str, Any]) -> list[Encoding]:
        asked, told = len(self.tokenizer.tokenize(question)), len(self.tokenizer.tokenize(context))
        if not asked or not told:
            empty = short(context if asked else question)
            raise InputError(f"a {'context' if asked else 'question'} makes no token with this tokenizer: {empty!r}")
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        longest = settings["longest_question"]
        if longest is not None and asked > longest:
            raise InputError(f"a question has {asked} tokens; max_question_len is {longest}: {short(question)!r}")
        room = settings["window"] - asked - special
        if room <= settings["stride"] and told > room:
            raise InputError(
                f"a question has {asked} tokens and leaves {max(room, 0)} of max_seq_len {settings['window']} for the "
                f"context; with doc_stride {settings['stride']} it needs more: {short(question)!r}"
            )
        encodings = self.tokenizer(
            [question],
            [context],
            truncation="only_second",
            max_length=settings["window"],
            stride=settings["stride"] if room > settings["stride"] else 0,
        ).encodings
        assert encodings is not None
        return [encodings[0], *encodings[0].overflowing]

    def _allowed(self, window: Encoding) -> list[bool]:
        """Where an answer may lie: in the context; and at the first token, which stands for no answer."""
        cls = self.tokenizer.cls_token_id
        pairs = zip(window.sequence_ids, window.ids, strict=True)
        return [sequence == 1 or (i == 0 and token == cls) for i, (sequence, token) in enumerate(pairs)]

    def run(self, rows: list[Row], settings: dict[str, Any]) -> Sequence[Any]:
        """The best spans of each row: (scores, starts, ends, score of no answer)."""
        ids_T, cu_seqlens = self.pack(rows)
        output = self.model(ids_T, cu_seqlens=cu_seqlens)
        lengths = [len(row.ids) for row in rows]
        # Candidates that read the same are added up, so there are more of them than answers.
        wanted = settings["top_k"] * 2 + 10 if settings["align"] else settings["top_k"]
        scores = zip(output.start_logits.float().split(lengths), output.end_logits.float().split(lengths), strict=True)
        return [
            best_spans(start_L, end_L, row.extra, wanted, settings["max_answer_len"])
            for row, (start_L, end_L) in zip(rows, scores, strict=True)
        ]

    def finish(self, job: Job, settings: dict[str, Any]) -> Any:
        """The best answers over all windows."""
        context, windows = job.context
        answers: dict[str, dict[str, Any]] = {}
        for window, (scores, starts, ends, _) in zip(windows, job.results, strict=True):
            for score, first, last in zip(scores, starts, ends, strict=True):
                start, end = _characters(window, first, last, settings["align"])
                text = context[start:end]
                answer = answers.setdefault(text.lower(), {"score": 0.0, "start": start, "end": end, "answer": text})
                answer["score"] += score
        ranked = list(answers.values())
        if settings["impossible"]:
            nothing = min(result[3] for result in job.results)
            ranked.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
        ranked = sorted(ranked, key=lambda answer: -answer["score"])[: settings["top_k"]]
        return ranked[0] if len(ranked) == 1 else ranked


def best_spans(
    start_L: torch.Tensor, end_L: torch.Tensor, allowed: list[bool], wanted: int, longest: int
) -> tuple[list[float], list[int], list[int], float]:
    """The most probable spans of a row.

    Args:
        start_L, end_L: scores of the tokens as first and last one.
        allowed: tokens that take part; the first one is no answer but the lack of one.
        wanted: how many spans.
        longest: tokens of a span at the most.

    Returns:
        Probabilities, first tokens, last tokens; and the probability of no answer.
    """
    barred_L = ~torch.tensor(allowed, device=start_L.device)
    start_L, end_L = (x.masked_fill(barred_L, float("-inf")).softmax(0) for x in (start_L, end_L))
    nothing = float(start_L[0] * end_L[0])
    inside_L = ~barred_L
    inside_L[0] = False
    width = min(longest, len(end_L))
    # (L, width): the span from each token on that is 1, 2, ... tokens long; past the end nothing is inside.
    ends_LW = F.pad(torch.where(inside_L, end_L, -1.0), (0, width - 1), value=-1.0).unfold(0, width, 1)
    spans_LW = torch.where(inside_L[:, None] & (ends_LW >= 0), start_L[:, None] * ends_LW, -1.0)
    best = spans_LW.flatten().topk(min(wanted, spans_LW.numel()))
    kept = [(score, place) for score, place in zip(*(x.tolist() for x in best), strict=True) if score >= 0]
    firsts = [place // width for _, place in kept]
    lasts = [place // width + place % width for _, place in kept]
    return [score for score, _ in kept], firsts, lasts, nothing


def _characters(window: Encoding, first: int, last: int, align: bool) -> tuple[int, int]:
    """Characters of the context from one token to another, or to the ends of their words."""
    if align:
        words = window.word_ids[first], window.word_ids[last]
        spans = [None if word is None else window.word_to_chars(word, 1) for word in words]
        if spans[0] is not None and spans[1] is not None:
            return spans[0][0], spans[1][1]
    return window.offsets[first][0], window.offsets[last][1]


def _paired(question: Any, context: Any) -> Any:
    """Dicts of questions and contexts that were given apart."""
    if question is None or context is None:
        raise InputError(f"{'question' if question is None else 'context'} is missing; give both question and context")
    if isinstance(question, str):
        return {"question": question, "context": context}
    questions = _listed("question", question)
    contexts = [context] * len(questions) if isinstance(context, str) else _listed("context", context)
    if len(questions) != len(contexts):
        raise InputError(f"there are {len(questions)} questions and {len(contexts)} contexts; they must be as many")
    return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]


def _listed(name: str, values: Any) -> list[Any]:
    return list(check_iterable(name, values))
