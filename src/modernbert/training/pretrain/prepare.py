"""Tokenize raw text once, for every run to come: `prepare_data`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from modernbert.errors import InputError, shown
from modernbert.io.files import making
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.pretrain.documents import Collection, Document
from modernbert.training.pretrain.shards import HELD_OUT, TRAIN, Manifest, Shard, Source, fingerprint, write_shard
from modernbert.training.pretrain.texts import Cutter, Ids
from modernbert.training.pretrain.train_tokenizer import save_tokenizer

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
        paths: what to read; see `documents.Collection`. Each path is a source of its own, for mixtures by weight.
        tokenizer: folder or Hub repository.
        output: folder to make; it must not exist. Written under another name and renamed once it is whole.
        max_length: longest text in tokens, special ones included; longer documents become several texts.
        held_out: share of the documents of each source that no run trains on.
        short: share of the texts that are cut shorter than they need be; see `texts.Cutter`.
        column: where rows hold their text.
        shard_tokens: tokens of a shard, about.
        seed: of the lengths that texts are cut to.
        report: called with documents done and documents in all.

    Raises:
        InputError: a path, the tokenizer or an argument is of no use, or the output exists.
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
    cutter = Cutter(backend, max_length, short, seed)
    collection = Collection(paths, held_out, column)
    with making(output) as temporary:
        writers: dict[str, _Writer] = {}
        documents, copy = itertools.tee(collection)
        tokenized = cutter.texts(document.text for document in copy)
        for done, (document, texts) in enumerate(zip(documents, tokenized, strict=True), 1):
            if document.source not in writers:
                name = f"{len(writers):02}-{re.sub(r'[^A-Za-z0-9.-]', '_', document.source)}"
                writers[document.source] = _Writer(temporary, name, shard_tokens, backend.get_vocab_size())
            writers[document.source].add(document, texts)
            report(done, collection.documents)
        sources = {name: writer.finish() for name, writer in writers.items()}
        if not any(source.tokens for source in sources.values()):
            raise InputError(f"there is no text to train on in {', '.join(map(str, paths))}")
        manifest = Manifest(fingerprint(backend), backend.get_vocab_size(), max_length, short, seed, sources)
        save_tokenizer(backend, temporary, max_length)
        manifest.write(temporary)
    return manifest


class _Writer:
    """Shards of one source, written as they fill."""

    def __init__(self, folder: Path, name: str, shard_tokens: int, vocab_size: int) -> None:
        self.folder, self.name, self.shard_tokens, self.vocab_size = folder, name, shard_tokens, vocab_size
        self.waiting: dict[str, list[Ids]] = {TRAIN: [], HELD_OUT: []}
        self.size = {TRAIN: 0, HELD_OUT: 0}
        self.documents = {TRAIN: 0, HELD_OUT: 0}
        self.bytes = {TRAIN: 0, HELD_OUT: 0}
        self.shards: dict[str, list[Shard]] = {TRAIN: [], HELD_OUT: []}

    def add(self, document: Document, texts: Sequence[Ids]) -> None:
        part = HELD_OUT if document.held_out else TRAIN
        self.documents[part] += 1
        self.bytes[part] += len(document.text.encode("utf-8", "replace"))
        for text in texts:
            self.waiting[part].append(text)
            self.size[part] += len(text)
            if self.size[part] >= self.shard_tokens:
                self._flush(part)

    def _flush(self, part: str) -> None:
        name = f"{self.name}.{part}.{len(self.shards[part]):05}"
        self.shards[part].append(write_shard(self.folder, name, self.waiting[part], self.vocab_size))
        self.waiting[part], self.size[part] = [], 0

    def finish(self) -> Source:
        for part, texts in self.waiting.items():
            if texts:
                self._flush(part)
        return Source(
            documents=self.documents[TRAIN],
            bytes=self.bytes[TRAIN],
            held_out_documents=self.documents[HELD_OUT],
            held_out_bytes=self.bytes[HELD_OUT],
            train=self.shards[TRAIN],
            held_out=self.shards[HELD_OUT],
        )
