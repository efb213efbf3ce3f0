"""How many threads the machine gives a process, and how they wait: set before PyTorch is loaded.

PyTorch's threads (OpenMP) spin between two products while they wait for each other. On cores that other processes use
as well, a thread spins for one that is not running: two threads then train up to 20 times more slowly than one, and two
that sleep after a short while up to twice as fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path

# What OpenMP reads when it is loaded. GNU's own variable says how often a thread looks before it sleeps: about 20 us.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
_CGROUPS = Path("/sys/fs/cgroup")


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have threads wait asleep, and start no more of them than a container may use; what is set already stays.

    It does nothing once PyTorch is loaded, which has read these settings then.
    """
    if "torch" in sys.modules:
        return
    if not environment.keys() & WAITING.keys():
        environment.update(WAITING)
    allowed = quota()
    if allowed is not None and "OMP_NUM_THREADS" not in environment and allowed < cores():
        environment["OMP_NUM_THREADS"] = str(max(1, int(allowed)))


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the process's control groups allow it, as containers set it; None without a limit."""
    return min(_quotas(root, own), default=None)


def _quotas(root: Path, own: Path) -> Iterator[float]:
    """Limits of the group and of those above it; of the older kind of groups, that of the container's root."""
    try:
        names = [line.removeprefix("0::/") for line in own.read_text().splitlines() if line.startswith("0::/")]
    except OSError:
        names = []
    group = root / (names[0] if names else "")
    files = [place / "cpu.max" for place in (group, *group.parents) if place.is_relative_to(root)]
    older = [root / "cpu/cpu.cfs_quota_us", root / "cpu/cpu.cfs_period_us"]
    for limit in (*([file] for file in files), older):
        yield from _limit(limit)


def _limit(files: list[Path]) -> Iterator[float]:
    try:
        allowed, period = " ".join(file.read_text() for file in files).split()
        if allowed not in ("max", "-1"):
            yield int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return
