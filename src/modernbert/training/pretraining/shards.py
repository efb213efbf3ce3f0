"""Tokens on disk: a folder of shards that are mapped into memory, its manifest, and its tokenizer.

data/
  manifest.json                     what is there, with a checksum of every file
  tokenizer.json, tokenizer_config.json
  SOURCE.train.00000.tokens.npy     ids of texts, end to end, special tokens included
  SOURCE.train.00000.starts.npy     where each text begins, and the end of the last
  SOURCE.held_out.00000.tokens.npy  of documents that are held out
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from modernbert.errors import InputError
from modernbert.io.files import parse_json, write_text
from modernbert.training.pretraining.texts import Corpus, Ids

MANIFEST, FORMAT = "manifest.json", "modernbert tokens, version 1"
TRAIN, HELD_OUT = "train", "held_out"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a manifest: the name of its files without their ends, what they hold, and their checksums."""

    name: str
    texts: int
    tokens: int
    tokens_sha256: str
    starts_sha256: str

    @property
    def files(self) -> list[tuple[str, int, str]]:
        """Of each file: its name, how many numbers it holds, and its checksum."""
        return [
            (f"{self.name}.tokens.npy", self.tokens, self.tokens_sha256),
            (f"{self.name}.starts.npy", self.texts + 1, self.starts_sha256),
        ]


@dataclasses.dataclass(frozen=True)
class Source:
    """One source: documents, bytes of their text in UTF-8, and shards; what is trained on and what is held out."""

    documents: int
    bytes: int
    held_out_documents: int
    held_out_bytes: int
    train: list[Shard]
    held_out: list[Shard]

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return sum(shard.tokens for shard in self.train)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of tokens holds.

    Attributes:
        tokenizer: `fingerprint` of the tokenizer.
        vocab_size: number of its ids.
        max_length: longest text, in tokens.
        short: share of the texts that were cut sooner.
        seed: seed of their lengths.
        sources: by name.
    """

    tokenizer: str
    vocab_size: int
    max_length: int
    short: float
    seed: int
    sources: dict[str, Source]

    def write(self, folder: Path) -> None:
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        write_text(folder / MANIFEST, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of a folder.

        Raises:
            InputError: there is none, or it is not one of this version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(f"{folder} holds no {MANIFEST}; `modernbert prepare-data` makes such folders")
        try:
            values = parse_json(path.read_bytes())
            found = values.pop("format")
            if found != FORMAT:
                raise InputError(f"{path} is of the format {found!r}; this version reads {FORMAT!r}")
            sources = {name: _source(source) for name, source in values.pop("sources").items()}
            return cls(**values, sources=sources)
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is no manifest: {type(error).__name__} {error}") from error


def _source(values: dict[str, Any]) -> Source:
    train, held_out = ([Shard(**shard) for shard in values.pop(part)] for part in (TRAIN, HELD_OUT))
    return Source(**values, train=train, held_out=held_out)


def fingerprint(tokenizer: Tokenizer) -> str:
    """What two tokenizers that give texts the same ids have in common: SHA-256 of all but what frames texts."""
    values = json.loads(tokenizer.to_str())
    for name in ("post_processor", "truncation", "padding"):
        values.pop(name, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_shard(folder: Path, name: str, texts: Sequence[Ids], vocab_size: int) -> Shard:
    """Write the files of one shard."""
    corpus = Corpus.of(texts)
    kind: npt.DTypeLike = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    shard = Shard(name, len(corpus), len(corpus.tokens), "", "")
    sums = []
    for (file, *_), values in zip(shard.files, (corpus.tokens.astype(kind), corpus.starts), strict=True):
        with (folder / file).open("wb") as stream:
            np.save(stream, values)
        sums.append(checksum(folder / file))
    return dataclasses.replace(shard, tokens_sha256=sums[0], starts_sha256=sums[1])


def open_shard(folder: Path, shard: Shard) -> Corpus:
    """Map a shard into memory.

    Raises:
        InputError: a file is missing, or not what the manifest says.
    """
    arrays: list[npt.NDArray[Any]] = []
    for file, length, _ in shard.files:
        path = folder / file
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise InputError(f"{path} is missing; prepare the data again, or copy the file back") from None
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{path} is corrupt: {error}; prepare the data again") from error
        if array.shape != (length,) or array.dtype.kind not in "ui":
            raise InputError(
                f"{path} is corrupt: it holds {array.shape} of {array.dtype} and the manifest says {length} numbers"
            )
        arrays.append(array)
    return Corpus(arrays[0], np.asarray(arrays[1]))


def verify_shard(folder: Path, shard: Shard) -> None:
    """Raise `InputError` unless the files are, byte for byte, those that were written."""
    for file, _, expected in shard.files:
        if (folder / file).is_file() and checksum(folder / file) != expected:
            raise InputError(f"{folder / file} is corrupt: its checksum is not the manifest's; prepare the data again")


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
