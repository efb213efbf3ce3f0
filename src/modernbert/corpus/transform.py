"""One function of a batch, Arrow in and Arrow out, that knows no engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modernbert.corpus.columns import Answers, Json, Label, Labels, Score, Sparse, Tags, Vectors
from modernbert.corpus.machine import machine_of
from modernbert.corpus.settings import Settings
from modernbert.errors import InputError, printable

_LOADED: dict[str, tuple[Any, Answers]] = {}  # models of this process, by settings and files: each is loaded once
_MOST = 2  # models that are kept
_LOADING = threading.Lock()
_LONGEST = 500  # characters of a reason


class Transform:
    """Answers of a batch of texts, as columns; what a pipeline answers in a notebook, bit for bit.

    A copy in another process loads the model there, when it is first called; weights do not travel.

    Args:
        settings: task, model and options.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def pipeline(self) -> Any:
        """The loaded pipeline; one a process for the same settings."""
        return self._loaded()[0]

    @property
    def machine(self) -> dict[str, Any]:
        """What computes, as far as it decides the bits of the numbers, and the prompt before each text."""
        pipeline = self.pipeline
        resolved = pipeline.resolve(pipeline.given(_options(self.settings)))
        return machine_of(pipeline) | {"prompt": getattr(resolved, "prompt", None)}

    @property
    def schema(self) -> Any:
        """The columns that a call adds: `key`, the answer's, `tokens`, `truncated` and `error`."""
        return _schema_of(self._loaded()[1])

    def prepare(self) -> None:
        """Load the model, which the first call does otherwise."""
        self._loaded()

    def __call__(self, batch: Any) -> Any:
        """Answer the rows of a batch.

        Args:
            batch: a `pyarrow.Table` or `RecordBatch` with the task's fields as columns: `text`, for most tasks. A
                column `key` is taken as it is; otherwise it is made.

        Returns:
            A `pyarrow.Table` with the columns of `schema`, and all other columns of the batch after them. A text that
            cannot be answered has its reason in `error`, and nothing in the columns of the answer.

        Raises:
            InputError: the batch lacks a column of the task, or has one that is called like one of the answer's.
        """
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        form = self.settings.form
        missing = [f.name for f in form if f.required and f.name not in table.column_names]
        if missing:
            raise InputError(
                f"a batch has the columns {', '.join(table.column_names) or 'none'} and lacks {', '.join(missing)}"
            )
        fields = [field.name for field in form if field.name in table.column_names]
        pipeline, kind = self._loaded()
        names = list(_schema_of(kind).names)
        if taken := [name for name in table.column_names if name in names and name not in (*fields, "key")]:
            raise InputError(f"a batch has the column {taken[0]}, and so has its answer; rename it")
        rows = list(zip(*(table[name].to_pylist() for name in fields), strict=True))
        if "key" in table.column_names:
            keys = table["key"].cast(pa.binary(32)).combine_chunks()
        else:
            keys = pa.array(self.settings.keys(rows), pa.binary(32))
        columns = [keys, *self._answered(pipeline, kind, [self._item(fields, row) for row in rows])]
        others = [name for name in table.column_names if name not in (*fields, "key")]
        return pa.table(columns + [table[name] for name in others], names=names + others)

    def _item(self, fields: Sequence[str], row: Sequence[Any]) -> Any:
        """What the pipeline takes."""
        values = {name: value for name, value in zip(fields, row, strict=True) if value is not None}
        values = {**self.settings.fixed, **values}
        if self.settings.task == "text-ranking":
            return {"query": values.get("query"), "documents": [values.get("document")]}
        return values.get("text") if set(values) <= {"text"} else values

    def _answered(self, pipeline: Any, kind: Answers, items: list[Any]) -> list[Any]:
        answers: list[Any] = []
        tokens: list[int] = []
        cut: list[bool] = []
        errors: list[str | None] = []
        for count, is_cut, answer in _safely(pipeline, items, _options(self.settings)):
            reason = _reason(answer) if isinstance(answer, Exception) else kind.trouble(answer)
            answers.append(answer if reason is None else None)
            tokens.append(count)
            cut.append(is_cut)
            errors.append(reason)
        rest = [pa.array(tokens, pa.int32()), pa.array(cut, pa.bool_()), pa.array(errors, pa.string())]
        return kind.columns(answers) + rest

    def _loaded(self) -> tuple[Any, Answers]:
        known = self.settings.to_json() + _files_of(self.settings)
        with _LOADING:
            if known not in _LOADED:
                while len(_LOADED) >= _MOST:
                    _LOADED.pop(next(iter(_LOADED)))
                _LOADED[known] = _load(self.settings)
            return _LOADED[known]


def _schema_of(kind: Answers) -> Any:
    own = [pa.field("key", pa.binary(32)), *kind.schema]
    own += [pa.field("tokens", pa.int32()), pa.field("truncated", pa.bool_()), pa.field("error", pa.string())]
    return pa.schema(own)


def _options(settings: Settings) -> dict[str, Any]:
    tensors = {"return_tensors": True} if settings.task == "feature-extraction" else {}
    return {**settings.options, **tensors}


def _files_of(settings: Settings) -> str:
    """Names, sizes and times of the files of a model's folders: another model may be written to the same place."""
    found = []
    for place in (settings.model, settings.tokenizer, settings.loading.get("adapter")):
        folder = Path(str(place))
        if place is not None and folder.is_dir():
            for path in (*folder.iterdir(), *folder.glob("[!.]*/*")):  # parts of a sentence encoder lie one deeper
                with contextlib.suppress(OSError):
                    about = path.stat()
                    found.append((str(path), about.st_size, about.st_mtime_ns) if path.is_file() else ())
    return repr(sorted(filter(None, found)))


def _load(settings: Settings) -> tuple[Any, Answers]:
    """The pipeline, and how its answers are stored."""
    from modernbert.pipelines import pipeline

    made: Any = pipeline(settings.task, settings.model, settings.tokenizer, **settings.loading)
    options = _options(settings)
    made.resolve(made.given(options))  # a wrong option is an error of the job, and not of each text
    return made, _kind(settings, made, options)


def _kind(settings: Settings, pipeline: Any, options: dict[str, Any]) -> Answers:
    task = settings.task
    if task in ("sentence-embedding", "late-interaction", "feature-extraction"):
        probe = np.asarray(pipeline("a", **options))
        return Vectors(probe.shape[-1], probe.ndim > 1, settings.store)
    if task == "sparse-embedding" and options.get("form", "arrays") == "arrays":
        return Sparse()
    if task == "text-classification":
        return Label() if options.get("top_k", "best") == "best" else Labels()
    kinds: dict[str, type[Answers]] = {"zero-shot-classification": Labels, "token-classification": Tags}
    return kinds.get(task, Score if task == "text-ranking" else Json)()


def _safely(pipeline: Any, items: list[Any], options: dict[str, Any]) -> Iterator[tuple[int, bool, Any]]:
    """Tokens of each item, whether it was cut, and its answer or the error that it has instead.

    If a batch breaks where no single text was refused, such as for lack of memory, its texts are tried alone.
    """
    found: list[tuple[int, bool, Any]] = []
    try:
        for job, answer in pipeline.stream_with_jobs(items, **options):
            found.append((sum(len(row.ids) for row in job.rows), job.is_cut, _bare(pipeline, answer)))
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        rest = items[len(found) :]
        if len(items) == 1:
            found.append((0, False, error))
        else:
            for item in rest:
                found += _safely(pipeline, [item], options)
    return iter(found)


def _bare(pipeline: Any, answer: Any) -> Any:
    """An answer's numbers without what stands around them."""
    if pipeline.task == "feature-extraction" and not isinstance(answer, Exception):
        return answer[0].numpy()
    return answer


def _reason(error: Exception) -> str:
    name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return printable(" ".join(f"{name}{error}".split()), limit=_LONGEST)
