"""What callers hand over to generation: their own processors of scores, criteria to stop, and rules of what is allowed.

Callables that take ids (B, S) and scores (B, V), as transformers' own objects do, are served; the classes here are the
names that scripts derive from.

Shapes: B texts, S columns with the padding that was given, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from modernbert.decoding.options import GenerationOptions
from modernbert.decoding.samplers import History, Sampler, compose
from modernbert.errors import InputError, shown
from modernbert.nn.packing import PackedInputs


class LogitsProcessor:
    """Base of processors of scores: called with ids (B, S) and scores (B, V), it returns scores."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


class LogitsProcessorList(list[Any]):
    """Processors that are applied one after another."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for processor in self:
            scores = processor(input_ids, scores, **kwargs)
        return scores


class StoppingCriteria:
    """Base of criteria: called with ids (B, S) and the scores so far, one says which texts end, as booleans (B,)."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


class StoppingCriteriaList(list[Any]):
    """Criteria of which one is enough."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self:
            ended |= torch.as_tensor(criterion(input_ids, scores, **kwargs), dtype=torch.bool, device=ended.device)
        return ended


@dataclasses.dataclass(frozen=True)
class Handed:
    """What a caller handed over to one call of `generate`.

    Attributes:
        processors: of scores.
        criteria: that end texts.
        allowed: which ids may follow a text, by the number of its prompt and its ids (S,).
        without: what stands before each continuation instead of its prompt, for `guidance_scale`.
        given: the prompts as they were given, padding included, one row each.
        pad: the id that fills up finished texts.
    """

    processors: LogitsProcessorList = dataclasses.field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = dataclasses.field(default_factory=StoppingCriteriaList)
    allowed: Callable[[int, Tensor], Any] | None = None
    without: Sequence[Sequence[int]] = ()
    given: Sequence[Sequence[int]] = ()
    pad: int = 0

    def rows(self, histories: Sequence[History], device: Any) -> Tensor:
        """Ids (B, S) of texts so far, new ones one below another; finished ones are filled up."""
        columns = max(len(history.given) for history in histories)
        rows = [[*[self.pad] * (columns - len(h.given)), *h.given, *h.new] for h in histories]
        width = max(map(len, rows))
        return torch.tensor([[*row, *[self.pad] * (width - len(row))] for row in rows], device=device).long()


def handed_over(
    logits_processor: Any = None, stopping_criteria: Any = None, allowed: Any = None, **rest: Any
) -> Handed:
    """What a caller handed over, each callable alone or in a list; raises `InputError` where one is none."""
    processors = LogitsProcessorList(callables("logits_processor", logits_processor))
    criteria = StoppingCriteriaList(callables("stopping_criteria", stopping_criteria))
    if allowed is not None and not callable(allowed):
        raise InputError(f"prefix_allowed_tokens_fn is {shown(allowed)}; give a function of a number and ids")
    return Handed(processors, criteria, allowed, **rest)


def callables(name: str, given: Any) -> list[Any]:
    """A list of a caller's callables, of one or of several; raises `InputError` where one is none."""
    several = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    if not all(callable(each) for each in several):
        raise InputError(f"{name} is {shown(given)}; give a list of callables that take ids and scores")
    return several


class Rules:
    """All that changes scores and ends texts in one generation: the options, and what was handed over.

    Args:
        options: of generation.
        handed: by the caller.
        model: scores the continuations without their prompts, for `guidance_scale`.
    """

    def __init__(self, options: GenerationOptions, handed: Handed, model: Any) -> None:
        self.options, self.handed, self.model = options, handed, model
        self.texts: list[History] = []  # all of them where finished ones leave the batch
        guides: list[Sampler] = [self._guide] if options.guidance_scale not in (None, 1.0) else []
        allows: list[Sampler] = [self._allow] if handed.allowed else []
        self.samplers = compose(options, guides, allows, [self._process] if handed.processors else [])
        self.deadline = None if options.max_time is None else time.monotonic() + options.max_time

    def scores(self, scores_BV: Tensor, histories: Sequence[History]) -> Tensor:
        for sampler in self.samplers:
            scores_BV = sampler(scores_BV, histories)
        return scores_BV

    @property
    def late(self) -> bool:
        """Whether `max_time` has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def ended(self, histories: Sequence[History], scores: Any) -> list[bool]:
        """Which texts the caller's criteria end."""
        whole = self.texts or histories
        if not self.handed.criteria:
            return [False] * len(histories)
        ended = self.handed.criteria(self.handed.rows(whole, self.model.device), scores).tolist()
        return [ended[history.number] for history in histories] if self.texts else ended

    def _process(self, scores_BV: Tensor, histories: Sequence[History]) -> Tensor:
        """The caller's processors, which see finished texts as well."""
        whole = self.texts or histories
        at = torch.tensor([history.number for history in histories] if self.texts else range(len(histories)))
        at = at.to(scores_BV.device)
        all_BV = scores_BV.new_zeros((len(whole), scores_BV.shape[1])).index_copy(0, at, scores_BV)
        found = self.handed.processors(self.handed.rows(whole, scores_BV.device), all_BV)
        if not isinstance(found, Tensor) or found.shape != all_BV.shape:
            raise InputError(f"a logits_processor returned {shown(found)}; it must return scores {tuple(all_BV.shape)}")
        return found.index_select(0, at).float()

    def _allow(self, scores_BV: Tensor, histories: Sequence[History]) -> Tensor:
        """The caller's allowed ids alone."""
        assert self.handed.allowed is not None
        mask = torch.full_like(scores_BV, float("-inf"))
        for mask_V, history in zip(mask, histories, strict=True):
            ids = self.handed.allowed(history.number, self.handed.rows([history], scores_BV.device)[0])
            allowed = torch.as_tensor(ids, dtype=torch.int64, device=mask.device)
            if not allowed.numel() or bool(((allowed < 0) | (allowed >= len(mask_V))).any()):
                raise InputError(
                    f"prefix_allowed_tokens_fn returned {shown(ids)} for prompt {history.number}; it must return ids "
                    f"of 0 to {len(mask_V) - 1}, one at least"
                )
            mask_V[allowed] = 0.0
        return scores_BV + mask

    def _guide(self, scores_BV: Tensor, histories: Sequence[History]) -> Tensor:
        """Away from what would follow without the prompt. Each text is read anew for that.

        Source: arXiv:2306.17806.
        """
        copies = max(1, len(self.texts) // len(self.handed.without))
        rows = [[*self.handed.without[history.number // copies], *history.new] for history in histories]
        without_BV = self.model.score_next(PackedInputs.of_rows(rows, self.model.device), None).log_softmax(-1)
        scale = self.options.guidance_scale
        assert scale is not None
        return scale * (scores_BV.log_softmax(-1) - without_BV) + without_BV
