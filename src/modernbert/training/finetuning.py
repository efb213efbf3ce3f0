"""A run of fine-tuning from data to a finished folder: `finetune`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from modernbert.errors import InputError
from modernbert.io.files import write_text
from modernbert.io.tables import parse_columns
from modernbert.models.adapters import merge_adapters
from modernbert.pipelines import pipeline as make_pipeline
from modernbert.pipelines import small_model
from modernbert.training.adapters import add_adapters, complete, has_adapters, merged
from modernbert.training.examples import ExampleFeed
from modernbert.training.model import products, stored_in
from modernbert.training.run import Finished, started
from modernbert.training.schedules import peak_rate
from modernbert.training.tasks.base import Task
from modernbert.training.tasks.catalog import TASKS
from modernbert.training.tasks.data import Row, hold_out, read_tables, rows_of, with_parts
from modernbert.training.tasks.distillation import add_teacher_scores
from modernbert.training.tasks.options import OPTIONS, DistillationOptions, FinetuneOptions

PREDICTIONS = "predictions.jsonl"
_PIPELINES = {"masked-lm": "fill-mask", "causal-lm": "text-generation"}  # tasks that are served under another name


@dataclasses.dataclass(kw_only=True)
class Finetuned(Finished):
    """A finished run of a task."""

    task: str

    def pipeline(self, **options: Any) -> Any:
        """The finished model, ready for texts; options are those of `modernbert.pipeline`."""
        return make_pipeline(_PIPELINES.get(self.task, self.task), str(self.output), **options)


def finetune(
    task: str,
    train: Any = None,
    eval: Any = None,  # noqa: A002 (as the option is called everywhere)
    output: str | Path | None = None,
    *,
    model: str | Path | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Finetuned:
    """Fine-tune a model for a task.

    Args:
        task: "text-classification", "token-classification", "question-answering", "multiple-choice", "masked-lm",
            "causal-lm", "sentence-embedding", "text-ranking", "late-interaction" or "sparse-embedding".
        train: what to train on: a path or a list of paths, a list of dicts, or a dataset of the `datasets` library.
        eval: what to evaluate on, likewise; if not given, a share of the training rows.
        output: folder of the run. It gets checkpoints, `metrics.jsonl`, `run.yaml`, and at the end the model, its
            tokenizer, `results.json`, `predictions.jsonl` and `report.html`.
        model: folder or Hub repository; if not given, the small encoder or decoder of this package.
        config: a YAML file of options; arguments override it.
        resume: continue from the last checkpoint under `output`, with its options.
        progress: draw progress on standard error.
        say: called with each line about the run; by default they are printed with `progress`, and logged without it.
        options: the task's, such as `epochs=3`; `modernbert finetune TASK --help` describes them, as flags.

    Raises:
        InputError: an option is impossible, the data is unsuitable, or the folder is in use.
        DivergedError: the loss is NaN or infinite.
        OSError: a file cannot be read or written.
    """
    if task not in OPTIONS:
        raise InputError(f"task is {task!r}; choose one of {', '.join(OPTIONS)}")
    given = _as_options({"train": train, "eval": eval, "output": output, "model": model, **options})
    with started(
        task, OPTIONS[task], given, config, resume=resume, progress=progress, say=say,
        free=("train", "eval", "output"), libraries=("seqeval", "sklearn"),
    ) as run:  # fmt: skip
        worker = TASKS[task](run.options)
        train_rows, eval_rows, is_held_out = read_rows(worker, train, eval, run.options, run.say)
        name = run.options.model or small_model("decoder" if task == "causal-lm" else "encoder")
        # Rows that were held out here have known labels; a file to evaluate on may not have others.
        worker.fit_labels([*train_rows, *eval_rows] if is_held_out else train_rows)
        torch.manual_seed(run.options.seed)  # of what the task needs and the checkpoint lacks
        loaded = worker.load(name, run.options)
        merge_adapters(loaded)
        worker.set_tokenizer(worker.load_tokenizer(name, run.options), loaded.config.max_position_embeddings)
        if isinstance(run.options, DistillationOptions) and run.options.teacher is not None:
            add_teacher_scores(train_rows, worker.ranked, run.options, run.folder, run.process, run.say)
        examples = worker.prepare(train_rows, True)
        worker.held_out = worker.prepare(eval_rows, False) if eval_rows else []
        for note in dict.fromkeys((*worker.notes, stored_in(loaded.config.stored_dtype))):
            if note:
                run.say(note)
        if run.options.lr is None:
            run.options = dataclasses.replace(run.options, lr=peak_rate(run.options, loaded))
            layers, width = loaded.config.num_hidden_layers, loaded.config.hidden_size
            run.say(
                f"learning rate {run.options.lr:g}, for {layers} layers of width {width} ({run.options.base_lr:g} at "
                "base size, 22 layers of 768); lr=RATE sets another"
            )
        size = sum(p.numel() for p in loaded.parameters()) / 1e6
        tokens = sum(example.tokens for example in examples)
        run.say(
            f"{len(examples)} example{'s' * (len(examples) != 1)}, {tokens:,} tokens; "
            f"{len(worker.held_out)} to evaluate on; {size:.2f} M weights; "
            f"products in {products(run.options.precision, run.process.device)}"
        )
        if not examples:
            raise InputError("there is no example to train on")
        if run.options.lora_rank:
            loaded = add_adapters(loaded, run.options.lora_rank, run.options.lora_alpha)
        outcome = run.fit(loaded, ExampleFeed(examples, run.options), worker)
        about = {
            "model": run.options.model or f"the small {Path(name).name} of this package",
            "parameters": sum(p.numel() for p in outcome.model.parameters()),
            "train_examples": len(examples),
            "eval_examples": len(worker.held_out),
        }
        result = Finetuned(
            task=task, model=outcome.model, tokenizer=worker.tokenizer, outcome=outcome, output=run.folder
        )
        run.finish(outcome, worker.metric, lambda: _save(result, worker), about, worker.notes)
        return result


def _as_options(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments in the form of options: no rows that are in memory; lists and mappings as a command line has them."""
    for name in ("train", "eval"):
        if given[name] is not None and not _are_paths(given[name]):
            given[name] = []
    labels, column = given.get("labels"), given.get("column")
    if isinstance(weights := given.get("class_weights"), Mapping):
        given["class_weights"] = [f"{label}={weight}" for label, weight in weights.items()]
    if isinstance(labels, list | tuple):
        wrong = next((label for label in labels if label is None or "," in str(label)), "")
        if wrong != "":
            raise InputError(f"labels holds {wrong!r}; give names without a comma, or a file with one a line")
        given["labels"] = ",".join(map(str, labels))
    if isinstance(column, Mapping):
        pairs = {field: [names] if isinstance(names, str) else names for field, names in column.items()}
        for field, names in pairs.items():
            if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
                raise InputError(f"column has {names!r} for the field {field!r}; give names of columns")
        given["column"] = [f"{field}={','.join(names)}" for field, names in pairs.items()]
    return given


def _are_paths(value: Any) -> bool:
    several = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(v, str | Path) for v in several)


def read_rows(
    task: Task, train: Any, evaluation: Any, options: FinetuneOptions, say: Callable[[str], None]
) -> tuple[list[Row], list[Row], bool]:
    """Rows to train on, rows to evaluate on, and whether these were held out of one source."""
    train = options.train if train is None or _are_paths(train) else train
    evaluation = options.eval if evaluation is None or _are_paths(evaluation) else evaluation
    if isinstance(train, list) and not train:
        raise InputError("train is not given; name a file to train on")
    train, evaluation, chosen = with_parts(train, evaluation)
    if chosen:
        say(chosen)
    header = None if options.header is None else [name.strip() for name in options.header.split(",")]
    named = parse_columns(options.column, task.fields)
    rows, columns = rows_of(read_tables(train, header), task.fields, named)
    say("columns: " + ", ".join(f"{field} = {'+'.join(names)}" for field, names in columns.items()))
    if evaluation is None or (isinstance(evaluation, list) and not evaluation):
        rows, held = hold_out(rows, options.held_out, options.group_by, task.group_field)
        if held:
            verb = "is" if len(held) == 1 else "are"
            say(f"{len(held)} of the {len(rows) + len(held)} rows {verb} held out to evaluate on")
        return rows, held, True
    held, _ = rows_of(read_tables(evaluation, header), task.fields, named)
    return rows, held, False


def _save(result: Finetuned, task: Task) -> None:
    """Write the finished model, adapters by themselves and merged, and what it predicts on the held-out rows."""
    folder, evaluation = result.output, result.outcome.evaluation
    if has_adapters(result.model):
        task.save(result.model, folder / "adapter")
        result.model = merged(result.model)
        complete(folder / "adapter", result.model)
    task.save(result.model, folder)
    if evaluation is not None and evaluation.predictions:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.predictions]
        write_text(folder / PREDICTIONS, "".join(lines))
