"""Wheels for other systems: their names, what they hold, and that those of another system are refused.

Compiling them needs the package `ziglang`. The quick tests have a compiler that writes the head of a library.
"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def _wheels():
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wheels = _wheels()


def head_of(target):
    """The first bytes of a library for a system."""
    head, at = bytearray(256), target.machine[0]
    head[: len(target.magic)] = target.magic
    if target.magic == b"MZ":
        head[60:64], at = (128).to_bytes(4, "little"), 128 + at
    head[at : at + len(target.machine[1])] = target.machine[1]
    return bytes(head)


def compiler(folder, content):
    """A command that takes a compiler's arguments, notes them, and writes this content."""
    script = folder / "compiler.py"
    script.write_text(
        "import pathlib, sys\n"
        f"pathlib.Path({str(folder / 'arguments')!r}).write_text(' '.join(sys.argv))\n"
        f"pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).write_bytes({content!r})\n"
    )
    return f'"{sys.executable}" "{script}"'


@pytest.mark.parametrize("name", ["linux-x86_64", "windows-x86_64"])
def test_a_wheel_is_named_for_its_system_and_holds_one_library(name, tree, tmp_path):
    target = wheels.TARGETS[name]
    found = wheels.build(target, tree, tmp_path / "dist", compiler(tmp_path, head_of(target)))
    assert found.name.endswith(f"-py3-none-{target.platform}.whl")
    wheels.check(found, target)
    others = [other for other in wheels.TARGETS.values() if other != target]
    for other in others:
        with pytest.raises(RuntimeError, match="is not named for"):
            wheels.check(found, other)
    given = (tmp_path / "arguments").read_text().split()
    assert ("-fPIC" in given) == (name != "windows-x86_64")
    assert {"-shared", "-O3"} <= set(given)


def test_a_library_of_another_processor_is_refused(tree, tmp_path):
    target, other = wheels.TARGETS["linux-x86_64"], wheels.TARGETS["linux-aarch64"]
    with pytest.raises(RuntimeError, match=r"_kernels\.so is of another system or processor"):
        wheels.build(target, tree, tmp_path / "dist", compiler(tmp_path, head_of(other)))
    assert not (tmp_path / "dist").exists()


def test_a_wheel_for_another_system_is_never_without_kernels(tree, tmp_path):
    with pytest.raises(RuntimeError, match="the kernels for win_amd64 were not built"):
        wheels.build(wheels.TARGETS["windows-x86_64"], tree, tmp_path / "dist", "no-such-compiler")


def test_an_unknown_target_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wheels.py", "plan9"])
    with pytest.raises(SystemExit) as ended:
        wheels.main()
    assert ended.value.code == 2
    assert "there is no target plan9; there are linux-x86_64, " in capsys.readouterr().err


def test_the_workflow_tests_wheels_that_are_built():
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())["jobs"]
    tested = [one["wheel"] for one in steps["test"]["strategy"]["matrix"]["include"]]
    platforms = [target.platform for target in wheels.TARGETS.values()]
    assert all(any(re.match(rf"{wheel}\b", platform) for platform in platforms) for wheel in tested), tested


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the package ziglang")
@pytest.mark.parametrize("name", wheels.TARGETS)
def test_the_kernels_compile_for_every_system(name, tree, tmp_path):
    wheels.build(wheels.TARGETS[name], tree, tmp_path / "dist")
