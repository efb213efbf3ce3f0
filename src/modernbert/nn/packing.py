"""Packing: B texts lie end to end in one row of T real tokens, and a `Packing` says where each begins.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from modernbert.errors import InputError


def on_device(values: Sequence[int], device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """Whole numbers of the host as a tensor on a device; nobody waits for a card to take them."""
    return send(torch.tensor(values, dtype=dtype), device)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device; nobody waits for a card to take it."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Where the texts of a packed batch begin, and where their tokens stood in the padded grid, if any.

    Attributes:
        lengths: real tokens of each text; a text of padding alone has length 0.
        positions_T: (T,) int64, the place of each token in its text, the first real one at 0. Padding between
            two real tokens leaves a gap in the positions, so that distances stay what they were.
        text_T: (T,) int64, the number of the text that each token belongs to.
        indices_T: (T,) int64, the place of each token in the flattened grid of B x S, or None where the batch
            came packed and nothing says how to pad it.
        grid: (B, S) of the padded grid, or None likewise.
        gaps: whether any text has padding between two real tokens.
    """

    lengths: tuple[int, ...]
    positions_T: Tensor
    text_T: Tensor
    indices_T: Tensor | None = None
    grid: tuple[int, int] | None = None
    gaps: bool = False

    @property
    def tokens(self) -> int:
        """T, the number of real tokens."""
        return self.positions_T.shape[0]

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each text begins in the packed row; one more entry than texts, the last one T."""
        return (0, *itertools.accumulate(self.lengths))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """For each text its first row and the row after its last one."""
        return list(itertools.pairwise(self.starts))

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        """`starts` as an int32 tensor of shape (B + 1,), the form that attention kernels take."""
        return on_device(self.starts, self.positions_T.device, torch.int32)

    @classmethod
    def from_mask(cls, mask_BS: Tensor) -> Packing:
        """Pack the grid positions where `mask_BS` (boolean) is true."""
        batch, columns = mask_BS.shape
        indices_T = mask_BS.flatten().nonzero().squeeze(1)
        lengths = tuple(mask_BS.sum(1).tolist())
        text_T = torch.div(indices_T, columns, rounding_mode="floor") if columns else indices_T
        column_T = indices_T - text_T * columns
        first_B = mask_BS.int().argmax(1) if columns else torch.zeros(batch, dtype=torch.int64, device=mask_BS.device)
        positions_T = column_T - first_B[text_T]
        # Without gaps a text's positions are 0, 1, 2, ...
        gaps = not torch.equal(positions_T, cls.from_lengths(lengths, mask_BS.device).positions_T)
        return cls(lengths, positions_T, text_T, indices_T, (batch, columns), gaps)

    @classmethod
    def from_lengths(
        cls,
        lengths: tuple[int, ...] | list[int],
        device: torch.device | str = "cpu",
        indices_T: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Packing:
        """Pack texts of these lengths that lie end to end already."""
        lengths_B = torch.tensor(lengths, dtype=torch.int64)
        text_T = torch.arange(len(lengths)).repeat_interleave(lengths_B)
        positions_T = torch.arange(len(text_T)) - (lengths_B.cumsum(0) - lengths_B)[text_T]
        return cls(tuple(lengths), positions_T.to(device), text_T.to(device), indices_T, grid)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor,
        tokens: int,
        device: torch.device,
        indices_T: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Packing:
        """Pack by cumulative lengths; they must rise from 0 to `tokens`."""
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
            raise InputError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; it must be whole "
                "numbers of shape (batch + 1,)"
            )
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != tokens or any(a > b for a, b in itertools.pairwise(starts)):
            raise InputError(
                f"cu_seqlens is {starts if len(starts) < 12 else [*starts[:5], '...', *starts[-5:]]}; it must begin "
                f"at 0, never fall, and end at the number of tokens given, {tokens}"
            )
        lengths = tuple(b - a for a, b in itertools.pairwise(starts))
        return cls.from_lengths(lengths, device, indices_T, grid)

    def unpad(self, grid_BS: Tensor) -> Tensor:
        """Take the real tokens out of a padded grid: (B, S, ...) to (T, ...)."""
        assert self.indices_T is not None
        return grid_BS.flatten(0, 1).index_select(0, self.indices_T)

    def repad(self, packed_T: Tensor, fill: float = 0.0) -> Tensor:
        """Put packed rows back into the padded grid, `fill` elsewhere: (T, ...) to (B, S, ...)."""
        assert self.indices_T is not None
        assert self.grid is not None
        batch, columns = self.grid
        if self.tokens == batch * columns:  # nothing was padding: the rows are the grid
            return packed_T.unflatten(0, self.grid)
        out = packed_T.new_full((batch * columns, *packed_T.shape[1:]), fill)
        return out.index_copy(0, self.indices_T, packed_T).unflatten(0, self.grid)
