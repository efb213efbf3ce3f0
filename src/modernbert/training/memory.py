"""Memory that a run keeps between its steps.

Every step needs the same blocks, of megabytes each. The C library gives such blocks back to the system as soon as they
are free, and the system fills each page with zeros when it is touched again, which takes longer than many operations
on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# Of GNU's malloc.h: up to which free memory at the heap's end is kept, and from which size blocks are the system's.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 2**31 - 1, 2**25  # bytes; the latter is the most that it takes
_USUAL = 2**17


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Free blocks stay with the process within, where its C library is GNU's; then they go back to the system."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _USUAL)
        libc.mallopt(_MMAP_THRESHOLD, _USUAL)
        libc.malloc_trim(ctypes.c_size_t(0))
