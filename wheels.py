"""Wheels with compiled kernels for Linux, macOS and Windows, all of them built on one machine.

    pip install hatchling ziglang
    python wheels.py --output dist                          # all of them
    python wheels.py linux-x86_64 macos-arm64 --output dist

The compiler is Zig's, which brings the C library of each system, down to glibc 2.17. A wheel serves every Python and
every PyTorch: the library inside of it is loaded by ctypes, and asks the system for nothing but its C library. Each
wheel is opened again, and refused where it holds no library for its system.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
# Undefined behaviour is not checked for at run time, symbols of debuggers are left out.
_ALWAYS = "-fno-sanitize=undefined -s"


class Target(NamedTuple):
    """A system that wheels are built for."""

    platform: str  # in the wheel's name; several with dots between
    zig: str  # what its compiler calls it
    magic: bytes  # what a library of it begins with
    machine: tuple[int, bytes]  # where its header names the processor, from the beginning or the PE header on; and how


_ELF, _MACH, _PE = b"\x7fELF\x02\x01", b"\xcf\xfa\xed\xfe", b"MZ"
TARGETS = {
    "linux-x86_64": Target(
        "manylinux_2_17_x86_64.manylinux2014_x86_64", "x86_64-linux-gnu.2.17", _ELF, (18, b"\x3e\x00")
    ),
    "linux-aarch64": Target(
        "manylinux_2_17_aarch64.manylinux2014_aarch64", "aarch64-linux-gnu.2.17", _ELF, (18, b"\xb7\x00")
    ),
    "macos-arm64": Target("macosx_11_0_arm64", "aarch64-macos.11.0", _MACH, (4, b"\x0c\x00\x00\x01")),
    "macos-x86_64": Target("macosx_11_0_x86_64", "x86_64-macos.11.0", _MACH, (4, b"\x07\x00\x00\x01")),
    "windows-x86_64": Target("win_amd64", "x86_64-windows-gnu", _PE, (4, b"\x64\x86")),
}


def compiler_of(target: Target) -> str:
    """The command that compiles for a system."""
    return f'"{sys.executable}" -m ziglang cc -target {target.zig} {_ALWAYS}'


@contextlib.contextmanager
def released() -> Iterator[Path]:
    """A folder with what a release holds, unpacked: builds leave nothing behind in the checkout."""
    with tempfile.TemporaryDirectory() as temporary:
        _run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", temporary], ROOT, {})
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(temporary, filter="data")
        yield Path(temporary) / archive.name.removesuffix(".tar.gz")


def build(target: Target, tree: Path, output: Path, compiler: str | None = None) -> Path:
    """Build one wheel, check it, and return its path.

    Args:
        target: the system.
        tree: a folder with what a release holds.
        output: where the wheel goes.
        compiler: another one than Zig's.

    Raises:
        RuntimeError: the build ended with an error, or its wheel is not one for this system.
    """
    environment = {"MODERNBERT_PLATFORM": target.platform, "CC": compiler or compiler_of(target)}
    with tempfile.TemporaryDirectory() as temporary:
        _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", temporary], tree, environment)
        (wheel,) = Path(temporary).glob("*.whl")
        check(wheel, target)
        output.mkdir(parents=True, exist_ok=True)
        return Path(wheel.replace(output / wheel.name))


def check(wheel: Path, target: Target) -> None:
    """Raise `RuntimeError` where a wheel has not the name, the library and the tags of a system."""
    if not wheel.name.endswith(f"-py3-none-{target.platform}.whl"):
        raise RuntimeError(f"{wheel.name} is not named for {target.platform}")
    name = "_kernels.dll" if target.magic == _PE else "_kernels.so"
    with zipfile.ZipFile(wheel) as archive:
        held = [entry for entry in archive.namelist() if "/native/_kernels." in entry]
        if held != [f"modernbert/native/{name}"]:
            raise RuntimeError(f"{wheel.name} holds {held or 'no library'}; it must hold {name} alone")
        library = archive.read(held[0])
        (about,) = [entry for entry in archive.namelist() if entry.endswith(".dist-info/WHEEL")]
        tags = {line[5:] for line in archive.read(about).decode().splitlines() if line.startswith("Tag: ")}
    if tags != {f"py3-none-{one}" for one in target.platform.split(".")}:
        raise RuntimeError(f"{wheel.name} says that it is for {', '.join(sorted(tags))}")
    begin = int.from_bytes(library[60:64], "little") if target.magic == _PE else 0
    at, wanted = begin + target.machine[0], target.machine[1]
    if not library.startswith(target.magic) or library[at : at + len(wanted)] != wanted:
        raise RuntimeError(f"{wheel.name}: {name} is of another system or processor")


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")


def main() -> None:
    """Read the options, build, print the paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all if none is given")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder for the wheels (default: dist)")
    given = parser.parse_args()
    if unknown := [name for name in given.targets if name not in TARGETS]:
        parser.error(f"there is no target {unknown[0]}; there are {', '.join(TARGETS)}")
    try:
        with released() as tree:
            for name in given.targets or TARGETS:
                sys.stdout.write(f"{build(TARGETS[name], tree, given.output)}\n")
                sys.stdout.flush()
    except RuntimeError as error:
        raise SystemExit(f"wheels.py: {error}") from None


if __name__ == "__main__":
    main()
