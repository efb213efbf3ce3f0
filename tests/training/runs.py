"""What a run of training writes, and processes that are waited for."""

import json
import subprocess
import sys
import time

import torch

PROGRAM = [sys.executable, "-m", "modernbert"]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]


def history(folder):
    """The rows of a run's metrics; none where it has not begun."""
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def assert_close_by_name(ours, theirs, limit):
    """Weights agree, as far as theirs go."""
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=limit, msg=lambda said, at=name: f"{at}: {said}")


def wait_for_steps(process, folder, steps):
    """Until a run has made so many steps, or its process has ended."""
    log = folder / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= steps):
        time.sleep(0.002)


def finish(program, *arguments):
    """Run a command in a process of its own, to its end."""
    done = subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
