"""What is computed: a task, a model and options, as plain values that travel to other processes and machines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modernbert.errors import InputError
from modernbert.io.tables.columns import Field
from modernbert.pipelines.forms import form_of

# Ranking a corpus by its documents' lists is no row by row work: here a row is a pair, and its answer a score.
_PAIRS = (Field("query"), Field("document", ("text", "documents")))
_UNSERVED = {"text-generation": "what is generated from one text may depend on the others before it"}
Key = bytes  # 32 bytes


@dataclasses.dataclass(frozen=True)
class Settings:
    """A task as a function of texts; everything that decides the numbers of an answer, and nothing that does not.

    Attributes:
        task: its name.
        model: a folder or a repository; None is the small model of the package.
        tokenizer: a folder or a repository; None is the model's.
        options: of the task, as they were given.
        loading: `device`, `dtype`, `revision`, `adapter`, `attn_implementation` and `batch_tokens`, as for `pipeline`.
        fixed: fields that are the same for every text, such as {"query": "..."}.
        store: how vectors are stored: "float32", "float16", "int8" or "bits".
    """

    task: str
    model: str | None = None
    tokenizer: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loading: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    store: str = "float32"

    def __post_init__(self) -> None:
        if self.task in _UNSERVED:
            raise InputError(f"{self.task} is not run over corpora: {_UNSERVED[self.task]}")
        plain = {
            name: value if value is None or isinstance(value, bool | int | str) else str(value).removeprefix("torch.")
            for name, value in self.loading.items()
        }  # of a dtype or a device its name, which travels
        object.__setattr__(self, "loading", plain)

    @property
    def form(self) -> tuple[Field, ...]:
        """The fields that a row has."""
        fields = _PAIRS if self.task == "text-ranking" else form_of(self.task)
        return tuple(field for field in fields if field.name not in self.fixed)

    def to_json(self) -> str:
        """The settings as one line, the same for the same settings."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=False)

    def keys(self, rows: Iterable[Sequence[Any]]) -> list[Key]:
        """The key of each row: SHA-256 of the task, its options and what the row has in the fields of `form`.

        Args:
            rows: of each the values of the fields, in the order of `form`.
        """
        asked = {"task": self.task, "options": dict(self.options), "fixed": dict(self.fixed)}
        salt = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode() + b"\n")
        keys = []
        for values in rows:
            whole = salt.copy()
            whole.update(_bytes_of(values))
            keys.append(whole.digest())
        return keys


def _bytes_of(values: Sequence[Any]) -> bytes:
    """One text as it is; anything else as JSON, which begins differently. Fields that end it and are not there go."""
    values = list(values)
    while len(values) > 1 and values[-1] is None:
        values.pop()
    if len(values) == 1 and isinstance(values[0], str):
        return b"T" + values[0].encode("utf-8", "surrogatepass")
    return b"J" + json.dumps(list(values), ensure_ascii=True).encode()
