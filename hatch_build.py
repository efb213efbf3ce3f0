"""Builds the kernels when the package is installed; without a C compiler the package works too, more slowly.

`MODERNBERT_PLATFORM` names the platform of a wheel that is built for another system, and `CC` is then a compiler for it
(wheels.py sets both); the kernels may then not be left out.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-std=gnu11", "-O3", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno"]
SHARED = ["-shared", "-pthread"]


class KernelsHook(BuildHookInterface):
    """Compiles src/modernbert/native/*.c into _kernels.so (on Windows _kernels.dll) beside them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and put the library into the wheel."""
        folder = Path(self.root) / "src" / "modernbert" / "native"
        wanted = os.environ.get("MODERNBERT_PLATFORM", "")
        platform = wanted or sysconfig.get_platform().replace("-", "_").replace(".", "_")
        target = folder / ("_kernels.dll" if platform.startswith("win") else "_kernels.so")
        for old in folder.glob("_kernels.*"):
            old.unlink()
        reason = self._compile(folder, target, is_windows=platform.startswith("win"))
        if reason and wanted:
            raise RuntimeError(f"the kernels for {wanted} were not built. {reason}")
        if reason:
            self.app.display_warning(
                f"modernbert: the compiled kernels are left out; PyTorch alone will serve. {reason}"
            )
            return
        build_data["artifacts"].append(f"src/modernbert/native/{target.name}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    @staticmethod
    def _compile(folder: Path, target: Path, is_windows: bool) -> str | None:
        """Compile, or say why not."""
        if sys.platform == "win32" and not os.environ.get("CC"):
            return "They are not built on Windows, unless CC names a compiler of GNU C; wheels have them."
        names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
        found = next((words for name in names if shutil.which((words := shlex.split(name))[0])), None)
        if found is None:
            return f"There is no C compiler ({', '.join(names)})."
        sources = [str(path) for path in sorted(folder.glob("*.c"))]
        shared = SHARED if is_windows else ["-fPIC", *SHARED]
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            out = Path(temporary) / target.name
            for more in ([], ["-DWITHOUT_BF16"]):  # older compilers do not know the instruction
                try:
                    command = [*found, *FLAGS, *shared, *more, "-o", str(out), *sources, "-lm"]
                    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
                except (OSError, subprocess.TimeoutExpired) as error:
                    return str(error)
                if done.returncode == 0:
                    out.replace(target)
                    return None
        return f"{found[0]} says: {done.stderr.strip()[-500:]}"
