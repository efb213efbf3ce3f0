"""The tables of an index, in LanceDB: one of passages, with vectors, words and columns, and one of files."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from modernbert.errors import InputError, printable, shown
from modernbert.indexing.documents import Document
from modernbert.indexing.options import STEMMED, UNSPACED
from modernbert.io.tables.reading import library

_AN_HOUR = datetime.timedelta(hours=1)


class Passage(NamedTuple):
    """A passage of a document: its number there, its characters, and its vector."""

    path: str
    document: Document
    number: int
    start: int
    end: int
    vector: Any


class Store:
    """Passages and files of an index.

    Every change of a table is whole or not at all. A file is among the files once all its passages are stored; a
    document's passages have names of their own, so that one that is stored again replaces itself.

    Args:
        folder: of the index.
        dimensions: of a vector.
        similarity: how vectors are compared, one of `METRICS`.
        language: of the words.
    """

    METRICS: ClassVar[dict[str, str]] = {"cosine": "cosine", "dot": "dot", "euclidean": "l2"}
    OWN: ClassVar[tuple[str, ...]] = ("id", "path", "row", "page", "start", "end", "text", "digest", "vector")

    def __init__(self, folder: Path, dimensions: int, similarity: str, language: str) -> None:
        os.environ.setdefault("LANCE_LOG", "error")
        self.metric = self.METRICS[similarity]
        lancedb = library("lancedb", folder, "search")
        self.arrow = pa = library("pyarrow", folder, "search")
        fields = [("id", pa.string()), ("path", pa.string()), ("row", pa.int64()), ("page", pa.int64())]
        fields += [("start", pa.int64()), ("end", pa.int64()), ("text", pa.string()), ("digest", pa.string())]
        fields.append(("vector", pa.list_(pa.float32(), dimensions)))
        database = lancedb.connect(str(folder), read_consistency_interval=datetime.timedelta(0))
        files = pa.schema([("path", pa.string()), ("digest", pa.string())])
        self.passages, self.of_files = (
            database.open_table(name)
            if any((folder / f"{name}.lance" / "_versions").glob("*.manifest"))
            else database.create_table(name, schema=schema)
            for name, schema in (("passages", pa.schema(fields)), ("files", files))
        )
        if not self.passages.list_indices():
            self.passages.create_index("text", config=_words_of(language))
        self.columns = {field.name: field.type for field in self.passages.schema}

    # What is there

    def files(self) -> dict[str, str]:
        """The digest of each file that is stored whole."""
        table = self.of_files.to_arrow()
        return dict(zip(table["path"].to_pylist(), table["digest"].to_pylist(), strict=True))

    def begun(self) -> set[str]:
        """Files of which passages are stored."""
        return set(self.passages.search().select(["path"]).to_arrow()["path"].unique().to_pylist())

    def rows(self, path: str) -> dict[int, str]:
        """The digest of each row of a file that is stored."""
        query = self.passages.search().where(f"path = {_quoted(path)}").select(["row", "digest"])
        table = query.to_arrow()
        return dict(zip(table["row"].to_pylist(), table["digest"].to_pylist(), strict=True))

    def count(self) -> int:
        """The number of passages."""
        return int(self.passages.count_rows())

    # Changes

    def put(self, passages: Sequence[Passage], replaced: Sequence[tuple[str, int]]) -> None:
        """Store passages in one step, instead of all that is stored of these rows of files."""
        table = self.arrow.Table.from_pylist(list(map(_record, passages)), schema=self.passages.schema)
        rows: dict[str, list[int]] = {}
        for path, row in replaced:
            rows.setdefault(path, []).append(row)
        old = " OR ".join(f"({_rows(path, some)})" for path, some in rows.items())
        if passages and old:
            merge = self.passages.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.when_not_matched_by_source_delete(old).execute(table)
        elif passages:
            self.passages.add(table)
        elif old:
            self.passages.delete(old)

    def finish(self, files: Mapping[str, tuple[str, Collection[int]]]) -> None:
        """Note that files are stored whole: of each its digest, and rows that it has no more."""
        for path, (_, stale) in files.items():
            if stale:
                self.passages.delete(_rows(path, stale))
        if files:
            table = self.arrow.table({"path": list(files), "digest": [digest for digest, _ in files.values()]})
            merge = self.of_files.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(table)

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, their passages first."""
        if paths:
            these = f"path IN ({', '.join(map(_quoted, paths))})"
            self.passages.delete(these)
            self.of_files.delete(these)

    def tidy(self) -> None:
        """Bring the index of words up to date, join small files, and free what old versions held."""
        self.passages.optimize(cleanup_older_than=_AN_HOUR)
        self.of_files.optimize(cleanup_older_than=_AN_HOUR)

    def check_columns(self, path: str, document: Document) -> None:
        """Make the columns of a row where they are missing; raises `InputError` for one of another type."""
        pa = self.arrow
        kinds = {str: pa.string(), float: pa.float64(), bool: pa.bool_()}
        new: dict[str, Any] = {}
        for name, value in document.columns.items():
            column, kind = _column(name), kinds[type(value)]
            known = self.columns.get(column) or new.setdefault(column, kind)
            if known != kind:
                raise InputError(f"{path} has {shown(value)} in the column {name!r}; in the index it is of {known}")
        if new:
            self.passages.add_columns([pa.field(column, kind) for column, kind in new.items()])
            self.columns |= new

    # Searches

    def nearest(self, vector: Any, count: int, where: str | None) -> list[dict[str, Any]]:
        """The passages of the nearest vectors, each compared; the nearest first."""
        query = self.passages.search(vector, vector_column_name="vector").distance_type(self.metric)
        rows = self._found(query.bypass_vector_index(), count, where, "_distance")
        for row in rows:
            row["score"] = 1 - row["score"] if self.metric != "l2" else -row["score"]
        return rows

    def with_words(self, question: str, count: int, where: str | None) -> list[dict[str, Any]]:
        """The passages that have words of the question, by BM25; the best first."""
        query = self.passages.search(question, query_type="fts", fts_columns="text")
        return self._found(query, count, where, "_score")

    def _found(self, query: Any, count: int, where: str | None, score: str) -> list[dict[str, Any]]:
        names = [name for name in self.passages.schema.names if name not in ("vector", "digest")]
        if where is not None:
            query = query.where(where, prefilter=True)
        try:
            rows: list[dict[str, Any]] = query.limit(count).select([*names, score]).to_list()
        except (ValueError, RuntimeError) as error:
            if where is None:
                raise
            reason = re.sub(r", /\S+:\d+(:\d+)?", "", " ".join(str(error).split()))
            reason = re.sub(r"^(Invalid input, |Schema error: |Invalid user input: )+", "", reason)
            raise InputError(f"where is {shown(where)}: {printable(reason, limit=300)}") from None
        for row in rows:
            row["score"] = row.pop(score)
        return rows


def _quoted(text: str) -> str:
    """A text in SQL."""
    return "'" + text.replace("'", "''") + "'"


def _column(name: str) -> str:
    """A row's column in the table: letters, digits and underscores, and none of the table's own."""
    column = re.sub(r"\W", "_", name) or "_"
    return f"{column}_" if column.lower() in (*Store.OWN, "score") or column[0] == "_" else column


def _rows(path: str, rows: Collection[int]) -> str:
    """The passages of rows of a file, in SQL."""
    return f"path = {_quoted(path)} AND row IN ({', '.join(map(str, sorted(rows)))})"


def _record(one: Passage) -> dict[str, Any]:
    document = one.document
    page = sum(begin <= one.start for begin in document.pages) or None
    place = {"path": one.path, "row": document.row, "page": page, "start": one.start, "end": one.end}
    content = {"text": document.text[one.start : one.end], "digest": document.digest, "vector": one.vector}
    columns = {_column(name): value for name, value in document.columns.items()}
    return {"id": f"{one.path}\n{document.row}\n{one.number}", **place, **content, **columns}


def _words_of(language: str) -> Any:
    """How words are told apart and compared."""
    index = library("lancedb.index", Path("an index"), "search")
    if language in UNSPACED:
        pairs = {"base_tokenizer": "ngram", "ngram_min_length": 2, "ngram_max_length": 2}
        return index.FTS(stem=False, remove_stop_words=False, **pairs)
    known = language in STEMMED
    return index.FTS(language=STEMMED.get(language, "English"), stem=known, remove_stop_words=known)
