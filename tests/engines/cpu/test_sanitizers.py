"""The kernels under the address and undefined-behaviour sanitizers, on random operations."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modernbert.engines.cpu import library

SOURCES = library.FILE.parent
COMPILER = os.environ.get("CC") or shutil.which("cc")
# bfloat16 products are imitated where the processor has none, so that their layout is seen as well.
FLAGS = ["-std=gnu11", "-O1", "-g", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
FLAGS += ["-DIMITATE_BF16"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
def test_kernels_under_sanitizers(tmp_path):
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    built = subprocess.run([COMPILER, *SANITIZE, "-o", tmp_path / "probe", probe], capture_output=True)
    if built.returncode or subprocess.run([tmp_path / "probe"]).returncode:
        pytest.skip("the compiler has no sanitizers")

    def compile_one(source):
        out = tmp_path / f"{source.stem}.o"
        command = [COMPILER, *FLAGS, *SANITIZE, f"-I{SOURCES}", "-c", source, "-o", out]
        subprocess.run(command, check=True, capture_output=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sorted(SOURCES.glob("*.c")), Path(__file__).with_name("fuzz.c")]))
    subprocess.run([COMPILER, *SANITIZE, "-pthread", "-o", tmp_path / "fuzz", *objects, "-lm"], check=True)
    done = subprocess.run([tmp_path / "fuzz", "12"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable right" in done.stdout
    assert "wrong" not in done.stdout
