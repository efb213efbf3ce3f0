"""Answers as columns of Arrow: vectors of a fixed length, classes, tags, scores."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from modernbert.io.tables.writing import as_lists, to_json

_TAG_FIELDS = (
    *(("entity", pa.string()), ("entity_group", pa.string()), ("score", pa.float32()), ("index", pa.int32())),
    *(("word", pa.string()), ("start", pa.int32()), ("end", pa.int32())),
)
_ARROW = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "bits": pa.uint8()}


class Answers(abc.ABC):
    """How answers of one kind are stored."""

    @property
    @abc.abstractmethod
    def schema(self) -> Any:
        """The columns."""

    @abc.abstractmethod
    def columns(self, answers: Sequence[Any]) -> list[Any]:
        """Answers as columns; None for those that are missing."""

    def trouble(self, answer: Any) -> str | None:
        """Why an answer cannot be stored, if it cannot."""
        return None


def stored(vectors_ND: Any, store: str) -> tuple[Any, Any]:
    """Vectors as they are stored, and the scale of each where that belongs to it.

    Each vector is stored for itself, whatever others there are. int8: `scale * stored` is the vector, within half a
    scale; the largest number of each vector is 127 scales. bits: whether numbers are above zero, eight a byte, the
    first in the highest bit.
    """
    if store == "float16":
        with np.errstate(over="ignore"):
            return vectors_ND.astype(np.float16), None
    if store == "int8":
        scale_N = np.abs(vectors_ND).max(-1, initial=0).astype(np.float32) / np.float32(127)
        divisor_N = np.where(scale_N > 0, scale_N, np.float32(1))
        return np.clip(np.rint(vectors_ND / divisor_N[:, None]), -127, 127).astype(np.int8), scale_N
    if store == "bits":
        return np.packbits(vectors_ND > 0, axis=-1), None
    return vectors_ND, None


class Vectors(Answers):
    """A vector of each text (`vector`), or one of each of its tokens (`vectors`)."""

    def __init__(self, dimensions: int, of_tokens: bool, store: str) -> None:
        self.dimensions, self.of_tokens, self.store = dimensions, of_tokens, store
        self.width = -(-dimensions // 8) if store == "bits" else dimensions

    @property
    def schema(self) -> Any:
        kind: Any = pa.list_(_ARROW[self.store], self.width)
        scale: Any = pa.float32()
        if self.of_tokens:
            kind, scale = pa.list_(kind), pa.list_(scale)
        fields = [pa.field("vectors" if self.of_tokens else "vector", kind)]
        return pa.schema(fields + [pa.field("scale", scale)] * (self.store == "int8"))

    def trouble(self, answer: Any) -> str | None:
        numbers = stored(np.atleast_2d(answer), self.store)[0] if self.store == "float16" else np.asarray(answer)
        if np.isfinite(numbers).all():
            return None
        return "the vector has numbers that float16 does not hold" if self.store == "float16" else "the vector has NaN"

    def columns(self, answers: Sequence[Any]) -> list[Any]:
        there = [np.atleast_2d(np.asarray(a, np.float32)) for a in answers if a is not None]
        whole = np.concatenate(there) if there else np.empty((0, self.dimensions), np.float32)
        values, scales = stored(whole, self.store)
        if self.of_tokens:
            counts = np.cumsum([0] + [0 if a is None else len(a) for a in answers])
            empty = pa.array([a is None for a in answers])
            found = [pa.FixedSizeListArray.from_arrays(_flat(values, self.store), self.width)]
            found += [] if scales is None else [pa.array(scales)]
            return [pa.ListArray.from_arrays(pa.array(counts, pa.int32()), one, mask=empty) for one in found]
        is_there = np.array([a is not None for a in answers], bool)
        filled = np.zeros((len(answers), self.width), values.dtype)
        filled[is_there] = values
        out = [pa.FixedSizeListArray.from_arrays(_flat(filled, self.store), self.width, mask=pa.array(~is_there))]
        if scales is not None:
            of_all = np.zeros(len(answers), np.float32)
            of_all[is_there] = scales
            out.append(pa.array(of_all, mask=~is_there))
        return out


def _flat(values: Any, store: str) -> Any:
    return pa.array(np.ascontiguousarray(values).reshape(-1), _ARROW[store])


class Sparse(Answers):
    """Entries of the vocabulary (`indices`) and their weights (`values`)."""

    schema = pa.schema([("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float32()))])

    def columns(self, answers: Sequence[Any]) -> list[Any]:
        return [pa.array([None if a is None else a[field.name] for a in answers], field.type) for field in self.schema]


class Label(Answers):
    """The class of each text, and its score."""

    schema = pa.schema([("label", pa.string()), ("score", pa.float32())])

    def columns(self, answers: Sequence[Any]) -> list[Any]:
        return [pa.array([None if a is None else a[field.name] for a in answers], field.type) for field in self.schema]


class Labels(Answers):
    """Several classes of each text, the best first, and their scores."""

    schema = pa.schema([("labels", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])

    def columns(self, answers: Sequence[Any]) -> list[Any]:
        given = [
            a if a is None or isinstance(a, dict) else {f"{name}s": [one[name] for one in a] for name in a[0]}
            for a in answers
        ]
        return [pa.array([None if a is None else a[field.name] for a in given], field.type) for field in self.schema]


class Tags(Answers):
    """Tagged tokens or entities of each text."""

    schema = pa.schema([("tags", pa.list_(pa.struct(list(_TAG_FIELDS))))])

    def columns(self, answers: Sequence[Any]) -> list[Any]:
        plain = [None if a is None else [{n: _scalar(v) for n, v in tag.items()} for tag in a] for a in answers]
        return [pa.array(plain, self.schema.field(0).type)]


class Score(Answers):
    """The score of each pair."""

    schema = pa.schema([("score", pa.float32())])

    def columns(self, answers: Sequence[Any]) -> list[Any]:
        return [pa.array([None if a is None else a[0]["score"] for a in answers], pa.float32())]


class Json(Answers):
    """Answers of other tasks, as JSON."""

    schema = pa.schema([("answer", pa.string())])

    def columns(self, answers: Sequence[Any]) -> list[Any]:
        return [pa.array([None if a is None else to_json(a, _plain) for a in answers], pa.string())]


def _plain(value: Any) -> Any:
    return as_lists(_scalar(value))


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
