"""The door: what callers hand to a model, checked and turned into one packed row.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modernbert.errors import InputError
from modernbert.nn.packing import Packing


@dataclasses.dataclass(frozen=True)
class PackedInputs:
    """One packed row, and the way back to the shape that the caller uses.

    Attributes:
        ids_T: (T,) token ids, or None where `embeds_TM` stands in their place.
        embeds_TM: (T, M) vectors in the place of token embeddings.
        packing: where the texts lie.
        positions_T: (T,) positions for the rotary embedding.
        given: leading shape of the caller's input: (B, S), (T,) or (1, T).
        came_packed: whether the caller packed it. Outputs then stay packed, unless the caller said where the
            tokens stand in a padded grid.
    """

    ids_T: Tensor | None
    embeds_TM: Tensor | None
    packing: Packing
    positions_T: Tensor
    given: tuple[int, ...]
    came_packed: bool

    @classmethod
    def of_rows(
        cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", offsets: Sequence[int] = ()
    ) -> PackedInputs:
        """Pack texts that are lists of ids, for callers who have them and need no check.

        Args:
            rows: ids of each text.
            device: where the tensors go.
            offsets: the position of each text's first token; none begins every text at 0.
        """
        packing = Packing.from_lengths([len(row) for row in rows])
        ids_T = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int64)
        positions_T = packing.positions_T
        if offsets:
            positions_T = positions_T + torch.tensor(offsets)[packing.text_T]
        packed = cls(ids_T, None, packing, positions_T, (packing.tokens,), came_packed=True)
        return packed.to(torch.device(device))

    def restore(self, packed_T: Tensor, fill: float = 0.0) -> Tensor:
        """(T, ...) to the caller's leading shape; padding comes back as `fill`."""
        return packed_T.unflatten(0, self.given) if self.packing.grid is None else self.packing.repad(packed_T, fill)

    def take(self, given: Tensor) -> Tensor:
        """Undo `restore`: the real tokens of a tensor in the caller's leading shape, (T, ...)."""
        return given.flatten(0, len(self.given) - 1) if self.packing.grid is None else self.packing.unpad(given)

    def to(self, device: torch.device) -> PackedInputs:
        """The same on a card, by one copy from pinned memory that nobody waits for; elsewhere these themselves."""
        if device.type in ("cpu", "meta") or self.packing.positions_T.device == device:
            return self

        def send(rows: list[Tensor]) -> Tensor:
            pinned = device.type == "cuda"
            block = torch.empty(sum(map(len, rows)), dtype=torch.int64, pin_memory=pinned)
            return torch.cat(rows, out=block).to(device, non_blocking=pinned)

        return self.sent(send, device)

    def sent(self, send: Callable[[list[Tensor]], Tensor], device: torch.device) -> PackedInputs:
        """The same where `send` puts a list of int64 tensors, end to end."""
        packing = self.packing
        own = None if self.positions_T is packing.positions_T else self.positions_T
        named = {
            "positions": packing.positions_T, "text": packing.text_T, "starts": torch.tensor(packing.starts),
            "ids": self.ids_T, "indices": packing.indices_T, "own": own,
        }  # fmt: skip
        rows = {name: x.long() for name, x in named.items() if x is not None}
        there = dict(zip(rows, send(list(rows.values())).split([len(x) for x in rows.values()]), strict=True))
        packing = dataclasses.replace(
            packing, positions_T=there["positions"], text_T=there["text"], indices_T=there.get("indices")
        )
        packing.__dict__["cu_seqlens"] = there["starts"].int()  # where the property keeps what it has made
        embeds_TM = None if self.embeds_TM is None else self.embeds_TM.to(device)
        positions_T = there.get("own", packing.positions_T)
        return PackedInputs(there.get("ids"), embeds_TM, packing, positions_T, self.given, self.came_packed)

    def pack(self, name: str, values: Tensor) -> Tensor:
        """Pack one value a token, such as labels, given in the shape of the input or of its padded grid."""
        check_tensors(**{name: values})
        values = values.to(self.packing.positions_T.device)
        shape, grid = tuple(values.shape), self.packing.grid
        if self.came_packed and shape == self.given:
            return values.flatten()
        if shape == grid:
            return self.packing.unpad(values)
        allowed = dict.fromkeys(str(s) for s in (self.given, grid) if s is not None)
        raise InputError(f"{name} has shape {shape}; with this input it must be {' or '.join(allowed)}")


def pack_inputs(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    *,
    vocab_size: int,
    hidden_size: int,
    attention_mask: Tensor | None = None,
    sliding_window_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    gaps_separate: bool = False,
) -> PackedInputs:
    """Check a model's input and pack it; the arguments are those of `ModernBertModel.forward`.

    Input without a mask whose `position_ids` begin anew within a row is packed already: each new beginning is another
    text, as with `cu_seqlens`.

    Args:
        gaps_separate: whether positions that leave some out begin another text as well.

    Raises:
        InputError: arguments contradict each other or have the wrong shape; the message says what was given and
            what is allowed.
    """
    check_tensors(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        sliding_window_mask=sliding_window_mask,
        position_ids=position_ids,
        indices=indices,
        cu_seqlens=cu_seqlens,
    )
    if (input_ids is None) == (inputs_embeds is None):
        both = "both" if input_ids is not None else "neither"
        raise InputError(f"{both} of input_ids and inputs_embeds were given; give exactly one")
    if input_ids is not None:
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise InputError(f"input_ids has dtype {input_ids.dtype}; it must be whole numbers")
        if input_ids.dtype not in (torch.int32, torch.int64):
            input_ids = input_ids.long()
        given = tuple(input_ids.shape)
        what, device = "input_ids", input_ids.device
    else:
        assert inputs_embeds is not None
        if not inputs_embeds.is_floating_point():
            raise InputError(f"inputs_embeds has dtype {inputs_embeds.dtype}; it must be floating numbers")
        if inputs_embeds.dim() < 2 or inputs_embeds.shape[-1] != hidden_size:
            raise InputError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; its last dimension must be {hidden_size}"
            )
        given = tuple(inputs_embeds.shape[:-1])
        what, device = "inputs_embeds", inputs_embeds.device

    packed = cu_seqlens is not None
    if not packed:
        if len(given) != 2:
            raise InputError(
                f"{what} has leading shape {given}; it must be (batch, sequence), or (tokens,) together with cu_seqlens"
            )
        _check_grid(given, indices, max_seqlen, batch_size, seq_len)
        lengths = None
        if position_ids is not None:
            position_ids = _check_positions(position_ids, given)
            lengths = _lengths_by(position_ids, gaps_separate) if attention_mask is None else None
        packed = lengths is not None
        packing = (
            Packing.from_mask(_mask(attention_mask, given, device))
            if lengths is None
            else Packing.from_lengths(lengths, device)
        )
    else:
        assert cu_seqlens is not None
        if len(given) not in (1, 2) or (len(given) == 2 and given[0] != 1):
            raise InputError(f"{what} has leading shape {given}; with cu_seqlens it must be (tokens,) or (1, tokens)")
        packing = _from_packed(given[-1], device, indices, cu_seqlens, max_seqlen, batch_size, seq_len)
        if attention_mask is not None:
            _check_packed_mask(attention_mask, packing)
    if sliding_window_mask is not None:
        _check_window_mask(sliding_window_mask, packing.grid or given)

    here = PackedInputs(None, None, packing, packing.positions_T, given, packed)

    def take(tensor: Tensor) -> Tensor:
        return tensor.reshape(packing.tokens, *tensor.shape[len(given) :]) if packed else packing.unpad(tensor)

    ids_T = take(input_ids) if input_ids is not None else None
    embeds_TM = take(inputs_embeds) if inputs_embeds is not None else None
    if ids_T is not None and ids_T.numel():
        low, high = (int(x) for x in ids_T.aminmax())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise InputError(f"input_ids holds {bad}; the vocabulary has ids 0 to {vocab_size - 1}")
    positions_T = packing.positions_T if position_ids is None else here.pack("position_ids", position_ids.to(device))
    return dataclasses.replace(here, ids_T=ids_T, embeds_TM=embeds_TM, positions_T=positions_T)


def _mask(attention_mask: Tensor | None, given: tuple[int, ...], device: torch.device) -> Tensor:
    if attention_mask is None:
        return torch.ones(given, dtype=torch.bool, device=device)
    if tuple(attention_mask.shape) != given:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}; with this input it must be {given}")
    return attention_mask.to(device) != 0


def check_tensors(**given: Any) -> None:
    """Refuse what is no tensor; raises `InputError` with what to give instead."""
    for name, value in given.items():
        if isinstance(value, Tensor) or value is None:
            continue
        if isinstance(value, Mapping):
            raise InputError(
                f"{name} is a {type(value).__name__}; give what it holds by name: model(**encoding), made with "
                "return_tensors='pt'"
            )
        raise InputError(
            f"{name} is a {type(value).__name__}; it must be a tensor: a tokenizer makes tensors with "
            "return_tensors='pt', and torch.as_tensor makes them of lists and arrays"
        )


def _check_positions(position_ids: Tensor, given: tuple[int, ...]) -> Tensor:
    """Positions of every token of a padded grid, int64; (1, S) and (S,) are those of every row."""
    if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
        raise InputError(f"position_ids has dtype {position_ids.dtype}; it must be whole numbers")
    position_ids = position_ids.long()
    if tuple(position_ids.shape) in ((1, given[1]), (given[1],)):
        return position_ids.expand(given)
    if tuple(position_ids.shape) != given:
        raise InputError(
            f"position_ids has shape {tuple(position_ids.shape)}; with this input it must be {given} or {(1, given[1])}"
        )
    return position_ids


def _lengths_by(position_BS: Tensor, gaps_separate: bool) -> list[int] | None:
    """Lengths of the texts that lie in the rows of a grid, where some row holds more than one; else None."""
    if not position_BS.numel():
        return None
    step = position_BS.diff(dim=1)
    begins_BS = torch.ones(position_BS.shape, dtype=torch.bool, device=position_BS.device)
    begins_BS[:, 1:] = step != 1 if gaps_separate else step <= 0
    starts = begins_BS.flatten().nonzero().squeeze(1).tolist()
    if len(starts) == len(position_BS):
        return None
    return [b - a for a, b in itertools.pairwise([*starts, position_BS.numel()])]


def _check_grid(
    given: tuple[int, ...],
    indices: Tensor | None,
    max_seqlen: int | None,
    batch_size: int | None,
    seq_len: int | None,
) -> None:
    for name, value, expected in (("batch_size", batch_size, given[0]), ("seq_len", seq_len, given[1])):
        if value is not None and value != expected:
            raise InputError(f"{name} is {value}; the input's shape {given} says {expected}")
    if indices is not None or max_seqlen is not None:
        name = "indices" if indices is not None else "max_seqlen"
        raise InputError(f"{name} describes packed input, which needs cu_seqlens too")


def _from_packed(
    tokens: int,
    device: torch.device,
    indices: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    batch_size: int | None,
    seq_len: int | None,
) -> Packing:
    grid: Any = None
    if indices is not None:
        if batch_size is None or seq_len is None:
            raise InputError("indices say where tokens stand in a padded grid, which needs batch_size and seq_len too")
        grid = (int(batch_size), int(seq_len))
        if tuple(indices.shape) != (tokens,):
            raise InputError(f"indices has shape {tuple(indices.shape)}; one a token means ({tokens},)")
        if tokens and not (int(indices.min()) >= 0 and int(indices.max()) < grid[0] * grid[1]):
            raise InputError(f"indices reach to {int(indices.max())}; the grid {grid} has {grid[0] * grid[1]} places")
    elif seq_len is not None:
        raise InputError(f"seq_len is {seq_len}; to pad packed outputs, indices must say where each token goes")
    packing = Packing.from_cu_seqlens(cu_seqlens, tokens, device, None if indices is None else indices.to(device), grid)
    if batch_size is not None and batch_size != len(packing.lengths):
        raise InputError(f"batch_size is {batch_size}; cu_seqlens holds {len(packing.lengths)} texts")
    if indices is not None and packing.indices_T is not None:
        places_T, rows_T = packing.indices_T, packing.indices_T // grid[1]
        if bool((places_T[1:] <= places_T[:-1]).any()) or not torch.equal(rows_T, packing.text_T):
            raise InputError(
                "indices must rise, and put each text of cu_seqlens into a row of its own; they give rows "
                f"{rows_T.unique_consecutive().tolist()[:8]} with {len(places_T)} places"
            )
    longest = max(packing.lengths, default=0)
    if max_seqlen is not None and int(max_seqlen) < longest:
        raise InputError(f"max_seqlen is {int(max_seqlen)}; the longest text of cu_seqlens has {longest} tokens")
    return packing


def _check_packed_mask(attention_mask: Tensor, packing: Packing) -> None:
    real = (attention_mask != 0).sum(-1).flatten().tolist() if attention_mask.dim() == 2 else None
    if real not in (list(packing.lengths), [packing.tokens]):
        raise InputError(
            f"attention_mask of shape {tuple(attention_mask.shape)} marks {real} real tokens; cu_seqlens says "
            f"{list(packing.lengths)}. Packed input needs no mask"
        )


def _check_window_mask(mask: Tensor, grid: tuple[int, ...]) -> None:
    # Windows follow from the positions; the reference takes this argument and computes its own mask as well.
    allowed = (grid, (grid[0], 1, grid[-1], grid[-1]))
    if tuple(mask.shape) not in allowed:
        raise InputError(f"sliding_window_mask has shape {tuple(mask.shape)}; it must be {allowed[0]} or {allowed[1]}")
