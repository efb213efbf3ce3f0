"""The door: what callers hand to a model, checked and packed.

Shapes: B texts, S columns of a padded grid, T real tokens of all texts together, M hidden size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.errors import InputError
from modernbert.nn.packing import PackedInputs, Packing, wrong_shape


@dataclasses.dataclass
class Inputs:
    """What callers hand over to say what the texts are. `models.forward` describes each of these arguments."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    sliding_window_mask: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    cache_position: Tensor | None = None
    indices: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    batch_size: int | None = None
    seq_len: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None or isinstance(value, Tensor):
                continue
            if self.__dataclass_fields__[name].type == "Tensor | None":
                check_tensors(**{name: value})


def check_tensors(**given: Any) -> None:
    """Refuse what is no tensor; raises `InputError` with what to give instead."""
    for name, value in given.items():
        if value is None or isinstance(value, Tensor):
            continue
        what = (
            "it must be a tensor: tokenizers make them with return_tensors='pt', torch.as_tensor from lists and arrays"
        )
        if isinstance(value, Mapping):
            what = "give what it holds by name: model(**encoding), made with return_tensors='pt'"
        raise InputError(f"{name} is a {type(value).__name__}; {what}")


def pack_inputs(
    given: Inputs,
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    *,
    gaps_separate: bool = False,
    columns: int = 0,
    ends: Sequence[int] = (),
) -> PackedInputs:
    """Check a model's input, pack it where it lies, and send it to the model in one asynchronous copy.

    A mask of four dimensions that hides padding alone (and for a decoder, what comes after a token) is taken for the
    padding's. Input without a mask whose `position_ids` begin anew within a row is packed already: each new beginning
    is another text, as with `cu_seqlens`. `sliding_window_mask` ends here: local windows follow from the positions.

    Args:
        given: what the caller gave.
        config, dtype, device: the model's; `inputs_embeds` are cast to its dtype, except under autocast.
        gaps_separate: whether positions that leave some out begin another text as well.
        columns: how many columns there are in a cache that the input continues.
        ends: the position of the next token of each text in that cache; empty if it holds none.

    Raises:
        InputError: arguments contradict each other or have the wrong shape.
    """
    name, x, shape = _tokens(given, config, dtype)
    if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch._C._is_tracing()):
        raise InputError(
            "texts are packed by their lengths, which no trace of a model can hold; torch.compile works, and "
            "modernbert.export writes graphs of ONNX and OpenVINO"
        )
    packed, mask, new = given.cu_seqlens is not None, given.attention_mask, shape[1] if len(shape) > 1 else 0
    if mask is not None and mask.dim() == 4 and not packed and not columns:
        mask = _padding_of(mask, shape, config)
    if mask is not None and mask.dim() == 2 and mask.shape[1] == columns + new:
        mask = mask[:, columns:]
    if given.cache_position is not None:
        if packed:
            raise InputError("cache_position counts the columns of padded input; packed input has none")
        if (got := given.cache_position.tolist()) != list(range(columns, columns + new)):
            raise InputError(
                f"cache_position is {got}; with {columns} columns in the cache and {new} new ones it must be {columns} "
                f"to {columns + new - 1}"
            )
    if packed:
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
            raise InputError(f"{name} has leading shape {shape}; with cu_seqlens it must be (tokens,) or (1, tokens)")
        packing = _packing_of_packed(given, mask, shape[-1], x.device)
    else:
        if len(shape) != 2:
            raise InputError(
                f"{name} has leading shape {shape}; it must be (batch, sequence), or (tokens,) together with cu_seqlens"
            )
        packing = _packing_of_padded(given, mask, shape, x.device, gaps_separate, bool(ends))
    if (window := given.sliding_window_mask) is not None:
        grid = packing.grid or shape
        if tuple(window.shape) not in (grid, square := (grid[0], 1, grid[-1], grid[-1])):
            raise InputError(f"sliding_window_mask has shape {tuple(window.shape)}; it must be {grid} or {square}")
    if ends and len(ends) != len(packing.lengths):
        raise InputError(f"the input has {len(packing.lengths)} texts; past_key_values holds {len(ends)}")

    packed = packed or packing.grid is None
    x = x.flatten(0, len(shape) - 1) if packed else packing.unpad(x)
    ids_T, embeds_TM = (x, None) if given.input_ids is not None else (None, x)
    if ids_T is not None and ids_T.numel():
        low, high = map(int, ids_T.aminmax())
        if low < 0 or high >= config.vocab_size:
            bad = low if low < 0 else high
            raise InputError(f"input_ids holds {bad}; the vocabulary has ids 0 to {config.vocab_size - 1}")
    inputs = PackedInputs(ids_T, embeds_TM, packing, packing.positions_T, shape, packed)
    if (positions := given.position_ids) is not None:
        positions = positions if given.cu_seqlens is not None else positions.long().expand(shape)
        inputs = dataclasses.replace(inputs, rope_positions_T=inputs.pack("position_ids", positions))
    elif ends:
        positions = packing.positions_T + torch.tensor(ends, device=x.device)[packing.text_T]
        inputs = dataclasses.replace(inputs, rope_positions_T=positions)
    return inputs.to(device)


def _padding_of(mask: Tensor, shape: tuple[int, ...], config: Config) -> Tensor:
    """The padding (B, S) that a mask (B or 1, 1, S or 1, S) says: 0 or True where a query sees a key, or 1 of integers.

    All layers of transformers take such a mask as it is. So local windows, which it knows nothing of, must see all.
    """
    batch, columns = shape if len(shape) == 2 else (0, 0)
    if (
        mask.shape[0] not in (1, batch)
        or mask.shape[1] != 1
        or mask.shape[2:] not in ((1, columns), (columns, columns))
    ):
        raise wrong_shape("attention_mask", mask, shape, (batch, 1, columns, columns))
    seen_BSS = (mask > -1 if mask.is_floating_point() else mask != 0).expand(batch, 1, columns, columns)[:, 0]
    real_BS = seen_BSS.diagonal(dim1=1, dim2=2)
    expected_BSS = real_BS[:, None].expand_as(seen_BSS)
    if config.reach("full_attention").right == 0:
        expected_BSS = expected_BSS.tril()
    is_plain = not mask.is_floating_point() or bool(((mask == 0) | (mask < -1000)).all())
    lefts = [config.reach(kind).left for kind in config.layer_types or ()]
    longest = max((int(i[-1] - i[0]) for row in real_BS if len(i := row.nonzero())), default=0)
    sees_all = all(left is None or longest <= left for left in lefts)
    if not (is_plain and sees_all and torch.equal(seen_BSS[real_BS], expected_BSS[real_BS])):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)} and says more than where padding is, or meets texts longer "
            f"than the local window; give the padding as {shape}, and texts in one row by position_ids or cu_seqlens"
        )
    return real_BS


def _is_whole(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _tokens(given: Inputs, config: Config, dtype: torch.dtype) -> tuple[str, Tensor, tuple[int, ...]]:
    """Name, values and leading shape of the ids, or of the vectors that are given instead."""
    ids, embeds = given.input_ids, given.inputs_embeds
    if ids is not None and embeds is None:
        if not _is_whole(ids):
            raise InputError(f"input_ids has dtype {ids.dtype}; it must be whole numbers")
        return "input_ids", ids if ids.dtype in (torch.int32, torch.int64) else ids.long(), tuple(ids.shape)
    if embeds is None or ids is not None:
        both = "neither" if ids is None else "both"
        raise InputError(f"{both} of input_ids and inputs_embeds were given; give exactly one")
    shape = tuple(embeds.shape)
    if not embeds.is_floating_point():
        raise InputError(f"inputs_embeds has dtype {embeds.dtype}; it must be floating numbers")
    if len(shape) < 2 or shape[-1] != config.hidden_size:
        raise InputError(f"inputs_embeds has shape {shape}; its last dimension must be {config.hidden_size}")
    autocast = torch.is_autocast_enabled(embeds.device.type)
    return "inputs_embeds", embeds if autocast else embeds.to(dtype), shape[:-1]


def _packing_of_padded(
    given: Inputs,
    mask: Tensor | None,
    shape: tuple[int, ...],
    device: torch.device,
    gaps_separate: bool,
    continues: bool,
) -> Packing:
    """Where the texts of a padded grid lie: one in each row, or several that only positions tell apart."""
    for name, value, expected in (("batch_size", given.batch_size, shape[0]), ("seq_len", given.seq_len, shape[1])):
        if value is not None and value != expected:
            raise InputError(f"{name} is {value}; the input's shape {shape} says {expected}")
    for name in ("indices", "max_seqlen"):
        if getattr(given, name) is not None:
            raise InputError(f"{name} describes packed input, which needs cu_seqlens too")
    if mask is not None and tuple(mask.shape) != shape:
        raise wrong_shape("attention_mask", mask, shape)
    if (positions := given.position_ids) is not None:
        if not _is_whole(positions):
            raise InputError(f"position_ids has dtype {positions.dtype}; it must be whole numbers")
        if tuple(positions.shape) not in (shape, (1, shape[1]), (shape[1],)):  # the last two are every row's
            raise wrong_shape("position_ids", positions, shape, (1, shape[1]))
        if mask is None and not continues and positions.numel():
            # A row that continues a text is one text, whatever its positions.
            step = positions.long().expand(shape).diff(dim=1)
            begins_BS = torch.ones(shape, dtype=torch.bool, device=step.device)
            begins_BS[:, 1:] = step != 1 if gaps_separate else step <= 0
            starts = begins_BS.flatten().nonzero().squeeze(1).tolist()
            if len(starts) > shape[0]:
                lengths = [b - a for a, b in itertools.pairwise([*starts, begins_BS.numel()])]
                return Packing.from_lengths(lengths, device)
    return Packing.from_mask(torch.ones(shape, device=device).bool() if mask is None else mask.to(device) != 0)


def _packing_of_packed(given: Inputs, mask: Tensor | None, tokens: int, device: torch.device) -> Packing:
    """Where the texts of packed input lie, and where they stand in the padded grid that the caller described."""
    indices, batch_size, grid = given.indices, given.batch_size, None
    assert given.cu_seqlens is not None
    if indices is not None:
        if batch_size is None or given.seq_len is None:
            raise InputError("indices say where tokens stand in a padded grid, which needs batch_size and seq_len too")
        indices, grid = indices.to(device), (int(batch_size), int(given.seq_len))
        if tuple(indices.shape) != (tokens,):
            raise InputError(f"indices has shape {tuple(indices.shape)}; one a token means ({tokens},)")
        if tokens and not (int(indices.min()) >= 0 and int(indices.max()) < grid[0] * grid[1]):
            raise InputError(f"indices reach to {int(indices.max())}; the grid {grid} has {grid[0] * grid[1]} places")
    elif given.seq_len is not None:
        raise InputError(f"seq_len is {given.seq_len}; to pad packed outputs, indices must say where each token goes")
    lengths = lengths_of(given.cu_seqlens, tokens)
    packing = Packing.from_lengths(lengths, device, indices, grid)
    if batch_size is not None and batch_size != len(lengths):
        raise InputError(f"batch_size is {batch_size}; cu_seqlens holds {len(lengths)} texts")
    if indices is not None and grid is not None:
        row_T = indices // grid[1]
        if bool((indices[1:] <= indices[:-1]).any()) or not torch.equal(row_T, packing.text_T):
            raise InputError(
                "indices must rise, and put each text of cu_seqlens into a row of its own; they give rows "
                f"{row_T.unique_consecutive().tolist()[:8]} with {tokens} places"
            )
    longest = max(lengths, default=0)
    if given.max_seqlen is not None and int(given.max_seqlen) < longest:
        raise InputError(f"max_seqlen is {int(given.max_seqlen)}; the longest text of cu_seqlens has {longest} tokens")
    if mask is not None:
        real = (mask != 0).sum(-1).flatten().tolist() if mask.dim() == 2 else None
        if real not in (lengths, [tokens]):
            raise InputError(
                f"attention_mask of shape {tuple(mask.shape)} marks {real} real tokens; cu_seqlens says {lengths}. "
                "Packed input needs no mask"
            )
    return packing


def lengths_of(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """Lengths of texts by their cumulative lengths, which must rise from 0 to `tokens`."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise InputError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; it must be whole "
            "numbers of shape (batch + 1,)"
        )
    starts = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != tokens or min(lengths, default=0) < 0:
        raise InputError(
            f"cu_seqlens is {starts if len(starts) < 12 else [*starts[:5], '...', *starts[-5:]]}; it must begin "
            f"at 0, never fall, and end at the number of tokens given, {tokens}"
        )
    return lengths
