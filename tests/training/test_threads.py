"""Threads of training: asleep while they wait, and no more than the machine gives."""

import os
import subprocess
import sys

import pytest

from modernbert.training.threads import WAITING, cores, quota, share_cores


@pytest.fixture
def group(tmp_path):
    """Makes control groups with a limit each, the outer one first."""

    def make(*limits):
        place = tmp_path / "cgroup"
        for name, limit in zip(("", "outer", "inner"), limits, strict=False):
            place = place / name
            place.mkdir(exist_ok=True)
            (place / "cpu.max").write_text(f"{limit}\n")
        (tmp_path / "own").write_text(f"0::/{place.relative_to(tmp_path / 'cgroup')}\n")
        return tmp_path / "cgroup", tmp_path / "own"

    return make


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        (["150000 100000"], 1.5), (["max 100000"], None), (["max 100000", "400000 100000", "50000 100000"], 0.5),
        (["200000 100000", "max 100000", "max 100000"], 2.0), (["torn"], None), ([], None),
    ],
)  # fmt: skip
def test_the_smallest_limit_of_the_control_groups_counts(group, tmp_path, limits, found):
    assert quota(*(group(*limits) if limits else (tmp_path, tmp_path / "none"))) == found


def test_limits_of_the_older_kind(tmp_path):
    (tmp_path / "cpu").mkdir()
    for name, value in (("cpu.cfs_quota_us", "300000"), ("cpu.cfs_period_us", "100000")):
        (tmp_path / "cpu" / name).write_text(f"{value}\n")
    assert quota(tmp_path, tmp_path / "none") == 3.0
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert quota(tmp_path, tmp_path / "none") is None


def test_threads_sleep_unless_somebody_says_otherwise_or_pytorch_is_there_already(monkeypatch):
    given = {}
    share_cores(given)
    assert given == {}  # the tests have loaded PyTorch
    monkeypatch.delitem(sys.modules, "torch")
    share_cores(given)
    assert WAITING.items() <= given.items()
    for chosen in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}):
        given = dict(chosen)
        share_cores(given)
        assert given.items() - {("OMP_NUM_THREADS", given.get("OMP_NUM_THREADS"))} == chosen.items()
    monkeypatch.setattr("modernbert.training.threads.quota", lambda: 0.5)
    given = {}
    share_cores(given)
    assert given["OMP_NUM_THREADS"] == "1" or cores() == 1
    given = {"OMP_NUM_THREADS": "3"}
    share_cores(given)
    assert given["OMP_NUM_THREADS"] == "3"


def test_the_command_sets_threads_before_it_loads_pytorch():
    code = (
        "import os, sys\nfrom modernbert.cli import main\nassert 'torch' not in sys.modules\n"
        "try:\n    main(['finetune', 'masked-lm'])\nexcept SystemExit:\n    pass\n"
        "import torch\nprint(os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.split() == ["passive"], said.stderr
