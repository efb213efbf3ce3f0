"""The kernels, built for cards that are not here: by the same compiler, to the code that would run there."""

import json
import subprocess
import sys

import pytest

from tests.engines.gpu import build

# One target shows that the kernels build; each of the others takes as long again.
OTHERS = [pytest.param(target, marks=pytest.mark.slow) for target in ("cuda:80", "hip:gfx942")]


@pytest.mark.parametrize("target", ["cuda:90", *OTHERS])
def test_every_kernel_builds(target):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.engines.gpu.build", target]
    environment = {**build.environment(), "TRITON_INTERPRET": "0"}  # kernels are built or interpreted, not both
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    built = json.loads(done.stdout)
    assert set(built) == set(build.KERNELS)
    limit = {"cuda:80": 163, "cuda:90": 227, "hip:gfx942": 64}[target] * 1024
    for name, about in built.items():
        assert about["shared"] <= limit, (name, about)
    if target == "cuda:90":
        for name in ("product", "gated_product", "rotated_product"):
            assert built[name]["warpgroup"], f"{name} leaves Hopper's matrix units idle"
            assert built[name]["spilled"] <= 128, (name, built[name])  # bytes a thread
