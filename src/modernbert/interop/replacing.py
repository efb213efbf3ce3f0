"""Objects whose class is replaced by one over it, and batches whose rows are computed in turn."""

from __future__ import annotations

import contextvars
import copy
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from modernbert.engines.guard import LOCK, plain_state

# Tokens that a CPU computes in one go; the rows of a larger batch are computed in turn, to the same bits.
CPU_TOKENS = 1024
# Whether whoever calls a model may read its states at padding, which are zeros where padding is not computed.
reads_padding: contextvars.ContextVar[bool] = contextvars.ContextVar("reads_padding", default=True)
LINK = "_modernbert"  # the attribute of a patched object that says what it is patched with


class Replaced(nn.Module):
    """Goes before the class of a patched object. Copies of it, and what is pickled, are of the class before."""

    plain: ClassVar[type[nn.Module]]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with LOCK:
            memo[id(self)] = copied = self.plain.__new__(self.plain)
            state = plain_state(self)
            state.pop(LINK, None)
            copied.__dict__.update(copy.deepcopy(state, memo))
            return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.copy, (copy.deepcopy(self),)  # whoever reads it needs nothing of this package


_REPLACED: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def replace_class(thing: Any, base: type[Replaced], methods: Sequence[str]) -> None:
    """Let an object be of a class over its own, whose methods of these names are those of `base`."""
    cls = type(thing)
    if (base, cls) not in _REPLACED:
        own: dict[str, Any] = {
            name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__") if hasattr(cls, name)
        }
        for name in methods:
            if hasattr(cls, name):  # with the arguments that help() and inspect.signature show
                own[name] = functools.wraps(getattr(cls, name))(_handing_over(getattr(base, f"_{name}")))
        make: Any = type(cls)  # abstract classes have a type of their own
        _REPLACED[base, cls] = make(cls.__name__, (base, cls), own | {"plain": cls})
    object.__setattr__(thing, "__class__", _REPLACED[base, cls])


def _handing_over(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return call


def row_groups(lengths: Sequence[int], most: int) -> list[slice]:
    """Consecutive rows of at most so many tokens; a longer row is a group of its own."""
    groups, first, tokens = [], 0, 0
    for row, length in enumerate(lengths):
        if tokens and tokens + length > most:
            groups.append(slice(first, row))
            first, tokens = row, 0
        tokens += length
    return [*groups, slice(first, len(lengths))]


def computed_in_turn(
    compute: Callable[[dict[str, Any]], Mapping[str, Any]],
    given: Mapping[str, Any],
    mask: Tensor,
    most: int,
    by_token: Collection[str],
) -> dict[str, Any]:
    """What `compute` makes of a batch, computed for groups of rows of at most so many tokens.

    Columns on the right that are padding for a whole group are not handed over, and come back as zeros.

    Args:
        compute: takes what is given for some rows, and returns values by name.
        given: tensors whose first dimensions are those of the mask, and what is the same for all rows.
        mask: (rows, columns), nonzero at real tokens.
        most: tokens of a group.
        by_token: the results that have a value for each column; other tensors have one for each row.
    """
    rows, columns = mask.shape
    real = mask != 0
    whole: dict[str, Any] = {}
    for group in row_groups(real.sum(1).tolist(), most):
        used = real[group].any(0).nonzero()
        width = int(used[-1]) + 1 if len(used) else 1
        cut = dict(given)
        for name, value in given.items():
            if isinstance(value, Tensor) and value.dim() and len(value) == rows:
                cut[name] = value[group, :width] if value.shape[1:2] == (columns,) else value[group]
        for name, part in compute(cut).items():
            if not isinstance(part, Tensor) or not part.dim() or len(part) != group.stop - group.start:
                whole.setdefault(name, part)
                continue
            if name not in whole:
                shape = (rows, columns, *part.shape[2:]) if name in by_token else (rows, *part.shape[1:])
                whole[name] = zeros(shape, part)
            if name in by_token:
                whole[name][group, : part.shape[1]] = part
            else:
                whole[name][group] = part
    return whole


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros, on a CPU in memory that the system gives only where it is written to."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = int(np.prod(shape)) * like.dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype).view(shape)
