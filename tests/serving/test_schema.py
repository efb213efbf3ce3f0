"""What programs that read the schema send: every reply is one that the schema promises, and none is a failure."""

import subprocess
import sys

import pytest

from tests.serving.test_server import Running

pytestmark = [pytest.mark.network, pytest.mark.slow]


def test_no_request_that_follows_from_the_schema_breaks_a_promise():
    pytest.importorskip("schemathesis")
    with Running("--no-access-log") as server:
        # What a model can read, such as a context's length, is more than a schema can say: texts may be refused.
        command = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            f"{server.url}/openapi.json",
            "--max-examples",
            "20",
        ]
        done = subprocess.run(
            [*command, "--exclude-checks", "positive_data_acceptance"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-5000:]
        assert not [line for line in server.lines if "Traceback" in line]
