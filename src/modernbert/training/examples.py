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

from modernbert.checks import short
from modernbert.training.contract import Step
from modernbert.training.tasks.options import FinetuneOptions


@dataclasses.dataclass(frozen=True)
class Example:
    """What a task trains on.

    Attributes:
        rows: ids of its texts, one or several, such as choices; lists or arrays.
        label: in the task's form.
        record: its source, for evaluation and reports.
    """

    rows: Sequence[Any]
    label: Any = None
    record: Any = None

    @property
    def tokens(self) -> int:
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
        batch_tokens: tokens a step, instead of examples.
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
        """How many steps so many epochs have."""
        whole, rest = int(epochs), epochs - int(epochs)
        if self.batch_tokens is None:
            return round(epochs * -(-len(self.lengths) // self.batch_size))
        return sum(len(self.epoch(i)) for i in range(whole)) + (round(rest * len(self.epoch(whole))) if rest else 0)


class ExampleFeed:
    """Examples in memory, shuffled anew in every epoch; see `modernbert.training.contract.Feed`.

    Args:
        examples: what to train on.
        options: examples or tokens a step, tokens of a pass, how long, and the seed of the order.
    """

    def __init__(self, examples: Sequence[Example], options: FinetuneOptions) -> None:
        lengths = np.array([example.tokens for example in examples], dtype=np.int64)
        self.examples, self.micro_tokens = examples, options.micro_tokens
        self.plan = StepPlan(lengths, options.batch_size, options.batch_tokens, options.seed)
        self.total = options.max_steps or max(1, self.plan.steps(options.epochs))
        self.between = len(self.plan.epoch(0))
        self.fingerprint = hashlib.sha256(lengths.tobytes()).hexdigest()

    def steps(self, first: int, place: Mapping[str, Any] | None) -> Iterator[Step]:
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
    """The source of an example, in a few words."""
    if isinstance(record, dict):
        record = next((v for v in record.values() if isinstance(v, str) and v), record)
    return short(" ".join(str(record).split()))
