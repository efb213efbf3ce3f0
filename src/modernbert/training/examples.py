"""Examples of a task, put together into steps and packed batches.

Shapes: B rows of a batch, T tokens of all of them together.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modernbert.training.contract import Step


@dataclasses.dataclass(frozen=True)
class Example:
    """One thing to learn from.

    Attributes:
        rows: ids of what the model reads of it: one text, or several, such as choices; lists or arrays.
        label: what it should say; its form is the task's.
        record: what it came from, for evaluation and reports.
    """

    rows: Sequence[Any]
    label: Any = None
    record: Any = None

    @property
    def tokens(self) -> int:
        """Tokens of all its rows."""
        return sum(len(row) for row in self.rows)


def pack_rows(rows: Sequence[Any]) -> dict[str, Tensor]:
    """Rows of ids end to end: `input_ids` (T,) and `cu_seqlens` (B + 1,) int32, as every model takes them."""
    starts = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if rows else np.zeros(0, np.int64)
    return {"input_ids": torch.from_numpy(ids), "cu_seqlens": torch.from_numpy(starts)}


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on a device; where its texts begin stays on the CPU."""
    return {k: v.to(device) if isinstance(v, Tensor) and k != "cu_seqlens" else v for k, v in batch.items()}


def by_tokens(lengths: Sequence[int] | npt.NDArray[np.int64], budget: int) -> list[list[int]]:
    """Consecutive groups of at most `budget` tokens; one that is longer is a group by itself."""
    groups: list[list[int]] = []
    filled = budget
    for i, length in enumerate(lengths):
        if not groups or filled + length > budget:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += int(length)
    return groups


def shared_out(passes: list[list[Any]], processes: int) -> list[list[Any]]:
    """Passes, some of them halved until every process has as many: none may sit out a step."""
    shares = [list(some) for some in passes]
    while len(shares) % processes:
        largest = max(range(len(shares)), key=lambda g: len(shares[g]))
        half = len(shares[largest]) // 2
        if not half:
            break
        shares[largest : largest + 1] = [shares[largest][:half], shares[largest][half:]]
    return shares


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Which examples each step of a run sees: shuffled anew in every epoch, by the seed and the epoch alone.

    Args:
        lengths: tokens of each example.
        batch_size: examples a step.
        batch_tokens: tokens a step, in its place.
        seed: of the order.
    """

    lengths: npt.NDArray[np.int64]
    batch_size: int
    batch_tokens: int | None
    seed: int

    def epoch(self, number: int) -> list[list[int]]:
        """The steps of an epoch, every example in exactly one of them."""
        order = np.random.default_rng((self.seed, number)).permutation(len(self.lengths))
        if self.batch_tokens is not None:
            return [[int(order[i]) for i in group] for group in by_tokens(self.lengths[order], self.batch_tokens)]
        size = self.batch_size
        return [order[i : i + size].tolist() for i in range(0, len(order), size)]

    def steps(self, epochs: float) -> int:
        """Steps of so many epochs."""
        whole, rest = int(epochs), epochs - int(epochs)
        if self.batch_tokens is None:
            return round(epochs * -(-len(self.lengths) // self.batch_size))
        return sum(len(self.epoch(i)) for i in range(whole)) + (round(rest * len(self.epoch(whole))) if rest else 0)


class ExampleFeed:
    """Examples in memory, shuffled anew in every epoch; see `modernbert.training.contract.Feed`.

    Args:
        examples: what to train on.
        batch_size, batch_tokens: examples, or tokens, a step.
        micro_tokens: tokens of a forward pass.
        epochs, max_steps: how long; `max_steps` counts where it is given.
        seed: of the order.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        batch_tokens: int | None,
        micro_tokens: int,
        epochs: float,
        max_steps: int | None,
        seed: int,
    ) -> None:
        lengths = np.array([example.tokens for example in examples], dtype=np.int64)
        self.examples, self.micro_tokens = examples, micro_tokens
        self.plan = StepPlan(lengths, batch_size, batch_tokens, seed)
        self.total = max_steps or max(1, self.plan.steps(epochs))
        self.between = len(self.plan.epoch(0))
        self.fingerprint = hashlib.sha256(lengths.tobytes()).hexdigest()

    def steps(self, first: int, place: Mapping[str, Any] | None) -> Iterator[Step]:
        """Steps from a number on."""
        number, epoch = 0, 0
        while True:
            groups = self.plan.epoch(epoch)
            for i, group in enumerate(groups, 1):
                if number >= first:
                    chosen = [self.examples[j] for j in group]
                    passes = by_tokens([example.tokens for example in chosen], self.micro_tokens)
                    yield Step([[chosen[j] for j in some] for some in passes], epoch + i / len(groups), {})
                number += 1
            epoch += 1


def shortened(record: Any) -> str:
    """What an example came from, in a few words."""
    value = record
    if isinstance(record, dict):
        texts = [v for v in record.values() if isinstance(v, str) and v]
        value = texts[0] if texts else record
    said = " ".join(str(value).split())
    return said if len(said) <= 60 else said[:57] + "..."
