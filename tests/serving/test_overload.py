"""Ten times more than a server can compute, for a while: nothing that it accepted is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.network, pytest.mark.slow]


def test_an_overload_loses_nothing_and_the_server_answers_afterwards():
    script = Path(__file__).parents[2] / "benchmarks" / "overload.py"
    done = subprocess.run([sys.executable, script, "--seconds", "20"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(done.stdout)
    assert found["overload"]["answered once"] > 0
    assert found["overload"]["refused with 429"] > 0
    assert found["SIGTERM under load"]["refused with 503, the server ends"] > 0
    assert found["said of the log"] == ["modernbert: lines of the log are lost: No space left on device"]
    start, peak, _ = found["resident, MB: start, peak, end"]
    assert peak < start + 500
