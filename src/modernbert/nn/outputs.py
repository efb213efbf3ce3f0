"""What models return: by attribute, by key, by position, and as a plain tuple; fields that are None do not count."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch.utils import _pytree as pytree


class ModelOutput(OrderedDict[str, Any]):
    """Base of the outputs: an ordered dict of the fields that are set, which are attributes as well.

    A class annotates its fields in their order, which stand before those of its bases. Setting None takes a field out.
    PyTorch takes outputs apart and makes them anew, as export and wrappers for several processes need it.

    Args:
        values: the fields in their order, or one mapping or iterator of pairs.
        named: fields by their names.

    Raises:
        TypeError, KeyError: there is no such field.
    """

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        annotated = [name for base in cls.__mro__ if base is not ModelOutput for name in inspect.get_annotations(base)]
        cls._fields = tuple(dict.fromkeys(annotated))
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, names: cls(zip(names, values, strict=True)),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=lambda output: (
                [(pytree.MappingKey(name), value) for name, value in output.items()],
                list(output.keys()),
            ),
        )

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__()
        if len(values) == 1 and isinstance(values[0], Mapping | Iterator):
            self.update(values[0])
        elif len(values) > len(self._fields):
            raise TypeError(f"{type(self).__name__} takes {len(self._fields)} fields; {len(values)} were given")
        else:
            self.update(zip(self._fields, values, strict=False))
        self.update(named)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._fields:
            raise KeyError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(self._fields)}")
        if value is None:
            self.pop(name, None)
            return
        super().__setitem__(name, value)
        for later in self._fields[self._fields.index(name) + 1 :]:
            if later in self:
                self.move_to_end(later)

    def __getattr__(self, name: str) -> Any:
        if name not in self._fields:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fields:
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order."""
        return tuple(self.values())
