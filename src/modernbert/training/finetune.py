"""A run of fine-tuning from data to a finished folder: `finetune`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modernbert.errors import InputError
from modernbert.io.files import write_text
from modernbert.io.tables import parse_columns
from modernbert.pipelines import pipeline as make_pipeline
from modernbert.pipelines import small_model
from modernbert.training.adapters import add_adapters, has_adapters, merged
from modernbert.training.checkpoints import explained
from modernbert.training.contract import Outcome
from modernbert.training.distributed import end_together, process
from modernbert.training.engine import fit
from modernbert.training.examples import ExampleFeed
from modernbert.training.folder import (
    check_libraries,
    check_unchanged,
    going_on,
    opened,
    read_settings,
    resumed,
    settings_before,
    write_settings,
)
from modernbert.training.precision import products, stored_in
from modernbert.training.progress import Reporter, to_stderr
from modernbert.training.report import write_results
from modernbert.training.schedules import peak_rate
from modernbert.training.tasks.base import Task
from modernbert.training.tasks.catalog import TASKS
from modernbert.training.tasks.data import Row, hold_out, read_tables, rows_of, with_parts
from modernbert.training.tasks.options import OPTIONS, FinetuneOptions

logger = logging.getLogger(__name__)
PREDICTIONS = "predictions.jsonl"
_PIPELINES = {"masked-lm": "fill-mask", "causal-lm": "text-generation"}  # tasks that are served under another name


@dataclasses.dataclass
class Finetuned:
    """A finished run.

    Attributes:
        task: its name.
        model, tokenizer: what was trained, in evaluation mode.
        figures: metrics on the held-out rows; empty without any.
        outcome: steps, seconds, tokens, and the evaluation.
        output: the run's folder, which `from_pretrained` and `pipeline` load.
    """

    task: str
    model: Any
    tokenizer: Any
    figures: dict[str, float]
    outcome: Outcome
    output: Path

    def pipeline(self, **options: Any) -> Any:
        """The finished model, ready for texts; options as of `modernbert.pipeline`."""
        return make_pipeline(_PIPELINES.get(self.task, self.task), str(self.output), **options)


def finetune(
    task: str,
    train: Any = None,
    eval: Any = None,  # noqa: A002
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
        task: such as "text-classification"; `modernbert.training.tasks.options.OPTIONS` has them all.
        train: what to train on: a path or a list of paths, a list of dicts, or a dataset of the `datasets` library.
        eval: what to evaluate on, likewise; if not given, a share of the training rows.
        output: folder of the run. It gets checkpoints, `metrics.jsonl`, `run.yaml`, and at the end the model, its
            tokenizer, `results.json`, `predictions.jsonl` and `report.html`.
        model: folder or Hub repository; if not given, the small encoder or decoder of this package.
        config: a YAML file of options; those that are given here count more.
        resume: go on from the last checkpoint under `output`, with its options.
        progress: draw progress on standard error.
        say: takes a line about what was found in the data; standard error where `progress` is shown, else the log.
        options: the task's; see its class in `modernbert.training.tasks.options`.

    Raises:
        InputError: an option is impossible, data cannot be learnt from, or the folder is in use.
        DivergedError: the loss is no number.
        OSError: a file cannot be read or written.
    """
    if task not in OPTIONS:
        raise InputError(f"task is {task!r}; choose one of {', '.join(OPTIONS)}")
    given = {"train": train, "eval": eval, "output": output, "model": model, **options}
    settings = settings_of(task, {k: v for k, v in given.items() if v is not None}, config, resume)
    if not settings.output:
        raise InputError("output is not given; name a folder for the run")
    folder = Path(settings.output).resolve()
    check_libraries("accelerate", "jinja2", "seqeval", "sklearn")
    where = process(settings)
    if say is None:
        say = to_stderr if progress else logger.info
    with opened(folder, resume) if where.is_main_process else contextlib.nullcontext():
        where.wait_for_everyone()
        if not where.is_main_process:
            say = logger.debug
        changes = going_on(folder, task, settings, say) if resume and where.is_main_process else []
        worker = TASKS[task](settings)
        train_rows, eval_rows, is_held_out = read_rows(worker, train, eval, settings, say)
        name = settings.model or small_model("decoder" if task == "causal-lm" else "encoder")
        # Of rows that were held out here the labels are known; a file of its own may not have others.
        worker.fit_labels([*train_rows, *eval_rows] if is_held_out else train_rows)
        loaded = _loaded(worker, name, settings)
        worker.set_tokenizer(worker.load_tokenizer(name, settings), loaded.config.max_position_embeddings)
        examples = worker.prepare(train_rows, True)
        worker.held_out = worker.prepare(eval_rows, False) if eval_rows else []
        for note in dict.fromkeys((*worker.notes, stored_in(loaded.config.dtype))):
            if note:
                say(note)
        if settings.lr is None:
            settings = dataclasses.replace(settings, lr=peak_rate(settings, loaded))
            layers, width = loaded.config.num_hidden_layers, loaded.config.hidden_size
            say(
                f"learning rate {settings.lr:g}, for {layers} layers of width {width} ({settings.base_lr:g} at base "
                "size, 22 of 768); lr=RATE takes another"
            )
        size = sum(p.numel() for p in loaded.parameters()) / 1e6
        tokens = sum(example.tokens for example in examples)
        say(
            f"{len(examples)} example{'s' * (len(examples) != 1)}, {tokens:,} tokens; "
            f"{len(worker.held_out)} to evaluate on; {size:.2f} M weights; "
            f"products in {products(settings.precision, where.device)}"
        )

        if not examples:
            raise InputError("there is no example to train on")
        feed = ExampleFeed(
            examples,
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            micro_tokens=settings.micro_tokens,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            seed=settings.seed,
        )
        if settings.lora_rank:
            loaded = add_adapters(loaded, settings.lora_rank, settings.lora_alpha)

        def begin() -> None:
            if where.is_main_process:
                write_settings(folder, task, settings, changes)
            where.wait_for_everyone()

        with Reporter(worker.metric, progress and where.is_main_process) as report:
            outcome = fit(loaded, feed, worker, settings, folder, resume=resume, report=report, begin=begin)
        result = Finetuned(task, outcome.model, worker.tokenizer, {}, outcome, folder)
        if outcome.evaluation is not None:
            result.figures = outcome.evaluation.figures
        if where.is_main_process:
            about = {
                "model": settings.model or f"the small {Path(name).name} of this package",
                "parameters": sum(p.numel() for p in outcome.model.parameters()),
                "train_examples": len(examples),
                "eval_examples": len(worker.held_out),
            }
            with explained(folder):
                _finish(result, worker, settings, about, changes)
        end_together(where)
        return result


def settings_of(task: str, given: Mapping[str, Any], config: str | Path | None, resume: bool) -> FinetuneOptions:
    """Options of a file, of the run that goes on, and those given, which count most."""
    named = {} if config is None else read_settings(Path(config), task)
    folder = given.get("output", named.get("output"))
    before = settings_before(folder, task) if resume else {}
    values = resumed(named, before)
    for name, value in given.items():
        if name in ("train", "eval") and not _are_paths(value):
            values[name] = []
        elif name == "labels" and isinstance(value, list | tuple):
            wrong = next((label for label in value if label is None or "," in str(label)), "")
            if wrong != "":
                raise InputError(f"labels holds {wrong!r}; give names without a comma, or a file with one a line")
            values[name] = ",".join(map(str, value))
        elif name == "column" and isinstance(value, Mapping):
            pairs = [(field, [v] if isinstance(v, str) else v) for field, v in value.items()]
            for field, columns in pairs:
                if not isinstance(columns, list | tuple) or not all(isinstance(name, str) for name in columns):
                    raise InputError(f"column has {columns!r} for the field {field!r}; give names of columns")
            values[name] = [f"{field}={','.join(columns)}" for field, columns in pairs]
        elif name in ("train", "eval") or (name in ("output", "model") and isinstance(value, Path)):
            values[name] = [str(v) for v in value] if isinstance(value, list | tuple) else str(value)
        else:
            values[name] = value
    options = OPTIONS[task].of(values, str(config) if config is not None else "the task")
    if folder is not None:
        check_unchanged(Path(folder), before, options, ("train", "eval", "output"))
    return options


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


def _loaded(task: Task, name: str | Path, options: FinetuneOptions) -> Any:
    """The model; what the task lacks is freshly initialised from the seed."""
    import torch

    torch.manual_seed(options.seed)
    return task.load(name, options)


def _finish(
    result: Finetuned, task: Task, options: FinetuneOptions, about: Mapping[str, Any], changes: Sequence[str]
) -> None:
    """Write the finished model and all that is told of it."""
    folder, outcome = result.output, result.outcome
    if has_adapters(result.model):
        task.save(result.model, folder / "adapter")
        result.model = merged(result.model)
    task.save(result.model, folder)
    evaluation = outcome.evaluation
    if evaluation is not None and evaluation.predictions:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.predictions]
        write_text(folder / PREDICTIONS, "".join(lines))
    notes = list(dict.fromkeys((*task.notes, *changes)))
    write_results(folder, result.task, task.metric, outcome, options, about, notes)
