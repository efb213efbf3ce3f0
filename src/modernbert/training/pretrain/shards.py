"""Tokens on disk: a folder of shards that are mapped into memory, its manifest, and its tokenizer.

data/
  manifest.json                     what is there, with a checksum of every file
  tokenizer.json, tokenizer_config.json
  SOURCE.train.00000.tokens.npy     ids of texts, end to end, special tokens included
  SOURCE.train.00000.starts.npy     where each text begins, and the end of the last
  SOURCE.held_out.00000.tokens.npy  of documents that are kept out of training
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
from modernbert.training.pretrain.texts import Corpus, Ids

MANIFEST, FORMAT = "manifest.json", "modernbert tokens, version 1"
TRAIN, HELD_OUT = "train", "held_out"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a manifest.

    Attributes:
        name: of its files, without their ends.
        texts, tokens: how many.
        tokens_sha256, starts_sha256: checksums of the files.
    """

    name: str
    texts: int
    tokens: int
    tokens_sha256: str
    starts_sha256: str


@dataclasses.dataclass(frozen=True)
class Source:
    """What one source gave.

    Attributes:
        documents, bytes: documents to train on, and bytes of their text in UTF-8.
        held_out_documents, held_out_bytes: of those that are kept out.
        train, held_out: shards.
    """

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
        vocab_size: ids that it has.
        max_length: longest text, in tokens.
        short: share of the texts that were cut sooner.
        seed: of their lengths.
        sources: by name.
    """

    tokenizer: str
    vocab_size: int
    max_length: int
    short: float
    seed: int
    sources: dict[str, Source]

    def write(self, folder: Path) -> None:
        """Write it whole or not at all."""
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
    """Write one shard's files."""
    corpus = Corpus.of(texts)
    kind: npt.DTypeLike = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    sums = []
    for end, values in (("tokens", corpus.tokens.astype(kind)), ("starts", corpus.starts)):
        path = folder / f"{name}.{end}.npy"
        with path.open("wb") as file:  # a path of any name, which numpy.save would end in .npy
            np.save(file, values)
        sums.append(checksum(path))
    return Shard(name, len(corpus), len(corpus.tokens), *sums)


def open_shard(folder: Path, shard: Shard) -> Corpus:
    """Map a shard into memory.

    Raises:
        InputError: a file is missing, or not what the manifest says.
    """
    arrays: list[npt.NDArray[Any]] = []
    for end, length in (("tokens", shard.tokens), ("starts", shard.texts + 1)):
        path = folder / f"{shard.name}.{end}.npy"
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
    for end, expected in (("tokens", shard.tokens_sha256), ("starts", shard.starts_sha256)):
        path = folder / f"{shard.name}.{end}.npy"
        if path.is_file() and checksum(path) != expected:
            raise InputError(f"{path} is corrupt: its checksum is not the manifest's; prepare the data again")


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
