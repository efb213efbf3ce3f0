"""What a worker does with a unit: compute it, write its shard, and leave word of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modernbert.corpus.contract import Record, Unit
from modernbert.corpus.output import CorpusError, Output
from modernbert.corpus.settings import Settings
from modernbert.corpus.transform import Transform

RUN = "run.json"  # the run that writes to an output
_PLAIN_ATTEMPTS = 2  # before a unit is computed in steps
_STEP = 64  # texts that are computed together then
_LAST = 20  # the attempt that computes nothing more


def unit_of(table: Any) -> Unit:
    """A unit of a table with keys."""
    whole = hashlib.sha256()
    for key in table["key"].to_pylist():
        whole.update(key)
    return Unit(f"part-{whole.hexdigest()[:24]}", table)


class Work:
    """Computes units and writes their shards; a copy of it lives in each worker.

    A unit whose worker died is given to another worker as it was. `work/NAME.json` in the output says how often it was
    begun and what was computed when it ended: the third time it is computed in steps of a few texts, and then texts of
    the step that ended the worker alone, so that the text that does it is found, and becomes an error like others.

    Args:
        settings: what is computed.
        output: where shards are written.
        run: name of the run that this is for. A worker that outlives its run writes nothing into the next one's output.
        weights: bytes of the model's weights, by which an engine shares cores out; 0 where they are not known.
    """

    def __init__(self, settings: Settings, output: Output, run: str, weights: int = 0) -> None:
        self.transform, self.output, self.run, self.weights = Transform(settings), output, run, weights

    @property
    def device(self) -> str | None:
        """Where models compute, as it was given."""
        given = self.transform.settings.loading.get("device")
        return None if given is None else str(given)

    def prepare(self) -> None:
        """Load the model, which the first call does otherwise; raises what a call raises for it."""
        self.transform.prepare()

    def __call__(self, unit: Unit) -> Record:
        """Compute a unit and write its shard, whole or not at all.

        Raises:
            CorpusError: the shard cannot be written.
            InputError, CheckpointError, ...: the model cannot be loaded.
        """
        begun = time.perf_counter()
        done = self.output.read_json(f"shards/{unit.name}.json")
        if isinstance(done, dict):  # its worker died between writing and telling
            return done
        self.prepare()  # before the attempt counts
        found = self._computed(unit)
        is_there = found["error"].is_null()
        answers, failed = found.filter(is_there), found.filter(pa.compute.invert(is_there))
        record: Record = {
            "name": unit.name,
            "texts": answers.num_rows,
            "failed": failed.num_rows,
            "tokens": int(pa.compute.sum(answers["tokens"]).as_py() or 0),
            "truncated": int(pa.compute.sum(answers["truncated"]).as_py() or 0),
            "sha256": None,
            "bytes": 0,
            "machine": self.transform.machine,
        }
        if (self.output.read_json(RUN) or {}).get("run") != self.run:
            raise CorpusError(f"another run writes to {self.output.place} now; this one ends")
        if answers.num_rows:
            content = self._parquet(answers.drop_columns(["error"]))
            record |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            self.output.write(f"data/{unit.name}.parquet", content)
        if failed.num_rows:
            pairs = zip(failed["key"].to_pylist(), failed["error"].to_pylist(), strict=True)
            lines = "".join(json.dumps({"key": key.hex(), "error": error}) + "\n" for key, error in pairs)
            self.output.write(f"errors/{unit.name}.jsonl", lines.encode())
        record["seconds"] = round(time.perf_counter() - begun, 3)
        self.output.write_json(f"shards/{unit.name}.json", record)
        self.output.remove(f"work/{unit.name}.json")
        return record

    def _parquet(self, table: Any) -> memoryview:
        sink = pa.BufferOutputStream()
        numbers = [name for name in table.column_names if name in ("key", "vector", "vectors", "scale")]
        compression = {name: "none" if name in numbers else "zstd" for name in _leaves(table.schema)}
        pq.write_table(table, sink, compression=compression, use_dictionary=False, write_statistics=["key"])
        return memoryview(sink.getvalue())

    # A unit that ended its workers

    def _computed(self, unit: Unit) -> Any:
        note = f"work/{unit.name}.json"
        known = self.output.read_json(note)
        state: dict[str, Any] = (
            known if isinstance(known, dict) else {"attempts": 0, "bad": [], "suspects": [], "now": []}
        )
        now = state.pop("now", [])
        state["attempts"] += 1
        if len(now) == 1:
            state["bad"] += now
        else:
            state["suspects"] += now
        self.output.write_json(note, {**state, "now": []})
        if state["attempts"] <= _PLAIN_ATTEMPTS:
            return self.transform(unit.table)
        rows = list(range(unit.table.num_rows))
        bad, suspects = set(state["bad"]), set(state["suspects"])
        if state["attempts"] >= _LAST:
            return self._refused(unit.table)
        others = [row for row in rows if row not in bad and row not in suspects]
        steps = [others[i : i + _STEP] for i in range(0, len(others), _STEP)]
        steps += [[row] for row in sorted(suspects - bad)]
        parts = [self._refused(unit.table.take(sorted(bad)))] if bad else []
        for step in steps:
            self.output.write_json(note, {**state, "now": step})
            parts.append(self.transform(unit.table.take(step)))
        order = [row for step in ([sorted(bad)] if bad else []) + steps for row in step]
        place = {row: i for i, row in enumerate(order)}
        return pa.concat_tables(parts).take([place[row] for row in rows])

    def _refused(self, table: Any) -> Any:
        """Errors for all texts of a table."""
        reason = "its worker ended while it was computed, each time; the memory may not be enough for it"
        schema, count = self.transform.schema, table.num_rows
        columns = {name: pa.nulls(count, schema.field(name).type) for name in schema.names}
        columns |= {"key": table["key"], "error": pa.array([reason] * count)}
        return pa.table([columns[name] for name in schema.names], schema=schema)


def _leaves(schema: Any) -> Sequence[str]:
    """Paths of a schema's columns of values, as Parquet names them."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema):
        pass
    described = pq.read_metadata(pa.BufferReader(sink.getvalue())).schema
    return [described.column(i).path for i in range(len(described))]
