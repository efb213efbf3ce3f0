"""Other versions of the libraries that work with our models, each as a folder laid over what is installed.

`run_in(name, code, *arguments)` runs Python code where the libraries are those of `ENVIRONMENTS[name]`, and returns
what it printed; `tests` and `modernbert` can be imported there. A code that fails is a failure of the test, with its
last lines. Where a folder cannot be built, as without a package index, the test is skipped with the reason.

Folders are built once, below `MODERNBERT_ENVIRONMENTS` if that is set and below `.pytest_cache` otherwise.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OF_4 = ("huggingface_hub==0.36.2", "transformers==4.57.6", "tokenizers==0.22.2")
OF_5_3 = ("huggingface_hub==1.33.0", "transformers==5.3.0", "tokenizers==0.22.2")
# Exactly what lies over the installed packages; nothing stands for those themselves.
ENVIRONMENTS = {
    "installed": (),
    "transformers-4.48": ("huggingface_hub==0.36.2", "transformers==4.48.3", "tokenizers==0.21.4"),
    "transformers-4.57": OF_4,
    "transformers-5": ("transformers==5.24.0",),
    "sentence-transformers-5": ("sentence-transformers==5.7.0",),
    "sentence-transformers-5-transformers-4.57": ("sentence-transformers==5.7.0", *OF_4, "datasets==4.4.1"),
    "sentence-transformers-6": ("sentence-transformers==6.2.0", "transformers==5.24.0"),
    "pylate": (
        *("pylate==1.6.0", "sentence-transformers==5.3.0", *OF_5_3),
        *("fast-plaid==1.4.6.2110", "fastkmeans==0.5.0", "ujson==5.12.0"),
    ),
    "colbert": (
        *("colbert-ai==0.2.22", "bitarray==3.12.3", "ujson==6.1.0", "gitpython==3.2.1", "gitdb==4.0.12"),
        *("smmap==5.0.3", "python-dotenv==1.2.4", "ninja==1.13.2", "flask==3.1.3", "werkzeug==3.1.9"),
        *("itsdangerous==2.2.0", "blinker==1.9.0"),
        *("huggingface_hub==0.36.2", "transformers==4.48.3", "tokenizers==0.21.4"),
    ),
    "peft-0.14": ("peft==0.14.0", "huggingface_hub==0.36.2", "transformers==4.48.3", "tokenizers==0.21.4"),
    "setfit": ("setfit==1.2.0", "evaluate==0.4.6", "sentence-transformers==5.7.0", *OF_4, "datasets==4.4.1"),
    "gliner": (
        *("gliner==0.2.29", "sentencepiece==0.2.3"),
        *("huggingface_hub==1.33.0", "transformers==5.16.1"),
    ),
}


def environment(name: str) -> Path:
    """The folder to put on the path, built if it is not there yet."""
    packages = ENVIRONMENTS[name]
    folder = Path(os.environ.get("MODERNBERT_ENVIRONMENTS", ROOT / ".pytest_cache" / "environments"))
    key = hashlib.sha256(f"{sys.version_info[:2]} {sorted(packages)}".encode()).hexdigest()[:12]
    built = folder / f"{name}-{key}"
    if built.is_dir():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    making = tempfile.mkdtemp(prefix=f".{name}-", dir=folder)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    made = subprocess.run([*pip, "--target", making, *packages], capture_output=True, text=True) if packages else None
    if made is not None and made.returncode:
        shutil.rmtree(making)
        pytest.skip(f"{name} cannot be installed here: {made.stderr.strip().splitlines()[-1]}")
    try:
        Path(making).rename(built)
    except OSError:  # another process was faster
        shutil.rmtree(making)
    return built


def run_in(name: str, code: str, *arguments: str, timeout: float = 600) -> str:
    """What the code prints there; it finds `arguments` in `sys.argv[1:]`."""
    path = [str(environment(name)), str(ROOT / "src"), str(ROOT)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise AssertionError(f"in {name}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def pytest_over(name: str, packages: Sequence[str], arguments: Sequence[str | Path], where: Path) -> str:
    """What pytest prints of tests that passed in an environment with more packages over those that are installed here.

    Args:
        name: of the environment, which is kept below `MODERNBERT_ENVIRONMENTS` if that is set.
        packages: that are added, with what they need.
        arguments: of pytest.
        where: folder for the environment otherwise.
    """
    folder = Path(os.environ.get("MODERNBERT_ENVIRONMENTS", where)) / name
    python = folder / "bin" / "python"
    if not (folder / "whole").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        made = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"they cannot be installed here: {made.stderr.strip().splitlines()[-1]}")
        (folder / "whole").touch()
    command = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout
