"""A Ray instance for tests: two cores, a small store, and nothing left behind."""

import contextlib
import os
import signal
import time

import psutil

CORES = 2
STORE = 200 * 2**20  # bytes


@contextlib.contextmanager
def ray_here(**options):
    """Ray on this machine until the end of the block."""
    import ray

    before = set(children())
    quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    ray.init(address="local", num_cpus=CORES, object_store_memory=STORE, **quiet, **options)
    try:
        yield ray
    finally:
        ray.shutdown()
        until = time.monotonic() + 20
        while (left := set(children()) - before) and time.monotonic() < until:
            time.sleep(0.05)
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def children(of=None, title=""):
    """Numbers of the processes below this one, or below another, whose command has these words."""
    found = []
    for process in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.status() != psutil.STATUS_ZOMBIE and title in " ".join(process.cmdline()):
                found.append(process.pid)
    return found
