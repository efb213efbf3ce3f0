"""text-scoring: how likely a decoder finds texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from modernbert.auto import AutoModelForCausalLM
from modernbert.errors import InputError
from modernbert.models.decoder import ModernBertDecoderForCausalLM
from modernbert.pipelines.base import Job, Pipeline, Row
from modernbert.pipelines.checks import check_count, check_switch, check_text, short
from modernbert.text.encoding import UNLIMITED

_ROWS_TOGETHER = 512  # whose scores over the whole vocabulary are alive at once


class TextScoringPipeline(Pipeline):
    """Scores texts by a causal language model.

    A call takes a text, a list of texts or an iterable of them, and the options `max_length` (tokens of a window; the
    model's context) and `stride` (new tokens of each window after the first; half a window). A text longer than a
    window is read in several, each of which scores what the one before did not; the larger the overlap, the more the
    scores are what the whole text would give.

    For each text it gives {"log_likelihood" (natural logarithm), "tokens" (scored ones: all but special tokens and a
    first one that nothing stands before), "perplexity" (a token), "bits_per_byte" (of UTF-8, NaN where the first
    token is not scored)}.
    """

    task = "text-scoring"
    auto_model = AutoModelForCausalLM
    architecture = "decoder"
    needs = "a causal language model, which is a decoder"
    options = ("max_length", "stride", "add_special_tokens")

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        if not isinstance(model, ModernBertDecoderForCausalLM):
            raise InputError(f"text-scoring needs a causal language model; this is a {type(model).__name__}")
        super().__init__(model, tokenizer, **options)

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Defaults, and a stride that fits the window."""
        given = {name: value for name, value in settings.items() if value is not None}
        window = min(check_count("max_length", given.get("max_length", self.context), 2), self.context)
        stride = check_count("stride", given.get("stride", max(1, window // 2)))
        if stride >= window:
            raise InputError(f"stride is {stride}; a window of {window} tokens leaves room for 1 to {window - 1}")
        return {
            "window": window,
            "stride": stride,
            "special": check_switch("add_special_tokens", given.get("add_special_tokens"), True),
        }

    def prepare(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        """A row a window, and the tokens that it scores."""
        window, stride = settings["window"], settings["stride"]
        special = set(self.tokenizer.all_special_ids)
        jobs = []
        for text, ids in zip(items, self.encode_all(items, settings["special"]), strict=True):
            rows: list[Row] = []
            done = 1  # the first token has nothing before it
            while not rows or done < len(ids):
                end = min(done + stride if rows else window, len(ids))
                start = max(0, end - window)
                rows.append(Row(ids[start:end], [i - start for i in range(done, end) if ids[i] not in special]))
                done = end
            whole = ids[0] in special
            jobs.append(Job(rows, (len(text.encode()), whole)))
        return jobs

    def encode_all(self, texts: list[Any], special: bool) -> list[list[int]]:
        """Ids of texts of any length."""
        for text in texts:
            check_text(text)
        encodings = self.tokenizer(texts, add_special_tokens=special, truncation=True, max_length=UNLIMITED).encodings
        assert encodings is not None
        for text, encoding in zip(texts, encodings, strict=True):
            if not encoding.ids:
                raise InputError(f"a text makes no token with this tokenizer: {short(text)!r}")
        return [list(encoding.ids) for encoding in encodings]

    def run(self, rows: list[Row], settings: dict[str, Any]) -> Sequence[Any]:
        """Sum of the log-probabilities, and how many, of each row."""
        inputs = self.pack(rows)
        hidden = self.model.model.encode(inputs).last_TM
        ids_T = torch.tensor([i for row in rows for i in row.ids])
        starts = inputs.packing.starts
        wanted = torch.tensor([start + i for start, row in zip(starts, rows, strict=False) for i in row.extra])
        found: list[float] = []
        for some in wanted.to(torch.int64).split(_ROWS_TOGETHER):
            scores = self.model.score(hidden[(some - 1).to(hidden.device)]).float().log_softmax(-1)
            found += scores.gather(1, ids_T[some, None].to(hidden.device)).squeeze(1).double().tolist()
        rest = iter(found)
        return [math.fsum(next(rest) for _ in row.extra) for row in rows]

    def finish(self, job: Job, settings: dict[str, Any]) -> Any:
        """The text's figures."""
        total = math.fsum(job.results)
        tokens = sum(len(row.extra) for row in job.rows)
        size, whole = job.context
        return {
            "log_likelihood": total,
            "tokens": tokens,
            "perplexity": math.exp(-total / tokens) if tokens else math.nan,
            "bits_per_byte": -total / math.log(2) / size if whole and tokens else math.nan,
        }
