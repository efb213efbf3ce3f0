"""Tokenize raw text once, for every run to come: `prepare_data`."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from modernbert.errors import InputError, shown
from modernbert.io.files import making
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.pretraining.documents import Collection
from modernbert.training.pretraining.shards import HELD_OUT, TRAIN, Manifest, Shard, Source, fingerprint, write_shard
from modernbert.training.pretraining.texts import Cutter, Ids
from modernbert.training.pretraining.train_tokenizer import save_tokenizer

_SHARD_TOKENS = 1 << 26  # a file of 128 MiB


def prepare_data(
    paths: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    max_length: int = 1024,
    held_out: float = 0.02,
    short: float = 0.0,
    column: str = "text",
    shard_tokens: int = _SHARD_TOKENS,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, documents: None,
) -> Manifest:
    """Tokenize documents into shards that runs map into memory.

    Args:
        paths: what to read; see `documents.Collection`. Each path is a source, for mixtures by weight.
        tokenizer: folder or Hub repository.
        output: folder to make; it must not exist. Written under another name and renamed once it is whole.
        max_length: longest text in tokens, special ones included; longer documents become several texts.
        held_out: share of the documents of each source that no run trains on.
        short: share of the texts that are made shorter than `max_length`; see `texts.Cutter`.
        column: name of the column that holds the text.
        shard_tokens: about how many tokens a file of the output holds.
        seed: seed of the lengths that texts are cut to.
        report: called with the number of documents done so far, and of all documents.

    Raises:
        InputError: a path, the tokenizer or an argument cannot be used, or the output exists.
        OSError: a file cannot be read or written.
    """
    output = Path(output)
    if isinstance(paths, str | Path):
        raise InputError(f"paths is {shown(str(paths))}; give a list of paths")
    if output.exists():
        raise InputError(f"output is {output}, which exists; name a folder to make")
    if shard_tokens < 1:
        raise InputError(f"shard_tokens is {shard_tokens}; it must be above 0")
    backend = Tokenizer.from_pretrained(tokenizer).backend
    backend.no_truncation()
    backend.no_padding()
    vocab_size = backend.get_vocab_size()
    cutter = Cutter(backend, max_length, short, seed)
    collection = Collection(paths, held_out, column)
    with making(output) as temporary:
        parts: dict[str, list[_Part]] = {}  # of each source: what is trained on, and what is held out
        documents, copy = itertools.tee(collection)
        tokenized = cutter.texts(document.text for document in copy)
        for done, (document, texts) in enumerate(zip(documents, tokenized, strict=True), 1):
            if document.source not in parts:
                name = f"{len(parts):02}-{re.sub(r'[^A-Za-z0-9.-]', '_', document.source)}"
                parts[document.source] = [
                    _Part(temporary, f"{name}.{part}", shard_tokens, vocab_size) for part in (TRAIN, HELD_OUT)
                ]
            parts[document.source][document.held_out].add(document.text, texts)
            report(done, collection.documents)
        sources = {name: _source(*both) for name, both in parts.items()}
        if not any(source.tokens for source in sources.values()):
            raise InputError(f"there is no text to train on in {', '.join(map(str, paths))}")
        manifest = Manifest(fingerprint(backend), vocab_size, max_length, short, seed, sources)
        save_tokenizer(backend, temporary, max_length)
        manifest.write(temporary)
    return manifest


@dataclasses.dataclass
class _Part:
    """One part of a source: shards, written as they fill."""

    folder: Path
    name: str
    shard_tokens: int
    vocab_size: int
    documents: int = 0
    bytes: int = 0
    shards: list[Shard] = dataclasses.field(default_factory=list)
    waiting: list[Ids] = dataclasses.field(default_factory=list)
    tokens: int = 0  # of the texts that wait

    def add(self, document: str, texts: Sequence[Ids]) -> None:
        self.documents += 1
        self.bytes += len(document.encode("utf-8", "replace"))
        for text in texts:
            self.waiting.append(text)
            self.tokens += len(text)
            if self.tokens >= self.shard_tokens:
                self.flush()

    def flush(self) -> None:
        if self.waiting:
            name = f"{self.name}.{len(self.shards):05}"
            self.shards.append(write_shard(self.folder, name, self.waiting, self.vocab_size))
            self.waiting, self.tokens = [], 0


def _source(train: _Part, held: _Part) -> Source:
    train.flush()
    held.flush()
    return Source(train.documents, train.bytes, held.documents, held.bytes, train.shards, held.shards)
