"""Files as documents: their text, where its pages begin, and the other columns of a row."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import hashlib
import html
import html.parser
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modernbert.errors import InputError, printable
from modernbert.io.tables import Field, choose_columns, parse_columns, read_records, text_in
from modernbert.io.tables.reading import library

_TEXTS, _PAGES, _TABLES = (
    (".txt", ".text", ".md", ".markdown"),
    (".html", ".htm"),
    (".jsonl", ".csv", ".tsv", ".parquet"),
)
SUFFIXES = (*_TEXTS, *_PAGES, ".pdf", *_TABLES)
_TEXT = (Field("text", ("content", "contents", "body", "passage", "document")),)
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")  # without leading zeros, as codes have them
_MOST = 2**53  # whole numbers below it are exact in floats
Value = str | float | bool | None


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with its place in a file.

    Attributes:
        text: what is cut into passages.
        row: of a table, from 1; 0 for a file that is one document.
        pages: characters at which pages begin; empty where there are none.
        columns: the other columns of the row, each a text, a number or a truth value.
    """

    text: str
    row: int = 0
    pages: tuple[int, ...] = ()
    columns: Mapping[str, Value] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A hash of everything but the row's number."""
        content = json.dumps([self.text, self.pages, sorted(self.columns.items())])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def read_documents(path: Path, columns: list[str]) -> Iterator[Document]:
    """The documents of a file, in order; those without any text are left out.

    Args:
        path: a file of one of `SUFFIXES`.
        columns: "text=COLUMN" or COLUMN, for tables in which no usual name has the text.

    Raises:
        InputError: the file cannot be read as what its suffix promises; nothing is given before that is known.
    """
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        yield from _rows(path, columns)
        return
    pages: tuple[int, ...] = ()
    if suffix == ".pdf":
        text, pages = _pdf(path)
    elif suffix in _PAGES:
        text = _page(path)
    else:
        text = _decoded(path, path.read_bytes(), "utf-8-sig")
    if text.strip():
        yield Document(text, pages=pages)


def _decoded(path: Path, content: bytes, encoding: str) -> str:
    try:
        text = content.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise InputError(
            f"{path} is no text in {encoding.upper().removesuffix('-SIG')}: {printable(str(error))}"
        ) from None
    if "\0" in text:
        raise InputError(f"{path} holds NUL bytes; it is no text")
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text files


# HTML

_UNREAD = {"script", "style", "template", "noscript", "head", "svg", "iframe", "object"}
_INLINE = (
    *(
        "a",
        "abbr",
        "b",
        "bdi",
        "bdo",
        "big",
        "cite",
        "code",
        "del",
        "dfn",
        "em",
        "font",
        "i",
        "ins",
        "kbd",
        "mark",
        "q",
    ),
    *("s", "samp", "small", "span", "strong", "sub", "sup", "tt", "u", "var", "wbr"),
)


class _Reader(html.parser.HTMLParser):
    """What a browser shows of a page: its text, with a line for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[list[str]] = [[]]
        self.unread: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in _UNREAD:
            self.unread.append(tag)
        elif tag == "body":
            self.unread.clear()  # a head that is never closed
        elif tag not in _INLINE:
            self.lines.append([])

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        if tag not in _INLINE:
            self.lines.append([])

    def handle_endtag(self, tag: str) -> None:
        if tag in self.unread:
            del self.unread[self.unread.index(tag) :]
        elif tag not in _INLINE:
            self.lines.append([])

    def handle_data(self, data: str) -> None:
        if not self.unread:
            self.lines[-1].append(data)


def _page(path: Path) -> str:
    content = path.read_bytes()
    named = re.search(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w-]+)", content[:4096], re.IGNORECASE)
    encoding = "utf-8-sig" if named is None or content.startswith(b"\xef\xbb\xbf") else named[1].decode()
    reader = _Reader()
    reader.feed(_decoded(path, content, encoding))
    reader.close()
    lines = (" ".join("".join(line).split()) for line in reader.lines)
    return "\n".join(line for line in lines if line)


# PDF


def _pdf(path: Path) -> tuple[str, tuple[int, ...]]:
    """The text of all pages, one after another, and where each begins."""
    pypdf = library("pypdf", path, "search")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what is wrong with a file is said once, with its name
    begins, texts, length = [], [], 0
    try:
        for page in pypdf.PdfReader(path).pages:
            text = re.sub(r"[\0\ud800-\udfff]", "\ufffd", page.extract_text())
            begins.append(length)
            texts.append(text)
            length += len(text) + 1
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes the library stumble over
        raise InputError(
            f"{path} cannot be read as PDF: {printable(' '.join(str(error).split()), limit=200)}"
        ) from error
    text = "\n".join(texts)
    if not text.strip():
        raise InputError(f"{path} holds no text; if its pages are pictures, recognize their text first")
    return text, tuple(begins)


# Tables


def _rows(path: Path, columns: list[str]) -> Iterator[Document]:
    """A document a row. A first reading finds errors, and which columns are numbers in every row."""
    named = parse_columns(columns, _TEXT, "text")
    of_text = path.suffix.lower() in (".csv", ".tsv")
    kinds: dict[str, set[type]] = {}
    for number, record in enumerate(read_records(path), 1):
        column = _text_column(path, number, record, named)
        if record.get(column) is not None:
            text_in(record, column, f"{path}, row {number},")
        for name, cell in record.items():
            if name != column and (value := _value(cell, of_text)) is not None:
                kinds.setdefault(name, set()).add(type(value))
    for number, record in enumerate(read_records(path), 1):
        column = _text_column(path, number, record, named)
        text = record.get(column)
        others = {}
        for name, cell in record.items():
            value = _value(cell, of_text) if name != column else None
            if value is not None:
                others[name] = value if len(kinds[name]) == 1 else _as_text(cell)
        if text is not None and text.strip():
            yield Document(text, number, columns=others)


def _text_column(path: Path, number: int, record: Mapping[str, Any], named: dict[str, list[str]]) -> str:
    return choose_columns(list(record), _TEXT, named, f"{path}, row {number},")["text"][0]


def _value(cell: Any, of_text: bool) -> Value:
    """A cell as a value of a column; of .csv a number where it is written as one."""
    if cell is None or cell == "":
        return None
    if of_text and _NUMBER.fullmatch(cell):
        return float(cell) if abs(float(cell)) < _MOST else str(cell)
    if isinstance(cell, bool | str):
        return cell
    if isinstance(cell, int) and abs(cell) >= _MOST:
        return str(cell)
    if isinstance(cell, int | float | decimal.Decimal):
        number = float(cell)
        return number if math.isfinite(number) else None
    return _as_text(cell)


def _as_text(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    return cell.isoformat() if isinstance(cell, datetime.date | datetime.time) else json.dumps(cell, default=str)
