"""question-answering: the span of a text that answers a question about it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Encoding

from modernbert.auto import AutoModelForQuestionAnswering
from modernbert.checks import check_text, short
from modernbert.errors import InputError
from modernbert.models.heads import ModernBertForQuestionAnswering
from modernbert.pipelines.base import Job, Pipeline, Row, check_windows
from modernbert.pipelines.inputs import check_fields, check_iterable
from modernbert.pipelines.options import QuestionAnsweringOptions

Spans = tuple[list[float], list[int], list[int], float]  # scores, first and last tokens; score of no answer


@dataclasses.dataclass
class Window(Row):
    """A window of the context behind the question, and the tokens where an answer may lie."""

    encoding: Encoding
    allowed: list[bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedOptions(QuestionAnsweringOptions):
    """Options with the sizes of windows that fit the model."""

    max_seq_len: int
    doc_stride: int


class QuestionAnsweringPipeline(Pipeline[ResolvedOptions, Window, Spans]):
    """Finds answers in texts.

    A call takes `question` and `context` (texts, or lists of them; one context may serve many questions), or a dict
    {"question", "context"}, a list of these or an iterable of them.

    For each question it gives {"score", "start", "end", "answer"}, characters of the context, or a list of them, best
    first, where there are several. Scores of spans that read the same are added up.
    """

    task = "question-answering"
    options = QuestionAnsweringOptions
    auto_model = AutoModelForQuestionAnswering
    models = (ModernBertForQuestionAnswering,)
    needs = "an encoder for question answering"
    fields = ("question", "context")
    second = "context"

    def join(self, fields: dict[str, Any]) -> Any:
        """Dicts of questions and contexts that were given apart."""
        question, context = fields["question"], fields["context"]
        missing = [name for name, value in fields.items() if value is None]
        if missing:
            raise InputError(f"{missing[0]} is missing; give both question and context")
        if isinstance(question, str):
            return fields
        questions = list(check_iterable("question", question))
        contexts = [context] * len(questions) if isinstance(context, str) else list(check_iterable("context", context))
        if len(questions) != len(contexts):
            raise InputError(f"there are {len(questions)} questions and {len(contexts)} contexts; they must be as many")
        return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]

    def resolve(self, options: QuestionAnsweringOptions) -> ResolvedOptions:
        window = min(self.context, 384) if options.max_seq_len is None else options.max_seq_len
        if window > self.context:
            raise InputError(f"max_seq_len is {window}; the model's context holds {self.context} tokens")
        stride = min(window // 2, 128) if options.doc_stride is None else options.doc_stride
        if stride > window:
            raise InputError(f"doc_stride is {stride}; it must not be larger than max_seq_len, {window}")
        return ResolvedOptions(**{**vars(options), "max_seq_len": window, "doc_stride": stride})

    def prepare(self, items: list[Any], options: ResolvedOptions) -> list[list[Window]]:
        rows = []
        for item in items:
            check_fields(item, self.fields, self.task)
            question = check_text(item["question"], "a question")
            context = check_text(item["context"], "a context")
            rows.append([Window(w.ids, w, self._allowed(w)) for w in self._windows(question, context, options)])
        return rows

    def _windows(self, question: str, context: str, options: ResolvedOptions) -> list[Encoding]:
        asked, told = len(self.tokenizer.tokenize(question)), len(self.tokenizer.tokenize(context))
        if not asked or not told:
            empty = short(context if asked else question)
            raise InputError(f"a {'context' if asked else 'question'} makes no token with this tokenizer: {empty!r}")
        longest, window, stride = options.max_question_len, options.max_seq_len, options.doc_stride
        if longest is not None and asked > longest:
            raise InputError(f"a question has {asked} tokens; max_question_len is {longest}: {short(question)!r}")
        room = window - asked - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room <= stride and told > room:
            raise InputError(
                f"a question has {asked} tokens and leaves {max(room, 0)} of max_seq_len {window} for the context; "
                f"with doc_stride {stride} it needs more: {short(question)!r}"
            )
        stride = stride if room > stride else 0
        check_windows(told, window, room - stride)
        encodings = self.tokenizer(
            [question], [context], truncation="only_second", max_length=window, stride=stride
        ).encodings
        assert encodings is not None
        return [encodings[0], *encodings[0].overflowing]

    def _allowed(self, window: Encoding) -> list[bool]:
        """Where an answer may lie: in the context; and at the first token, which stands for no answer."""
        cls = self.tokenizer.cls_token_id
        pairs = zip(window.sequence_ids, window.ids, strict=True)
        return [sequence == 1 or (i == 0 and token == cls) for i, (sequence, token) in enumerate(pairs)]

    def run(self, rows: list[Window], options: ResolvedOptions) -> list[Spans]:
        output = self.model.run_packed(self.pack(rows))
        lengths = [len(row.ids) for row in rows]
        # Candidates that read the same are added up, so there are more of them than answers.
        wanted = options.top_k * 2 + 10 if options.align_to_words else options.top_k
        scores = zip(output.start_logits.float().split(lengths), output.end_logits.float().split(lengths), strict=True)
        return [
            best_spans(start_L, end_L, row.allowed, wanted, options.max_answer_len)
            for row, (start_L, end_L) in zip(rows, scores, strict=True)
        ]

    def finish(self, job: Job[Window, Spans], options: ResolvedOptions) -> Any:
        context = job.item["context"]
        answers: dict[str, dict[str, Any]] = {}
        for row, (scores, starts, ends, _) in zip(job.rows, job.results, strict=True):
            for score, first, last in zip(scores, starts, ends, strict=True):
                start, end = _characters(row.encoding, first, last, options.align_to_words)
                text = context[start:end]
                answer = answers.setdefault(text.lower(), {"score": 0.0, "start": start, "end": end, "answer": text})
                answer["score"] += score
        ranked = list(answers.values())
        if options.handle_impossible_answer:
            nothing = min(result[3] for result in job.results)
            ranked.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
        ranked = sorted(ranked, key=lambda answer: -answer["score"])[: options.top_k]
        return ranked[0] if len(ranked) == 1 else ranked


def best_spans(start_L: torch.Tensor, end_L: torch.Tensor, allowed: list[bool], wanted: int, longest: int) -> Spans:
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
