"""Memory for packed weights: those of one model one after another, in large pages where the system has them.

A short pass reads every weight once and computes little with it. With pages of 4 KiB it waits for the tables that say
where each page lies; with pages of 2 MiB, reading runs at the speed of the memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_PAGE = 2 * 2**20
_BLOCK = 64 * 2**20  # what is not used of it takes no memory
_LINE = 64


class _Blocks:
    """Hands out parts of blocks; a block lives as long as one of its parts."""

    def __init__(self) -> None:
        self.left: Tensor | None = None

    def take(self, size: int) -> Tensor:
        size = -(-size // _LINE) * _LINE
        if self.left is None or len(self.left) < size:
            self.left = _block(max(size, _BLOCK))
        part, self.left = self.left[:size], self.left[size:]
        return part


_BLOCKS: ContextVar[_Blocks | None] = ContextVar("_BLOCKS", default=None)


@contextlib.contextmanager
def weights_together() -> Iterator[None]:
    """What `memory_for` gives out within lies one after another."""
    token = _BLOCKS.set(_Blocks())
    try:
        yield
    finally:
        _BLOCKS.reset(token)


def memory_for(size: int) -> Tensor:
    """So many bytes that begin a cache line, (size,) uint8."""
    blocks = _BLOCKS.get()
    if blocks is not None:
        return blocks.take(size)[:size]
    if size >= 4 * _PAGE:
        return _block(size)[:size]
    memory = torch.empty(size + _LINE, dtype=torch.uint8, device="cpu")
    return memory[-memory.data_ptr() % _LINE :][:size]


def _block(size: int) -> Tensor:
    """Memory that nobody has touched, at the beginning of a page."""
    memory = torch.empty(-(-size // _PAGE) * _PAGE + _PAGE, dtype=torch.uint8, device="cpu")
    memory = memory[-memory.data_ptr() % _PAGE :][: -(-size // _PAGE) * _PAGE]
    _advise()(memory.data_ptr(), len(memory))
    return memory


@functools.cache
def _advise() -> Callable[[int, int], object]:
    """Asks the system for large pages; does nothing where it has no such call."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return lambda address, size: None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda address, size: madvise(address, size, advice)
