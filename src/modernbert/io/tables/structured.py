"""Readers of files that hold more than a row a line: JSON, CoNLL columns, SQuAD, folders of the `datasets` library.

What has several parts, such as a file of splits, is read a part at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modernbert.errors import InputError

Record = dict[str, Any]


def parts_of(path: Path) -> list[str]:
    """The parts of a file or folder that has several, such as ["train", "validation"]; none otherwise."""
    if is_dataset(path):
        layout = path / "dataset_dict.json"
        found = _load(layout) if layout.is_file() else {"splits": []}
        if not isinstance(found, dict) or not isinstance(found.get("splits"), list):
            raise InputError(f"{layout} names no splits; write the folder again with save_to_disk")
        return list(map(str, found["splits"]))
    if path.suffix.lower() != ".json" or not path.is_file():
        return []
    value = _load(path)
    return list(value) if _is_parted(value) else []


def place_of(source: str) -> tuple[Path, str | None]:
    """The path and the part that "PATH#PART" names; a file whose own name has such a sign comes first."""
    if "#" in source and not Path(source).exists():
        name, _, part = source.rpartition("#")
        return Path(name), part
    return Path(source), None


def is_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the `datasets` library."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def read_json(path: Path, part: str | None) -> Iterator[Record]:
    """Rows of a list, of a part, or of SQuAD's articles."""
    value = _load(path)
    if isinstance(value, dict) and isinstance(value.get("data"), list) and part is None:
        if value["data"] and isinstance(value["data"][0], dict) and "paragraphs" in value["data"][0]:
            yield from _questions(value["data"], path)
            return
        value = value["data"]
    elif _is_parted(value):
        value = value[_chosen(path, part, list(value))]
    elif part is not None:
        raise InputError(f"{path} has no parts; it cannot give {part!r}")
    if not isinstance(value, list):
        raise InputError(f"{path} holds a {type(value).__name__}; give a list of rows, parts of rows, or SQuAD's form")
    for number, row in enumerate(value, 1):
        if isinstance(row, list):
            row = {str(i): cell for i, cell in enumerate(row)}
        elif isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}, is a {type(row).__name__}; give objects, lists or texts")
        yield row


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise InputError(f"{path} is JSON that is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _is_parted(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(rows, list) for rows in value.values())


def _chosen(path: Path, part: str | None, parts: list[str]) -> str:
    if part is None or part not in parts:
        said = "which is not said" if part is None else f"not {part!r}"
        raise InputError(f"{path} has the parts {', '.join(parts)}; {said}: write {path}#{parts[0]}")
    return part


def _questions(articles: list[Any], path: Path) -> Iterator[Record]:
    """A row a question: id, title, question, context, answers."""
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = [] if asked.get("is_impossible") else asked["answers"]
                    yield {
                        "id": asked["id"],
                        "title": article.get("title", ""),
                        "question": asked["question"],
                        "context": paragraph["context"],
                        "answers": [{"text": a["text"], "answer_start": a["answer_start"]} for a in answers],
                    }
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not in SQuAD's form: {type(error).__name__} {error}") from error


def read_conll(path: Path, part: str | None) -> Iterator[Record]:
    """A row a sentence, "tokens" and "tags": the first and the last column, sentences apart by blank lines."""
    if part is not None:
        raise InputError(f"{path} has no parts; it cannot give {part!r}")
    tokens: list[str] = []
    tags: list[str] = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}, line {number}, is not UTF-8: {error.reason}") from None
        if line.startswith("# ") and " = " in line and "\t" not in line:
            continue  # what CoNLL-U says of a sentence
        if not line.strip() or line.startswith("-DOCSTART-"):
            if tokens:
                yield {"tokens": tokens, "tags": tags}
            tokens, tags = [], []
            continue
        cells = line.split("\t") if "\t" in line else line.split(" ")
        if len(cells) < 2 or not cells[-1].strip() or not cells[0].strip():
            raise InputError(f"{path}, line {number}, is {line!r}; a word and its tag are wanted")
        tokens.append(cells[0])
        tags.append(cells[-1].strip())
    if tokens:
        yield {"tokens": tokens, "tags": tags}


def read_dataset(path: Path, part: str | None) -> Iterator[Record]:
    """Rows of a folder of the `datasets` library; numbers of classes become their names."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{path} needs the datasets library: pip install 'modernbert[train]'") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (ValueError, KeyError, TypeError, OSError) as error:  # what the library raises for torn folders
        raise InputError(
            f"{path} is no whole folder of the datasets library: {' '.join(str(error).split())}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_chosen(path, part, list(loaded))]
    elif part is not None:
        raise InputError(f"{path} has no parts; it cannot give {part!r}")
    yield from rows_of_dataset(loaded)


def rows_of_dataset(dataset: Any) -> Iterator[Record]:
    """Rows of a dataset in memory; numbers of classes become their names."""
    names = {}
    for column, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature)
        if hasattr(inner, "int2str"):
            names[column] = inner.int2str
    for row in dataset:
        named = {}
        for column, name_of in names.items():
            value = row[column]
            if isinstance(value, list):
                named[column] = [name_of(i) for i in value]
            elif value is not None:
                named[column] = name_of(value)
        yield {**row, **named}
