"""The answers of an output as a Lance dataset beside its shards, for searches."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from modernbert.corpus.output import CorpusError, Output, read_parquet
from modernbert.errors import InputError
from modernbert.io.tables.reading import library

TABLE = "corpus"  # the dataset is the folder corpus.lance
_NOTE = "lance.json"  # which shards are in it, and which were being added when a run ended
_TOGETHER, _BYTES = 16, 256 * 2**20  # shards that are added in one version of the dataset, and their bytes, about
_AN_HOUR = datetime.timedelta(hours=1)


def check_lance(output: Output) -> None:
    """Raise `InputError` if a Lance dataset cannot be written there."""
    if not output.is_local:
        raise InputError(f"a Lance dataset is written to a folder of this machine, and not to {output.place}")
    library("lancedb", Path(output.root), "search")


def add_shards(output: Output, names: Iterable[str]) -> int:
    """Add the shards that the dataset does not hold yet; gives the number of its rows.

    An interruption adds nothing twice: keys that were being added are compared first. So are all keys where shards
    that were added are not there any more, as texts of theirs were computed again into others. A dataset that is gone
    is made anew.

    Raises:
        CorpusError: the dataset cannot be written.
    """
    os.environ.setdefault("LANCE_LOG", "error")
    lancedb = library("lancedb", Path(output.root), "search")
    database = lancedb.connect(output.root)
    note = output.read_json(_NOTE) or {"shards": [], "adding": []}
    is_made = any(Path(output.root, f"{TABLE}.lance", "_versions").glob("*.manifest"))
    table = database.open_table(TABLE) if is_made else None
    there, doubtful = (set(note["shards"]), set(note["adding"])) if is_made else (set(), set())
    names = list(names)
    gone = (there | doubtful).difference(names)
    try:
        for some in _together(output, [name for name in names if name not in there]):
            output.write_json(_NOTE, {"shards": sorted(there), "adding": sorted({*some, *doubtful & gone})})
            rows = pa.concat_tables([_read(output, name) for name in some])
            if table is None:
                table = database.create_table(TABLE, rows)
            elif gone or doubtful.intersection(some):
                table.merge_insert("key").when_not_matched_insert_all().execute(rows)
            else:
                table.add(rows)
            there |= set(some)
            output.write_json(_NOTE, {"shards": sorted(there), "adding": sorted(doubtful & gone)})
        if gone:
            output.write_json(_NOTE, {"shards": sorted(there.intersection(names)), "adding": []})
        if table is not None:
            table.optimize(cleanup_older_than=_AN_HOUR)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(
            f"the dataset {output.root}/{TABLE}.lance cannot be written: {' '.join(str(error).split())[:300]}; all "
            "shards are there, and the same call continues"
        ) from error
    return 0 if table is None else int(table.count_rows())


def rows_in(output: Output) -> int | None:
    """How many rows the dataset has; None where it cannot be opened."""
    os.environ.setdefault("LANCE_LOG", "error")
    lancedb = library("lancedb", Path(output.root), "search")
    try:
        return int(lancedb.connect(output.root).open_table(TABLE).count_rows())
    except (OSError, RuntimeError, ValueError):
        return None


def _together(output: Output, names: Iterable[str]) -> Iterator[list[str]]:
    sizes = output.sizes("data")
    some: list[str] = []
    held = 0
    for name in names:
        size = sizes.get(f"{name}.parquet") or 0
        if some and (len(some) == _TOGETHER or held + size > _BYTES):
            yield some
            some, held = [], 0
        some.append(name)
        held += size
    if some:
        yield some


def _read(output: Output, name: str) -> pa.Table:
    with output.open(f"data/{name}.parquet") as stream:
        return read_parquet(stream)
