"""A look at an output: are its shards whole, and are its answers those that this machine gives."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modernbert.corpus.contract import Record
from modernbert.corpus.inputs import find_files, read_batches
from modernbert.corpus.keys import AGAIN, KeySet
from modernbert.corpus.lance import TABLE, rows_in
from modernbert.corpus.manifest import MANIFEST, check_format, check_same, errors_in, identity
from modernbert.corpus.output import Output, read_parquet
from modernbert.corpus.plan import columns_of
from modernbert.corpus.results import contents_of
from modernbert.corpus.settings import Key, Settings
from modernbert.corpus.transform import Transform
from modernbert.errors import InputError

_FILES = 8  # files that a sample is taken from, at the most


@dataclasses.dataclass
class VerifyReport:
    """What was found in an output.

    Attributes:
        shards: that the manifest names.
        damaged: those whose file is missing or has another hash, files that no manifest names, and a Lance dataset that
            cannot be opened or has not as many rows as the shards.
        repeated: texts that stand in more than one shard.
        missing: texts that have neither an answer nor an error: those of the sample, or as many as the counts of the
            manifest are short of.
        texts: that were computed anew.
        identical: those whose answer has the same bits.
        wrong: those whose answer has other bits although a machine like this one, with these versions, computed it.
        largest: the largest difference of a number of the others; infinite where something else than a number differs.
        changed: rows of the sample whose text is another one now, or is not there.
        is_sampled: whether any text of the sample could be read again.
        is_same_machine: whether a machine like this one, with these versions, computed all shards of the sample.
    """

    shards: int = 0
    damaged: list[str] = dataclasses.field(default_factory=list)
    repeated: int = 0
    missing: int = 0
    texts: int = 0
    identical: int = 0
    wrong: int = 0
    largest: float = 0.0
    changed: int = 0
    is_sampled: bool = True
    is_same_machine: bool = True

    @property
    def ok(self) -> bool:
        """Whether all is as it was written; bits may differ where another machine or version computed them."""
        is_same = not self.wrong and bool(np.isfinite(self.largest))
        return not (self.damaged or self.repeated or self.missing) and is_same and self.is_sampled


def verify(folder: str | Path, *, sample: int = 64, seed: int = 0, device: Any = None) -> VerifyReport:
    """Check the hash of each shard, and compute a sample of the texts anew, from the files that they came from.

    Args:
        folder: output of a job.
        sample: how many texts are computed; 0 checks hashes alone.
        seed: chooses the sample.
        device: where to compute; by default where the job did.

    Raises:
        InputError: it is no output, its job is not finished, what it knows of its rows is gone, or the model is another
            one now.
    """
    if sample < 0:
        raise InputError(f"sample is {sample}; it must be 0 or more")
    output = Output(str(folder))
    manifest = output.read_json(MANIFEST)
    if not isinstance(manifest, dict) or "made with" not in manifest:
        raise InputError(f"{folder} is no output of a corpus: it has no {MANIFEST}")
    if not manifest.get("is complete"):
        raise InputError(f"the job that writes {folder} is not finished; run it again, and it goes on")
    check_format(manifest, str(folder))
    settings = Settings(**manifest["settings"])
    check_same(manifest, identity(settings, manifest["made with"]["format"]), str(folder))
    if device is not None:
        settings = dataclasses.replace(settings, loading={**settings.loading, "device": device})
    report = VerifyReport(shards=len(manifest["shards"]))
    _check_files(output, manifest, report)
    if sample:
        asked, chosen = _sample(output, manifest, settings, sample, random.Random(seed), report)
        report.is_sampled = bool(chosen)
        _compare(output, manifest, settings, asked, chosen, report)
    return report


def _check_files(output: Output, manifest: Any, report: VerifyReport) -> None:
    shards: dict[str, Record] = manifest["shards"]
    counts, there = manifest.get("counts", {}), 0
    known = KeySet()
    try:
        for name in output.names("data"):
            if name.removesuffix(".parquet") not in shards:
                report.damaged.append(name)
        for name, about in shards.items():
            there += len(errors_in(output, name)) if about["failed"] else 0
            if not about["texts"]:
                continue
            there += about["texts"]
            content = None
            with contextlib.suppress(OSError):  # of a disk that does not give it back
                content = output.read(f"data/{name}.parquet")
            if content is None or about["sha256"] is None or hashlib.sha256(content).hexdigest() != about["sha256"]:
                report.damaged.append(f"{name}.parquet")
                continue
            keys = read_parquet(pa.BufferReader(content), ["key"])["key"].to_pylist()
            report.repeated += sum(how == AGAIN for how in known.meet(keys))
    finally:
        known.close()
    if manifest["made with"]["format"] == "lance":
        report.damaged += [f"{TABLE}.lance"] * ((rows_in(output) or 0) != sum(s["texts"] for s in shards.values()))
    report.missing = max(0, counts.get("texts", 0) + counts.get("failed", 0) - there)


def _sample(
    output: Output, manifest: Any, settings: Settings, count: int, chance: random.Random, report: VerifyReport
) -> tuple[set[Key], dict[Key, tuple[Any, ...]]]:
    """Keys of some rows of some files, and the texts of those that are still there."""
    places = output.names("files")
    chance.shuffle(places)
    asked: set[Key] = set()
    chosen: dict[Key, tuple[Any, ...]] = {}
    taken = 0
    for place in places:
        about = output.read_json(f"files/{place}")
        rows = about["rows"] - about["unreadable"] if isinstance(about, dict) else 0
        if not rows:
            continue
        taken += 1
        wanted = sorted(chance.sample(range(rows), min(rows, -(-count // min(_FILES, len(places))))))
        name = f"rows/{place.removesuffix('.json')}.parquet"
        try:
            with output.open(name) as stream:
                keys = _keys_at(pq.ParquetFile(stream), wanted)
        except (OSError, ValueError, IndexError):
            raise InputError(
                f"{output.path(name)} is not there or damaged; the same command that made the output writes it anew, "
                "and a sample of 0 checks shards alone"
            ) from None
        asked |= set(keys.values())
        chosen |= _read(about["name"], manifest["columns"], settings, keys, report)
        if len(chosen) >= count or taken == _FILES:
            break
    if not asked and manifest["shards"]:
        raise InputError(
            f"{output.path('files')} names no rows; the same command that made the output writes them anew, and a "
            "sample of 0 checks shards alone"
        )
    return asked, dict(list(chosen.items())[:count])


def _keys_at(file: Any, places: list[int]) -> dict[int, Key]:
    """Rows and their keys at places of a file of rows, of which no more is read than the groups that have them."""
    found: dict[int, Key] = {}
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if here := [place - first for place in places if first <= place < first + count]:
            table = file.read_row_group(group, columns=["row", "key"], use_threads=False).take(here)
            found |= dict(zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True))
        first += count
    if len(found) < len(places):
        raise IndexError(f"of {len(places)} rows {len(found)} are there")
    return found


def _read(
    name: str, column: list[str], settings: Settings, keys: dict[int, Key], report: VerifyReport
) -> dict[Key, tuple[Any, ...]]:
    """Texts of rows of a file that still have the keys that they had."""
    found: dict[Key, tuple[Any, ...]] = {}
    left, there = dict(keys), 0
    try:
        (file,) = find_files([name])
        for batch in read_batches(file, settings.form, columns_of(column, settings.form), []):
            for i in [i for i in range(len(batch.rows)) if batch.first + i in left]:
                row, key = batch.rows[i], left.pop(batch.first + i)
                if isinstance(row, tuple) and settings.keys([row])[0] == key:
                    found[key] = row
                    there += 1
            if not left:
                break
    except InputError:
        pass  # they count as changed
    report.changed += len(keys) - there
    return found


def _compare(
    output: Output,
    manifest: Any,
    settings: Settings,
    asked: set[Key],
    chosen: dict[Key, tuple[Any, ...]],
    report: VerifyReport,
) -> None:
    table: Any = None
    machine: Any = None
    here: dict[Key, bytes] = {}
    if chosen:
        transform = Transform(settings)
        columns = dict(zip((f.name for f in settings.form), zip(*chosen.values(), strict=True), strict=True))
        table = transform(
            pa.table({"key": pa.array(list(chosen), pa.binary(32)), **{n: list(v) for n, v in columns.items()}})
        )
        here, machine = dict(contents_of(table)), transform.machine
    missing = set(asked)
    for name, about in manifest["shards"].items():
        if about["failed"]:
            missing -= {bytes.fromhex(error["key"]) for error in errors_in(output, name)}
        if not about["texts"] or f"{name}.parquet" in report.damaged:
            continue
        with output.open(f"data/{name}.parquet") as stream:
            file = pq.ParquetFile(stream)
            keys = file.read(columns=["key"], use_threads=False)["key"].to_pylist()
            missing.difference_update(keys)
            rows = [i for i, key in enumerate(keys) if key in chosen]
            if not rows:
                continue
            stored = file.read(use_threads=False).take(rows)
        is_same_machine = manifest["machines"][about["machine"]] == machine
        report.is_same_machine &= is_same_machine
        for key, content in contents_of(stored):
            report.texts += 1
            report.identical += content == here.get(key)
            if content != here.get(key):
                report.wrong += is_same_machine
                row = table.filter(pa.compute.equal(table["key"], pa.scalar(key, pa.binary(32))))
                before = stored.filter(pa.compute.equal(stored["key"], pa.scalar(key, pa.binary(32))))
                report.largest = max(report.largest, _distance(before, row) if key in here else float("inf"))
    report.missing = max(report.missing, len(missing))


def _distance(before: Any, now: Any) -> float:
    """The largest difference of numbers of one row; infinite where its other values, or its lengths, differ."""
    largest = 0.0
    for name in before.column_names:
        if name in ("key", "tokens", "truncated"):
            continue
        values = [_flat(table[name].combine_chunks()) for table in (before, now)]
        if len(values[0]) != len(values[1]):
            return float("inf")
        if pa.types.is_floating(values[0].type) or pa.types.is_integer(values[0].type):
            one, other = (value.to_numpy(zero_copy_only=False).astype(np.float64) for value in values)
            largest = max(largest, float(np.abs(one - other).max(initial=0)))
        elif not values[0].equals(values[1]):
            return float("inf")
    return largest


def _flat(column: Any) -> Any:
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    return column
