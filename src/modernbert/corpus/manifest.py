"""What is written beside the shards: what they were made with, how many there are, and their hashes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modernbert.corpus.contract import Record
from modernbert.corpus.output import CorpusError, Output, read_parquet
from modernbert.corpus.settings import Key, Settings
from modernbert.errors import InputError, printable
from modernbert.io.checkpoint import weight_files
from modernbert.io.files import parse_json
from modernbert.io.fingerprint import contents, weight
from modernbert.io.hub import Source
from modernbert.io.tables.writing import differences
from modernbert.models.sentence_layout import contents_of
from modernbert.pipelines import small_model_of

MANIFEST = "manifest.json"
_FORMAT = 1
_RECORD = {"name", "texts", "failed", "tokens", "truncated", "sha256", "bytes", "machine"}


def identity(settings: Settings, form: str) -> dict[str, Any]:
    """What has to be the same for all shards of an output: the model by the hashes of its files, task and options.

    Args:
        settings: what is computed.
        form: of the output.

    Raises:
        NotFoundError, CheckpointError: the model cannot be found.
    """
    loading = settings.loading
    model = settings.model or str(small_model_of(settings.task))
    found: dict[str, Any] = {
        "task": settings.task,
        "options": dict(settings.options),
        "fixed": dict(settings.fixed),
        "store": settings.store,
        "format": form,
        "dtype": loading.get("dtype"),
        "attention": loading.get("attn_implementation"),
        "the model's files": _files(Source(model, loading.get("revision"))),
    }
    others = {"tokenizer": settings.tokenizer, "adapter": loading.get("adapter")}
    return found | {f"the {name}'s files": _files(Source(place)) for name, place in others.items() if place}


def weights_of(settings: Settings) -> int:
    """Bytes of the weights, as they are stored, once `identity` has found them."""
    source = Source(settings.model or str(small_model_of(settings.task)), settings.loading.get("revision"))
    base = source.base_of_adapter()
    return weight(source) + (0 if base is None else weight(base))


def _files(source: Source) -> dict[str, str]:
    if source.folder is None and not source.is_adapter:  # have the Hub's files here
        weight_files(source.inside(contents_of(source).inner))
        source.find("tokenizer.json")
    base = source.base_of_adapter()
    files = {} if base is None else {f"base: {name}": found for name, found in contents(base).items()}
    return files | contents(source)


def check_format(before: Mapping[str, Any] | None, place: str, has_shards: bool = False) -> None:
    """Raise `InputError` where a manifest is of no corpus, or of another format, or is missing where shards are."""
    if before is None:
        if has_shards:
            raise InputError(
                f"{place} has shards, and {MANIFEST} is missing or damaged, so nobody knows which model made them; put "
                "it back, or name another output"
            )
        return
    if before.get("manifest") != _FORMAT or not isinstance(before.get("made with"), dict):
        raise InputError(f"{place}/{MANIFEST} is of no corpus of format {_FORMAT}; name another output")


def told_in(before: Mapping[str, Any] | None) -> int:
    """How many texts have no answer of which a run that came to its end has told."""
    if before is None:
        return 0
    told = before.get("counts", {}).get("failed") if before.get("is complete") else before.get("failed before")
    return told if isinstance(told, int) else 0


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], place: str) -> None:
    """Refuse to add shards to an output that was made with something else; `InputError` says what differs."""
    plain = json.loads(json.dumps(now))
    if before["made with"] != plain:
        changed = differences(before["made with"], plain)
        raise InputError(
            f"{place} was made with something else: {changed}; vectors of two kinds do not go together, so name "
            "another output"
        )


def records_of(output: Output, without_failed: bool = False) -> dict[str, Record]:
    """Records of the shards that are finished, by their names; what is left of others is removed.

    Args:
        output: of the job.
        without_failed: forget the texts that failed, so that they are tried again.
    """
    found: dict[str, Record] = {}
    there = {name.removesuffix(".parquet"): size for name, size in output.sizes("data").items()}
    for file in output.names("shards"):
        record = output.read_json(f"shards/{file}")
        name = file.removesuffix(".json")
        is_whole = isinstance(record, dict) and record.keys() >= _RECORD and record["name"] == name
        if is_whole and record["failed"] and (without_failed or len(errors_in(output, name)) != record["failed"]):
            record["failed"] = 0
            output.write_json(f"shards/{file}", record)
        if is_whole and _is_there(record, there):
            found[name] = kept(record)
        else:
            output.remove(f"shards/{file}")
    for name in set(there) - set(found):
        output.remove(f"data/{name}.parquet")
    for file in output.names("errors"):
        if not found.get(file.removesuffix(".jsonl"), {"failed": 0})["failed"]:
            output.remove(f"errors/{file}")
    output.remove("work")
    return found


def _is_there(record: Record, sizes: Mapping[str, int | None]) -> bool:
    """Whether a record's shard is as long as it was written; a torn one is computed again."""
    if not record["texts"]:
        return bool(record["failed"])
    return record["name"] in sizes and sizes[record["name"]] in (None, record["bytes"])


_MACHINES: dict[str, Any] = {}


def kept(record: Record) -> Record:
    """A record that is held in memory with all others: what many have in common is there once."""
    machine = record["machine"]
    return record | {"machine": _MACHINES.setdefault(json.dumps(machine), machine)}


def keys_of(output: Output, records: Mapping[str, Record]) -> Iterator[list[Key]]:
    """Keys of the texts of finished shards, those that failed too, shard by shard."""
    for name, record in records.items():
        if record["texts"]:
            try:
                with output.open(f"data/{name}.parquet") as stream:
                    keys = read_parquet(stream, ["key"])["key"].to_pylist()
            except (ValueError, OSError) as error:
                path, why = output.path(f"data/{name}.parquet"), printable(" ".join(str(error).split()), limit=200)
                raise CorpusError(
                    f"{path} is damaged ({why}); delete it, and the same call computes it again"
                ) from error
            yield keys
        if record["failed"]:
            yield [bytes.fromhex(error["key"]) for error in errors_in(output, name)]


def errors_in(output: Output, name: str) -> list[dict[str, Any]]:
    """The texts of a shard that could not be answered: keys and reasons, as far as the file is whole."""
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for line in (output.read(f"errors/{name}.jsonl") or b"").splitlines():
            about = parse_json(line)
            bytes.fromhex(about["key"])
            found.append({"key": about["key"], "error": about["error"]})
    return found


def manifest(made_with: Mapping[str, Any], about: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """The manifest of an output."""
    machines: list[Any] = []
    shards: dict[str, Any] = {}
    for record in sorted(records, key=lambda record: record["name"]):
        if record["machine"] not in machines:
            machines.append(record["machine"])
        shards[record["name"]] = {
            "sha256": record["sha256"],
            **{name: record[name] for name in ("texts", "failed", "bytes")},
            "machine": machines.index(record["machine"]),
        }
    return {"manifest": _FORMAT, "made with": made_with, **about, "machines": machines, "shards": shards}
