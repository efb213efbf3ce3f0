"""Packing: B texts lie end to end, T real tokens in all, and a `Packing` says where each text begins.

`PackedInputs` are those tokens, which all layers take, with the way back to the shape that the caller uses.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modernbert.errors import InputError


def on_device(values: Sequence[int], device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """Whole numbers of the host as a tensor on a device, copied asynchronously to a GPU."""
    return send(torch.tensor(values, dtype=dtype), device)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, copied asynchronously to a GPU."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Where the texts of a packed batch begin, and where their tokens stood in the padded grid, if any.

    Attributes:
        lengths: real tokens of each text; a text of padding alone has length 0.
        positions_T: (T,) int64, the position of each token in its text, the first real one at 0. Padding between two
            real tokens leaves a gap in the positions, so that distances stay what they were.
        text_T: (T,) int64, the number of the text that each token belongs to.
        indices_T: (T,) int64, the place of each token in the flattened grid; None for a batch that came packed and
            that nothing says how to pad.
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

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """The first token of each text; one more entry than texts, the last one T."""
        return (0, *itertools.accumulate(self.lengths))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """For each text its first token and the token after its last one."""
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
        text_T = torch.div(indices_T, columns, rounding_mode="floor") if columns else indices_T
        first_B = mask_BS.int().argmax(1) if columns else torch.zeros(batch, dtype=torch.int64, device=mask_BS.device)
        positions_T = indices_T - (text_T * columns + first_B[text_T])
        gaps = bool(((positions_T.diff() != 1) & (text_T.diff() == 0)).any())
        return cls(tuple(mask_BS.sum(1).tolist()), positions_T, text_T, indices_T, (batch, columns), gaps)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        indices_T: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Packing:
        """Pack texts of these lengths that lie end to end already."""
        if len(lengths) == 1:  # as most queries are
            positions_T = torch.arange(lengths[0], device=device)
            return cls((lengths[0],), positions_T, torch.zeros_like(positions_T), indices_T, grid)
        lengths_B = torch.tensor(lengths, dtype=torch.int64)
        text_T = torch.arange(len(lengths)).repeat_interleave(lengths_B)
        positions_T = torch.arange(len(text_T)) - (lengths_B.cumsum(0) - lengths_B)[text_T]
        return cls(tuple(lengths), positions_T.to(device), text_T.to(device), indices_T, grid)

    def unpad(self, grid_BS: Tensor) -> Tensor:
        """Take the real tokens out of a padded grid: (B, S, ...) to (T, ...)."""
        assert self.indices_T is not None
        return grid_BS.flatten(0, 1).index_select(0, self.indices_T)

    def repad(self, packed_T: Tensor, fill: float = 0.0) -> Tensor:
        """Put packed tokens back into the padded grid, `fill` elsewhere: (T, ...) to (B, S, ...)."""
        assert self.indices_T is not None
        assert self.grid is not None
        batch, columns = self.grid
        if len(packed_T) == batch * columns:  # nothing was padding
            return packed_T.unflatten(0, self.grid)
        out = packed_T.new_full((batch * columns, *packed_T.shape[1:]), fill)
        return out.index_copy(0, self.indices_T, packed_T).unflatten(0, self.grid)


@dataclasses.dataclass(frozen=True)
class PackedInputs:
    """Packed tokens, and the way back to the shape that the caller uses.

    Attributes:
        ids_T: (T,) token ids, or None if `embeds_TM` is given instead.
        embeds_TM: (T, M) vectors instead of token embeddings.
        packing: where the texts lie.
        rope_positions_T: (T,) positions for the rotary embedding, which a caller may choose; how far tokens see each
            other follows from the packing's own.
        outer_shape: leading shape of the caller's input: (B, S), (T,) or (1, T).
        came_packed: whether the caller packed it. Outputs then stay packed, unless a padded grid was described.
        states_TM: (T, M) last hidden states, where another pass over the same texts has given them; a backbone gives
            these instead of computing them again.
    """

    ids_T: Tensor | None
    embeds_TM: Tensor | None
    packing: Packing
    rope_positions_T: Tensor
    outer_shape: tuple[int, ...]
    came_packed: bool
    states_TM: Tensor | None = None

    @classmethod
    def of_rows(
        cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", offsets: Sequence[int] = ()
    ) -> PackedInputs:
        """Pack texts that are lists of ids and need no check; `offsets` are the positions of their first tokens."""
        packing = Packing.from_lengths([len(row) for row in rows])
        ids_T = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int64)
        positions_T = packing.positions_T
        if offsets:
            positions_T = positions_T + torch.tensor(offsets)[packing.text_T]
        packed = cls(ids_T, None, packing, positions_T, (packing.tokens,), came_packed=True)
        return packed.to(torch.device(device))

    def restore(self, packed_T: Tensor, fill: float = 0.0) -> Tensor:
        """(T, ...) to the caller's leading shape; padding comes back as `fill`."""
        if self.packing.grid is None:
            return packed_T.unflatten(0, self.outer_shape)
        return self.packing.repad(packed_T, fill)

    def take(self, padded: Tensor) -> Tensor:
        """Undo `restore`: the real tokens of a tensor in the caller's leading shape, (T, ...)."""
        if self.packing.grid is not None:
            return self.packing.unpad(padded)
        return padded.flatten(0, len(self.outer_shape) - 1)

    def pack(self, name: str, values: Tensor) -> Tensor:
        """Pack one value a token, such as labels, given in the shape of the input or of its padded grid."""
        values, shape, grid = values.to(self.packing.positions_T.device), tuple(values.shape), self.packing.grid
        if self.came_packed and shape == self.outer_shape:
            return values.flatten()
        if shape == grid:
            return self.packing.unpad(values)
        raise wrong_shape(name, values, *dict.fromkeys(s for s in (self.outer_shape, grid) if s is not None))

    def to(self, device: torch.device) -> PackedInputs:
        """The same on a device; from the host to a GPU by one asynchronous copy from pinned memory."""
        here = self.packing.positions_T.device
        if device.type == "meta" or here == device:
            return self

        def copy_all(parts: list[Tensor]) -> Tensor:
            if here.type != "cpu":
                return torch.cat([part.to(device) for part in parts])
            pinned = device.type == "cuda"
            block = torch.empty(sum(map(len, parts)), dtype=torch.int64, pin_memory=pinned)
            return torch.cat(parts, out=block).to(device, non_blocking=pinned)

        return self.copied(copy_all, device)

    def copied(self, copy_all: Callable[[list[Tensor]], Tensor], device: torch.device) -> PackedInputs:
        """The same where `copy_all` puts a list of int64 tensors, end to end."""
        packing = self.packing
        own = None if self.rope_positions_T is packing.positions_T else self.rope_positions_T
        named = {
            "positions": packing.positions_T, "text": packing.text_T, "starts": torch.tensor(packing.starts),
            "ids": self.ids_T, "indices": packing.indices_T, "own": own,
        }  # fmt: skip
        parts = {name: x.long() for name, x in named.items() if x is not None}
        there = dict(zip(parts, copy_all(list(parts.values())).split([len(x) for x in parts.values()]), strict=True))
        packing = dataclasses.replace(
            packing, positions_T=there["positions"], text_T=there["text"], indices_T=there.get("indices")
        )
        packing.__dict__["cu_seqlens"] = there["starts"].int()  # where the property keeps what it has made
        embeds_TM = None if self.embeds_TM is None else self.embeds_TM.to(device)
        positions_T = there.get("own", packing.positions_T)
        return PackedInputs(there.get("ids"), embeds_TM, packing, positions_T, self.outer_shape, self.came_packed)


def wrong_shape(name: str, values: Tensor, *allowed: tuple[int, ...]) -> InputError:
    """What to raise for a tensor that has none of the allowed shapes."""
    return InputError(
        f"{name} has shape {tuple(values.shape)}; with this input it must be {' or '.join(map(str, allowed))}"
    )
