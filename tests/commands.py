"""Commands, run in this process or in one of their own."""

import contextlib
import json
import os
import resource
import subprocess
import sys

import pytest

from modernbert.cli import main


def called(capsys, *arguments):
    """Run a command in this process; its exit code, output and errors."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    return end.value.code or 0, out.out, out.err


def run(*arguments, stdin="", **environment):
    """Run a command in a process of its own."""
    command = [sys.executable, "-c", "from modernbert.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, input=stdin.encode(), capture_output=True, check=False, env=environment)


@contextlib.contextmanager
def files_of_at_most(size):
    """No file can be longer: what a full disk is to the one who writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def rows_of(text):
    """What is printed as JSON, an object a line."""
    return [json.loads(line) for line in text.splitlines()]


def answers(text):
    return [row["output"] for row in rows_of(text)]
