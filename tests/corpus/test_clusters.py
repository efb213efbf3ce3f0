"""Tests that need Ray, Spark or Daft, in an environment of their own over the packages that are installed here.

They are too large for the packages of the other tests, which skip what needs them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("ray[data,serve]==2.60.0", "pyspark==4.3.0", "daft==0.6.14")
ROOT = Path(__file__).parents[2]
FILES = ("corpus/test_ray.py", "corpus/test_recipes.py", "serving/test_replicas.py", "serving/test_scaling.py")


@pytest.mark.slow
def test_all_that_needs_a_cluster(tmp_path):
    folder = Path(os.environ.get("MODERNBERT_ENVIRONMENTS", tmp_path)) / "clusters"
    python = folder / "bin" / "python"
    if not (folder / "whole").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
        made = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"they cannot be installed here: {made.stderr.strip().splitlines()[-1]}")
        (folder / "whole").touch()
    done = subprocess.run(
        [
            python,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "--all",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *(f"tests/{file}" for file in FILES),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "needs ray" not in done.stdout
