"""The Dockerfile's steps in a folder instead of an image: what it installs serves, is healthy, and ends with 0."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONLY_ROOT = ("apt-get", "useradd")  # what steps call that change a whole system


def instructions(text):
    """Each instruction and its argument, without comments, and with lines that go on joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


def words(argument):
    """A command in either of its forms."""
    return json.loads(argument) if argument.startswith("[") else ["sh", "-c", argument]


def test_instructions_are_read():
    text = '# a comment\nFROM a AS b\nRUN one && \\\n    two\n\nENTRYPOINT ["x", "y z"]\n'
    assert list(instructions(text)) == [("FROM", "a AS b"), ("RUN", "one &&      two"), ("ENTRYPOINT", '["x", "y z"]')]
    assert words('["x", "y z"]') == ["x", "y z"]
    assert words("x y") == ["sh", "-c", "x y"]


def test_the_image_holds_no_secret_and_runs_as_an_ordinary_user():
    read = list(instructions((ROOT / "Dockerfile").read_text()))
    last = max(i for i, (name, _) in enumerate(read) if name == "FROM")
    user = next(i for i, (name, _) in enumerate(read) if name == "USER")
    assert last < user
    assert read[user][1] not in ("root", "0")
    assert {"HEALTHCHECK", "ENTRYPOINT", "EXPOSE"} <= {name for name, _ in read[last:]}
    assert {".git", ".venv"} <= set((ROOT / ".dockerignore").read_text().split())


class Image:
    """A Dockerfile that is carried out below a folder.

    Attributes:
        environment: of its processes.
        skipped: steps that only the user root can do.
    """

    def __init__(self, root, port):
        self.root, self.port = root, port
        self.start, self.health, self.skipped = [], [], []
        self._begin()

    def _begin(self):
        self.folder, self.environment = self.root, {"HOME": str(self.root), "PATH": os.environ["PATH"]}

    def here(self, text):
        """A text in which the image's folders are those below the root, and its port a free one."""
        text = re.sub(r"(?<![\w/.:-])/(opt|source|models)\b", rf"{self.root}/\1", text)
        return re.sub(r"\b8000\b", str(self.port), text)

    def build(self, text):
        for name, argument in instructions(text):
            getattr(self, f"do_{name.lower()}")(self.here(argument))

    def do_from(self, argument):
        shutil.rmtree(self.root / "source", ignore_errors=True)  # a new stage has what is copied into it alone
        self._begin()

    def do_env(self, argument):
        for pair in shlex.split(argument):
            key, _, value = pair.partition("=")
            self.environment[key] = value.replace("$PATH", self.environment["PATH"])

    def do_workdir(self, argument):
        self.folder = Path(argument)

    def do_volume(self, argument):
        Path(argument).mkdir(exist_ok=True)

    def do_copy(self, argument):
        *sources, target = argument.split()
        if sources == ["."]:
            ignored = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()]
            caches = (".mypy_cache", ".ruff_cache", ".pytest_cache")
            shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*ignored, *caches))
        else:
            assert sources == ["--from=build", target]  # which has the same place here
            assert Path(target).is_dir()

    def do_run(self, argument):
        if any(word in argument for word in ONLY_ROOT):
            self.skipped.append(argument)
            return
        for address in re.findall(r"--index-url (\S+)", argument):
            try:
                urllib.request.urlopen(address, timeout=10).close()
            except (OSError, urllib.error.URLError):
                argument = argument.replace(f"--index-url {address}", "")  # another index has the same version
        done = subprocess.run(
            ["sh", "-ec", argument], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode and re.search("No matching distribution|Temporary failure|NewConnection", done.stderr):
            pytest.skip(f"no packages here: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, f"{argument}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def do_healthcheck(self, argument):
        self.health = words(argument.partition("CMD ")[2])

    def do_entrypoint(self, argument):
        self.start = words(argument)

    def do_expose(self, argument):
        assert argument == str(self.port)

    def do_user(self, argument):
        assert argument not in ("root", "0")


@pytest.mark.slow
@pytest.mark.network
def test_its_steps_in_a_clean_environment_make_a_healthy_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tools = tmp_path / "tools"  # the base image's python
    tools.mkdir()
    (tools / "python").symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}")
    image = Image(tmp_path, port)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{tools}{os.pathsep}{before}"
    try:
        image.build((ROOT / "Dockerfile").read_text())
    finally:
        os.environ["PATH"] = before
    assert len(image.skipped) == 2
    assert not (tmp_path / "source").exists()
    installed = subprocess.run(
        ["python", "-c", "import modernbert; print(modernbert.__file__)"],
        env=image.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert installed.stdout.startswith(str(tmp_path / "opt"))
    server = subprocess.Popen(image.start, env=image.environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while True:
            health = subprocess.run(image.health, env=image.environment, capture_output=True, timeout=10, check=False)
            if health.returncode == 0:
                break
            assert server.poll() is None, server.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        health = subprocess.run(image.health, env=image.environment, capture_output=True, timeout=10, check=False)
        assert health.returncode != 0
    finally:
        server.kill()
        server.communicate()
