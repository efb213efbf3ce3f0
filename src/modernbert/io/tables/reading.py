"""Reading rows of files, each form by its suffix, one row after another."""

from __future__ import annotations

import csv
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from modernbert.checks import described
from modernbert.errors import InputError, printable, shown
from modernbert.io.files import parse_json

Record = dict[str, Any]
Records = Iterator[Record | InputError]
_PLAIN, _CONLL = ("", ".txt", ".text", ".md"), (".conll", ".bio", ".iob2")
SUFFIXES = (*_PLAIN[1:], ".csv", ".tsv", ".jsonl", ".parquet", ".json", *_CONLL)  # of files that are read
_IS_BLANK = "is blank; remove the line, or write a record there"
_DELIMITERS = {".csv": (",", ";\t|"), ".tsv": ("\t", ",;|")}  # of a table, and of others that are taken for one


def read_records(path: Path, part: str | None = None, header: Sequence[str] | None = None) -> Iterator[Record]:
    """Read the rows of a file or folder; blank lines are left out.

    Args:
        path: a file, read by its suffix, or a folder of the `datasets` library. Names without a suffix, .txt, .text
            and .md are plain text: a line is the row {"text": line}.
        part: which part to read of a file or folder that has several; see `parts_of`.
        header: names of the columns, for tables (.csv, .tsv) whose first line does not name them.

    Raises:
        InputError: the suffix is unknown, or a line is not what the suffix promises.
        OSError: the file cannot be read.
    """
    for record in _read(path, part, header):
        if isinstance(record, InputError):
            raise record
        if not isinstance(record, _Blank):
            yield record


def read_in_place(path: Path | None, part: str | None = None) -> Records:
    """Read as `read_records` does, so that row i is line i: nothing is left out, and a line that is no row is an error.

    A blank line is a row of an empty text in plain text, and an error in .jsonl and in tables. Only blank lines at the
    very end of a file do not count. Without a path, standard input is read as plain text.
    """
    blanks: list[Record | InputError] = []
    for record in _by_line(sys.stdin.buffer, "standard input", _text) if path is None else _read(path, part, None):
        if isinstance(record, _Blank):
            blanks.append(record.row)
            continue
        yield from blanks
        blanks.clear()
        yield record


def read_stream(stream: BinaryIO, name: str, suffix: str) -> Records:
    """Rows of an open file of lines, an error for each line that is no row; blank lines are left out.

    Args:
        stream: binary, read from where it is.
        name: of the file, for messages.
        suffix: .jsonl, .csv, .tsv, or one of plain text.

    Raises:
        InputError: the rest of the file makes no sense, such as a table after an open quote.
    """
    if suffix in _DELIMITERS:
        found = _read_table(stream, Path(name), suffix, None)
    else:
        found = _by_line(stream, name, _object if suffix == ".jsonl" else _text)
    return (record for record in found if not isinstance(record, _Blank))


def count_records(path: Path | None) -> int | None:
    """How many rows `read_in_place` gives, where it is cheap to find out."""
    suffix = path.suffix.lower() if path is not None and path.is_file() else None
    if path is not None and suffix == ".parquet":
        with _opened_parquet(path) as file:
            return int(file.metadata.num_rows)
    if path is not None and suffix in (*_PLAIN, ".jsonl"):
        with path.open("rb") as lines:
            return max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    return None


def check_file(path: Path) -> None:
    """Raise `InputError` for a file of a kind that is not read, or a folder that is no dataset."""
    if path.is_dir():
        if not is_dataset(path):
            raise InputError(f"{path} is a folder; give a file: {', '.join(SUFFIXES)}")
    elif path.suffix.lower() not in ("", *SUFFIXES):
        raise InputError(f"{path} ends with {path.suffix}; read are {', '.join(SUFFIXES)}, and no suffix as plain text")


def place_of(source: str) -> tuple[Path, str | None]:
    """The path and the part that "PATH#PART" names; a file whose own name has such a sign comes first."""
    if "#" in source and not Path(source).exists():
        name, _, part = source.rpartition("#")
        return Path(name), part
    return Path(source), None


def check_once(places: Iterable[tuple[Path, str | None, str]]) -> None:
    """Raise `InputError` if rows would be read twice; of each place the path, the part, and what the user wrote."""
    given: dict[Path, dict[str | None, str]] = {}
    for path, part, name in places:
        parts = given.setdefault(path.resolve(), {})
        if parts and (part is None or None in parts or part in parts):
            before = parts.get(part) or next(iter(parts.values()))
            raise InputError(f"{path} is given twice, by {before} and by {name}; give it once")
        parts[part] = name


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
    return list(value) if _has_parts(value) else []


def is_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the `datasets` library."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


class _Blank(NamedTuple):
    """A blank line, as the row or the error that it is where it counts."""

    row: Record | InputError


# What readers give; an error instead of a line that is no record. They raise where the rest of a file makes no sense.
_Found = Iterator[Record | InputError | _Blank]


def _read(path: Path, part: str | None, header: Sequence[str] | None) -> _Found:
    check_file(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        yield from _read_dataset(path, part)
    elif suffix == ".json":
        yield from _read_json(path, part)
    elif part is not None:
        raise _no_parts(path, part)
    elif suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        with path.open("rb") as stream:
            if suffix in _DELIMITERS:
                yield from _read_table(stream, path, suffix, header)
            elif suffix in _CONLL:
                yield from _read_conll(stream, path)
            else:
                yield from _by_line(stream, str(path), _object if suffix == ".jsonl" else _text)


def _wrong(name: Path | str, number: int, what: str) -> InputError:
    return InputError(f"{name}, line {number}, {what}")


def _decoded(line: bytes, name: Path | str, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(name, number, f"is not UTF-8: {error.reason}") from None


def _by_line(stream: BinaryIO, name: str, parse: Callable[[str, str, int], Record]) -> _Found:
    """A record a line; `parse` makes it of the line, the file's name and the line's number."""
    for number, line in enumerate(stream, 1):
        text = "?"
        record: Record | InputError
        try:
            if b"\0" in line:
                raise _wrong(name, number, "holds NUL bytes; it is no text in UTF-8")
            text = _decoded(line, name, number)
            record = parse(text, name, number)
        except InputError as error:
            record = error
        yield record if text.strip() else _Blank(record)


def _text(line: str, name: str, number: int) -> Record:
    return {"text": line.removesuffix("\n").removesuffix("\r") if line.strip() else ""}


def _object(line: str, name: str, number: int) -> Record:
    """A row of JSON: an object, or a text alone."""
    if not line.strip():
        raise _wrong(name, number, _IS_BLANK)
    try:
        value = parse_json(line)
    except ValueError as error:
        raise _wrong(name, number, f"is not JSON: {error}") from None
    value = {"text": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise _wrong(name, number, f"holds {described(value)}; give objects or texts")
    return value


def _read_conll(stream: BinaryIO, path: Path) -> _Found:
    """A row a sentence: "tokens" and "tags" are the first and the last column; blank lines stand between sentences."""
    tokens: list[str] = []
    tags: list[str] = []
    for number, raw in enumerate(itertools.chain(stream, [b""]), 1):
        line = _decoded(raw, path, number).rstrip("\r\n")
        cells = line.split("\t" if "\t" in line else " ")
        if line.startswith("# ") and " = " in line and "\t" not in line:
            continue  # what CoNLL-U says of a sentence
        if not line.strip() or line.startswith("-DOCSTART-"):
            if tokens:
                yield {"tokens": tokens, "tags": tags}
            tokens, tags = [], []
        elif len(cells) < 2 or not cells[0].strip() or not cells[-1].strip():
            raise _wrong(path, number, f"is {shown(line)}; give a word and its tag")
        else:
            tokens.append(cells[0])
            tags.append(cells[-1].strip())


def _read_table(stream: BinaryIO, path: Path, suffix: str, header: Sequence[str] | None) -> _Found:
    csv.field_size_limit(2**31 - 1)
    delimiter, others = _DELIMITERS[suffix]
    # Tabs leave quotes alone in most files that have no header.
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" and header is not None else csv.QUOTE_MINIMAL
    wrong: list[InputError] = []  # of lines since the last row
    rows = csv.reader(_lines_of(stream, path, wrong), delimiter=delimiter, strict=True, quoting=quoting)
    try:
        names = next(filter(None, rows), []) if header is None else list(header)
        if wrong:
            raise wrong[0]
        _check_header(path, suffix, names, others if header is None else "")
        for row in rows:
            if wrong:
                yield wrong[0]
                wrong.clear()
            elif len(row) == len(names):
                yield dict(zip(names, row, strict=True))
            elif not row:
                yield _Blank(_wrong(path, rows.line_num, _IS_BLANK))
            else:
                more = "more" if len(row) > len(names) else "fewer"
                yield _wrong(path, rows.line_num, f"has {more} cells than its header, {len(names)}")
    except csv.Error as error:
        raise _wrong(path, rows.line_num, f"is no table: {printable(str(error))}") from error


def _lines_of(stream: BinaryIO, path: Path, wrong: list[InputError]) -> Iterator[str]:
    """The lines of a table; one that is not UTF-8 is noted in `wrong`, and its row ends where it does all the same."""
    for number, line in enumerate(stream, 1):
        try:
            yield _decoded(line, path, number)
        except InputError as error:
            wrong.append(error)
            yield line.decode(errors="surrogateescape")


def _check_header(path: Path, suffix: str, names: Sequence[str], others: str) -> None:
    """Raise `InputError` for a header that has one of the other delimiters, or a name twice."""
    other = next((mark for mark in others if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        wanted = "tabs" if suffix == ".tsv" else "commas"
        raise InputError(
            f"{path} has a header of one column, {shown(names[0])}; is it separated by {shown(other)}? "
            f"A {suffix} file is separated by {wanted}"
        )
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{path} has more than one column called {', '.join(sorted(twice))}")


def _read_json(path: Path, part: str | None) -> Iterator[Record]:
    """Rows of a list, of a part, or of SQuAD's articles."""
    value = _load(path)
    if isinstance(value, dict) and isinstance(value.get("data"), list) and part is None:
        value = value["data"]
        if value and isinstance(value[0], dict) and "paragraphs" in value[0]:
            yield from _questions(value, path)
            return
    elif _has_parts(value):
        value = _part_of(path, value, part)
    elif part is not None:
        raise _no_parts(path, part)
    if not isinstance(value, list):
        raise InputError(f"{path} holds {described(value)}; give a list of rows, parts of rows, or SQuAD's form")
    for number, row in enumerate(value, 1):
        if isinstance(row, list):
            row = {str(i): cell for i, cell in enumerate(row)}
        elif isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}, is {described(row)}; give objects, lists or texts")
        yield row


def _load(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _has_parts(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(rows, list) for rows in value.values())


def _part_of(path: Path, value: Any, part: str | None) -> Any:
    """The part of a mapping of parts that the user named."""
    if part is None or part not in value:
        given = "and none is named" if part is None else f"and no {part!r}"
        raise InputError(f"{path} has the parts {', '.join(value)} {given}; write {path}#{next(iter(value))}")
    return value[part]


def _no_parts(path: Path, part: str) -> InputError:
    return InputError(f"{path} has no parts; it cannot give {part!r}")


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


def _read_parquet(path: Path) -> Iterator[Record]:
    with _opened_parquet(path) as file:
        total, done = int(file.metadata.num_rows), 0
        try:
            for batch in file.iter_batches(1024):
                done += len(batch)
                yield from batch.to_pylist()
        except (ValueError, OSError, NotImplementedError) as error:  # what the library raises for torn files
            raise InputError(f"{path} cannot be read as parquet: {_on_one_line(error)}") from error
        if done != total:
            raise InputError(f"{path} says that it has {total} rows and holds {done}; it is damaged")


def _opened_parquet(path: Path) -> Any:
    parquet = library("pyarrow.parquet", path, "parquet")
    path.open("rb").close()  # errors of the system are given in its own words
    try:
        return parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # what the library raises for files of another kind, and for torn ones
        raise InputError(f"{path} is no parquet file: {_on_one_line(error)}") from error


def _on_one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))


def library(name: str, path: Path, extra: str) -> Any:
    """A module that a file needs; raises `InputError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{path} needs {name.split('.')[0]}: pip install 'modernbert[{extra}]'") from error


def _read_dataset(path: Path, part: str | None) -> Iterator[Record]:
    datasets = library("datasets", path, "train")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (ValueError, KeyError, TypeError, OSError) as error:  # what the library raises for torn folders
        raise InputError(f"{path} is no whole folder of the datasets library: {_on_one_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = _part_of(path, loaded, part)
    elif part is not None:
        raise _no_parts(path, part)
    yield from rows_of_dataset(loaded)


def rows_of_dataset(dataset: Any) -> Iterator[Record]:
    """Rows of a dataset in memory; numbers of classes become their names."""
    features = {column: getattr(feature, "feature", feature) for column, feature in dataset.features.items()}
    names = {column: feature.int2str for column, feature in features.items() if hasattr(feature, "int2str")}
    for row in map(dict, dataset):
        for column, name_of in names.items():
            if (value := row[column]) is not None:
                row[column] = [name_of(i) for i in value] if isinstance(value, list) else name_of(value)
        yield row
