"""A job over a corpus: what is there is kept, what is new is computed, by whichever engine."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modernbert.checks import fields_of, kinds_of, parse_values
from modernbert.corpus.contract import Record, Units, make_engine
from modernbert.corpus.inputs import find_files
from modernbert.corpus.keys import KeySet
from modernbert.corpus.lance import add_shards, check_lance
from modernbert.corpus.manifest import (
    MANIFEST,
    check_format,
    check_same,
    errors_in,
    identity,
    kept,
    keys_of,
    manifest,
    records_of,
    told_in,
    weights_of,
)
from modernbert.corpus.options import CorpusOptions
from modernbert.corpus.output import Output
from modernbert.corpus.plan import Met, Plan, shard_size_of
from modernbert.corpus.progress import Progress
from modernbert.corpus.settings import Settings
from modernbert.corpus.work import RUN, Work
from modernbert.errors import InputError
from modernbert.io.files import locked
from modernbert.pipelines import ALIASES, TASKS, small_model_of, task_of
from modernbert.pipelines.options import OPTIONS

logger = logging.getLogger(__name__)

_LISTED = 10  # reasons in a report
_LOADING = ("device", "dtype", "revision", "adapter", "attn_implementation", "batch_tokens")


@dataclasses.dataclass
class CorpusReport:
    """What a job did, and what its output holds.

    Attributes:
        output: the folder.
        rows: rows of the files that were read.
        unreadable: those without a text.
        duplicates: rows whose text an earlier row had.
        computed: distinct texts that this run computed, those that failed too.
        texts, failed: distinct texts that the output holds an answer for, and those that could not be answered.
        before, failed_before: texts of these that earlier runs answered, and those that one of them told of when it
            ended.
        tokens, truncated: tokens of the answered texts, and how many of these were cut.
        files: that could not be read, with the reason.
        reasons: why rows could not be read and texts of this run could not be answered, some of each.
    """

    output: str
    rows: int
    unreadable: int
    duplicates: int
    computed: int
    before: int
    texts: int
    failed: int
    failed_before: int
    tokens: int
    truncated: int
    files: dict[str, str]
    reasons: list[str]


def run(
    places: str | Path | Sequence[str | Path],
    output: str | Path,
    task: str | None = None,
    model: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> CorpusReport:
    """Answer all texts of files with a task, into a folder of Parquet shards; or go on where an earlier call ended.

    A text is computed once, however often it occurs; a later call over files that changed computes what is new. What
    is computed does not depend on the engine, on the number of processes, on interruptions or on the order of files.

    Args:
        places: folders, globs and files of .parquet, .jsonl, .csv, .tsv and .txt (a text a line), also with .gz, on
            this machine or wherever fsspec reads.
        output: folder, made where missing.
        task: such as "sentence-embedding", the default where neither task nor model is given; otherwise the model's.
        model, tokenizer: folders or Hub repositories, as for `pipeline`.
        progress: tell how far it is, on standard error.
        options: those of `CorpusOptions`; `device`, `dtype`, `revision`, `adapter`, `attn_implementation` and
            `batch_tokens` as for `pipeline`; `query` or `question`, the same for all texts; and those of the task.

    Raises:
        InputError: a place, an option or the output cannot be used; the output was made with another model.
        CorpusError: the job ended early; the same call continues.
    """
    named = [str(place) for place in ([places] if isinstance(places, str | Path) else places)]
    if not named:
        raise InputError("places is empty; give folders, globs or files")
    known = kinds_of(CorpusOptions)
    chosen = CorpusOptions.of({name: options.pop(name) for name in list(options) if name in known}, "a corpus")
    settings = settings_of(task, model, tokenizer, options, chosen.store)
    engine = make_engine(
        chosen.engine, parse_values(chosen.engine_options, "engine_options", "NAME=VALUE, such as processes=2")
    )
    folder = Output(str(output))
    if chosen.format == "lance":
        check_lance(folder)
    files = find_files(named, folder.root)
    with contextlib.ExitStack() as stack:
        if folder.is_local:
            refusal = f"another process writes to {output}; wait for it"
            stack.enter_context(locked(Path(folder.root), refusal))
        made_with = identity(settings, chosen.format)
        before = folder.read_json(MANIFEST)
        has_shards = bool(folder.names("shards"))
        check_format(before, str(output), has_shards)
        if before is not None and has_shards:  # a first try that made none decides nothing
            check_same(before, made_with, str(output))
            if before.get("keep", chosen.keep) != chosen.keep:
                raise InputError(
                    f"keep is {chosen.keep}, and {output} was made with keep={before['keep']}, so its rows would "
                    "differ; give the same columns, or name another output"
                )
        elif before is not None:
            for name in ("rows", "files", "unreadable"):
                folder.remove(name)
        about: dict[str, Any] = {"model": settings.model, "settings": dataclasses.asdict(settings), "inputs": named}
        told = 0 if chosen.retry_failed else told_in(before)
        about |= {"columns": chosen.column, "keep": chosen.keep, "failed before": told}
        folder.write_json(MANIFEST, manifest(made_with, {**about, "is complete": False}, []))
        run = uuid.uuid4().hex
        folder.write_json(RUN, {"run": run})
        folder.tidy()
        records = records_of(folder, chosen.retry_failed)
        told = min(told, sum(record["failed"] for record in records.values()))
        keys = KeySet(Path(folder.root) if folder.is_local else None)
        stack.callback(keys.close)
        for some in keys_of(folder, records):
            keys.add_known(some)
        size = shard_size_of(chosen.shard_size, settings)
        plan = Plan(files, settings, chosen.column, chosen.keep, size, keys, folder)
        teller = stack.enter_context(Progress(folder, plan.met, engine, progress))
        work = Work(settings, folder, run, weights_of(settings))
        units = stack.enter_context(contextlib.closing(Units(plan.units(), plan.stop)))
        for record in stack.enter_context(contextlib.closing(engine.run(units, work))):
            records[record["name"]] = kept(record)
            teller.tell(record)
        if not plan.met.rows:
            raise InputError(next(iter(plan.met.files.values()), f"{', '.join(named)} hold no text"))
        folder.remove("work")
        if chosen.format == "lance":
            add_shards(folder, [name for name, record in records.items() if record["texts"]])
        report = _report(folder, str(output), plan.met, list(records.values()), teller.texts, told)
        about |= {"counts": _counts(report), "is complete": True}
        folder.write_json(MANIFEST, manifest(made_with, about, list(records.values())))
    return report


def settings_of(
    task: str | None, model: Any, tokenizer: Any, options: dict[str, Any], store: str = "float32"
) -> Settings:
    """What is computed, of arguments as `run` has them; raises `InputError` for options that do not exist."""
    if task is None:
        task = "sentence-embedding" if model is None else task_of(model, {})
    task = ALIASES.get(task, task)
    if task not in TASKS:
        raise InputError(f"task is {task!r}; choose one of {', '.join([*TASKS, *ALIASES])}")
    if model is None:
        small_model_of(task)  # there has to be one
    meant = {field.name for field in fields_of(OPTIONS[task]) if field.default is not None}  # where None says something
    rest = {name: value for name, value in options.items() if value is not None or name in meant}
    loading = {name: rest.pop(name) for name in _LOADING if name in rest}
    fixed: dict[str, str] = {name: rest.pop(name) for name in ("query", "question") if name in rest}
    own = kinds_of(OPTIONS[task])
    if unknown := sorted(set(rest) - set(own)):
        raise InputError(f"{task} has no option {', '.join(unknown)}; there are {', '.join(own)}")
    OPTIONS[task].of(rest, task)
    model, tokenizer = (None if given is None else _absolute(given) for given in (model, tokenizer))
    return Settings(task, model, tokenizer, rest, loading, fixed, store)


def _absolute(name: Any) -> str:
    """A folder by its full path, as workers may run elsewhere; a repository as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else str(name)


def _report(folder: Output, output: str, met: Met, records: list[Record], answered: int, told: int) -> CorpusReport:
    sums = {name: sum(record[name] for record in records) for name in ("texts", "failed", "tokens", "truncated")}
    latest = (record for record in reversed(records) if record["failed"])
    lost = (error for record in latest for error in errors_in(folder, record["name"]))
    most = max(0, min(_LISTED, sums["failed"] - told))  # of this run
    reasons = [*met.reasons, *(error["error"] for error in itertools.islice(lost, most))]
    return CorpusReport(
        output,
        met.rows,
        met.unreadable,
        met.duplicates,
        computed=met.new,
        before=sums["texts"] - answered,
        failed_before=told,
        files=dict(met.files),
        reasons=reasons,
        **sums,
    )


def _counts(report: CorpusReport) -> dict[str, int]:
    names = ("rows", "unreadable", "duplicates", "texts", "failed", "tokens", "truncated")
    return {name: getattr(report, name) for name in names}
