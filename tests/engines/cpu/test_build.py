"""Installing never fails for want of a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KERNELS = "modernbert/native/_kernels.so"


def build(tree, **environment):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "out").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, KERNELS in archive.namelist(), done.stdout + done.stderr


def test_without_a_compiler_the_wheel_has_no_kernels_and_says_so(tree):
    name, has_kernels, said = build(tree, CC="no-such-compiler")
    assert not has_kernels
    assert name.endswith("py3-none-any.whl")
    assert "There is no C compiler (no-such-compiler)" in said


def test_with_a_compiler_that_fails(tree):
    source = tree / "src" / "modernbert" / "native" / "dispatch.c"
    for other in source.parent.glob("*.c"):
        other.unlink()
    source.write_text("#error a processor from the future\n")
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    name, has_kernels, said = build(tree)
    assert not has_kernels
    assert name.endswith("py3-none-any.whl")
    assert "a processor from the future" in said


@pytest.mark.slow
def test_with_a_compiler_the_wheel_is_of_this_platform(tree):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    name, has_kernels, _ = build(tree)
    assert has_kernels
    assert "-py3-none-" in name
    assert "any" not in name
