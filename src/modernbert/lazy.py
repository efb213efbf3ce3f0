"""Packages whose names are imported when they are first used, so that importing a package costs next to nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        package: its full name.
        modules: the module that each exported name is in, below `modernbert`; one of the same name is exported itself.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"modernbert.{modules[name]}")
        return module if modules[name] == name else getattr(module, name)

    return find, lambda: sorted(modules)
