"""text-scoring: how likely a decoder finds texts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from modernbert.auto import AutoModelForCausalLM
from modernbert.checks import check_text, short
from modernbert.errors import InputError
from modernbert.models.decoder import ModernBertDecoderForCausalLM
from modernbert.pipelines.base import Job, Pipeline, Row, check_windows
from modernbert.pipelines.options import TextScoringOptions
from modernbert.text.encoding import UNLIMITED

_ROWS_TOGETHER = 512  # whose scores over the whole vocabulary are alive at once


@dataclasses.dataclass
class ScoredRow(Row):
    """A window of a text, the places of the tokens that it scores, and their characters in the text."""

    scored: list[int]
    spans: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedOptions(TextScoringOptions):
    """Options with sizes that fit the model."""

    max_length: int
    stride: int


class TextScoringPipeline(Pipeline[ResolvedOptions, ScoredRow, list[float]]):
    """Scores texts by a causal language model.

    A call takes a text, a list of texts or an iterable of them. A text longer than a window is read in several, each of
    which scores what the one before did not; the larger the overlap, the more the scores are what the whole text would
    give.

    For each text it gives {"log_likelihood" (natural logarithm), "tokens" (scored ones: all but special tokens and a
    first one that nothing stands before), "perplexity" (a token), "bits_per_byte" (of UTF-8, NaN where the first
    token is not scored)}; with `token_scores` also "token_scores", a list of {"start", "end", "score"} with the
    characters of each scored token and its part of the log-likelihood.
    """

    task = "text-scoring"
    options = TextScoringOptions
    auto_model = AutoModelForCausalLM
    models = (ModernBertDecoderForCausalLM,)
    needs = "a causal language model, which is a decoder"
    architecture = "decoder"

    def resolve(self, options: TextScoringOptions) -> ResolvedOptions:
        window = min(options.max_length or self.context, self.context)
        stride = options.stride or max(1, window // 2)
        if stride >= window:
            raise InputError(f"stride is {stride}; a window of {window} tokens leaves room for 1 to {window - 1}")
        return ResolvedOptions(**{**vars(options), "max_length": window, "stride": stride})

    def prepare(self, items: list[Any], options: ResolvedOptions) -> list[list[ScoredRow]]:
        special = set(self.tokenizer.all_special_ids)
        all_rows = []
        for ids, spans in self._encode(items, options.add_special_tokens):
            check_windows(len(ids), options.max_length, options.stride)
            rows: list[ScoredRow] = []
            done = 1  # the first token has nothing before it
            while not rows or done < len(ids):
                end = min(done + options.stride if rows else options.max_length, len(ids))
                start = max(0, end - options.max_length)
                scored = [i for i in range(done, end) if ids[i] not in special]
                rows.append(ScoredRow(ids[start:end], [i - start for i in scored], [spans[i] for i in scored]))
                done = end
            all_rows.append(rows)
        return all_rows

    def _encode(self, texts: list[Any], special: bool) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of texts of any length, and the characters of each token."""
        for text in texts:
            check_text(text)
        encodings = self.tokenizer(texts, add_special_tokens=special, truncation=True, max_length=UNLIMITED).encodings
        assert encodings is not None
        for text, encoding in zip(texts, encodings, strict=True):
            if not encoding.ids:
                raise InputError(f"a text makes no token with this tokenizer: {short(text)!r}")
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def run(self, rows: list[ScoredRow], options: ResolvedOptions) -> list[list[float]]:
        inputs = self.pack(rows)
        hidden = self.model.model.encode(inputs).last_TM
        ids_T = torch.tensor([i for row in rows for i in row.ids])
        starts = inputs.packing.starts
        wanted = torch.tensor([start + i for start, row in zip(starts, rows, strict=False) for i in row.scored])
        found: list[float] = []
        for some in wanted.to(torch.int64).split(_ROWS_TOGETHER):
            scores = self.model.score(hidden[(some - 1).to(hidden.device)]).float().log_softmax(-1)
            found += scores.gather(1, ids_T[some, None].to(hidden.device)).squeeze(1).double().tolist()
        rest = iter(found)
        return [[next(rest) for _ in row.scored] for row in rows]

    def finish(self, job: Job[ScoredRow, list[float]], options: ResolvedOptions) -> dict[str, Any]:
        total = math.fsum(math.fsum(scores) for scores in job.results)
        tokens = sum(len(row.scored) for row in job.rows)
        whole = job.rows[0].ids[0] in self.tokenizer.all_special_ids
        answer: dict[str, Any] = {
            "log_likelihood": total,
            "tokens": tokens,
            "perplexity": math.exp(-total / tokens) if tokens else math.nan,
            "bits_per_byte": -total / math.log(2) / len(job.item.encode()) if whole and tokens else math.nan,
        }
        if options.token_scores:
            pairs = (
                pair
                for row, scores in zip(job.rows, job.results, strict=True)
                for pair in zip(row.spans, scores, strict=True)
            )
            answer["token_scores"] = [{"start": start, "end": end, "score": score} for (start, end), score in pairs]
        return answer
