"""What models return: by attribute, by key, by position, and as a plain tuple; fields that are None do not count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, overload


@dataclasses.dataclass
class ModelOutput:
    """Base of the outputs. Iterating gives the names of the fields that are set, as a mapping does."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order."""
        return tuple(self.values())

    def keys(self) -> list[str]:
        """Names of the fields that are set, in order."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def values(self) -> list[Any]:
        """The fields that are set, in order."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Names and values of the fields that are set, in order."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """The field of this name, or `default` where it is not set."""
        return getattr(self, name) if name in self else default

    @overload
    def __getitem__(self, key: slice) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, key: str | int) -> Any: ...
    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self:
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())
