"""Raw text for training: documents read from files, held-out ones set apart, long ones cut into pieces."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from modernbert.errors import InputError

SUFFIXES = (".txt", ".jsonl")
_SENTENCE_END = re.compile(r"""(?<=[.!?])["'\u201d\u2019)\]]*\s+|\n+""")
_CHARACTERS_A_TOKEN = 4.0  # a guess, on the safe side for English; pieces that come out longer are cut again


class Document(NamedTuple):
    """One document, and the file or folder that it shares with others of its kind."""

    text: str
    source: str


def iter_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """Yield documents, in the order of their paths: a .txt file is one, a .jsonl line's "text" is one.

    Args:
        paths: files, or folders that are searched for .txt and .jsonl files.

    Raises:
        InputError: a path does not exist, has another suffix, or a line of it is no object with a "text".
    """
    for path in _files(paths):
        if path.suffix == ".txt":
            yield Document(path.read_text(encoding="utf-8", errors="replace"), str(path.parent))
            continue
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f'{path}, line {number}: not a JSON object with a "text"') from error
                yield Document(str(text), str(path))


def _files(paths: Iterable[str | Path]) -> list[Path]:
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not inside:
                raise InputError(f"{path} holds no {' or '.join(SUFFIXES)} file")
            found.extend(inside)
        elif not path.is_file():
            raise InputError(f"there is no file or folder {path}")
        elif path.suffix not in SUFFIXES:
            raise InputError(f"{path} is neither {' nor '.join(SUFFIXES)}")
        else:
            found.append(path)
    return found


def split_documents(paths: Iterable[str | Path], held_out: float) -> tuple[list[str], list[str]]:
    """The texts of all documents, as those to train on and those held out.

    Of every .jsonl file and every folder of .txt files the same share is held out, rounded to whole documents:
    those whose texts hash lowest, which are the same ones at every run and on any machine.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"the held-out share is {held_out}; it must lie in [0, 1)")
    groups: dict[str, list[str]] = {}
    for document in iter_documents(paths):
        groups.setdefault(document.source, []).append(document.text)
    train: list[str] = []
    kept: list[str] = []
    for texts in groups.values():
        ranked = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode()).digest())
        chosen = set(ranked[: round(len(texts) * held_out)])
        train.extend(text for i, text in enumerate(texts) if i not in chosen)
        kept.extend(texts[i] for i in sorted(chosen))
    return train, kept


def pieces(document: str, max_tokens: int, rng: random.Random) -> Iterator[str]:
    """Cut a document into texts that begin and end where sentences do; nothing is lost.

    Half of the texts are as long as the model may see, a quarter are a few sentences and a quarter are a single
    one, so that the model knows short texts as well as long ones.
    """
    ends = [m.end() for m in _SENTENCE_END.finditer(document)] + [len(document)]
    start, target = 0, 0
    for i, end in enumerate(ends):
        if not target:
            draw = rng.random()
            share = 1.0 if draw < 0.5 else rng.uniform(0.1, 0.5) if draw < 0.75 else 0.0
            target = max(1, int(share * max_tokens * _CHARACTERS_A_TOKEN))
        following = ends[i + 1] if i + 1 < len(ends) else None
        if following is None or following - start > target:
            text = document[start:end].strip()
            if text:
                yield text
            start, target = end, 0
