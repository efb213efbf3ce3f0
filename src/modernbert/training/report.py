"""A run's report: one HTML page that needs nothing else, with what was trained, curves, metrics, errors and options."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modernbert import __version__
from modernbert.io.files import write_text
from modernbert.tools.page import page
from modernbert.training.chart import Line, centred_mean, draw_lines
from modernbert.training.contract import Evaluation, Outcome
from modernbert.training.folder import METRICS, RESULTS
from modernbert.training.options import TrainingOptions
from modernbert.training.progress import duration

_CONFUSIONS = 25  # pairs of classes that are listed
_MATRIX = 20  # classes that a whole matrix has room for
# Metrics in words, for readers who did not choose them.
_MEANINGS = {
    "accuracy": "share that is right",
    "f1_macro": "F1 of each class, their mean",
    "f1_micro": "F1 of all labels together",
    "matthews": "correlation with the labels; 1 is perfect",
    "exact": "rows with every label right",
    "average_precision": "precision over all thresholds, mean of the labels",
    "pearson": "correlation with the values; 1 is perfect",
    "spearman": "correlation of the ranks; 1 is perfect",
    "mse": "mean squared error; lower is better",
    "mae": "mean absolute error; lower is better",
    "f1": "harmonic mean of precision and recall",
    "precision": "share of what was found that is right",
    "recall": "share of what is right that was found",
    "exact_match": "% of answers that match word for word",
    "recall_at_1": "queries whose right document comes first",
    "recall_at_10": "queries whose right document is among the first 10",
    "mrr": "mean of 1 / rank of the right document",
    "documents": "to search among",
    "chance": "accuracy of guessing",
    "chance_mrr": "mrr of a random order",
    "loss": "cross-entropy a token; lower is better",
    "perplexity": "exp(loss); lower is better",
    "bits_per_byte": "bits to tell a byte of text; lower is better",
    "top5": "right token among the first 5",
}


def write_results(
    folder: Path,
    task: str,
    metric: str,
    outcome: Outcome,
    options: TrainingOptions,
    about: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> None:
    """Write `results.json` and `report.html` of a finished run.

    Args:
        folder: of the run, with its `metrics.jsonl`.
        task: its name.
        metric: the metric that checkpoints were compared by.
        outcome: what `fit` returned.
        options: the run's.
        about: what was trained and on what: `model`, its name; `parameters`; `train_examples`, `eval_examples`.
        notes: lines about the data.
    """
    evaluation = outcome.evaluation
    results = {
        "task": task,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modernbert": __version__,
        "torch": torch.__version__,
        "device": str(next(outcome.model.parameters()).device),
        "threads": torch.get_num_threads(),
        **about,
        "metric": metric,
        "figures": {} if evaluation is None else evaluation.metrics,
        "chance": {} if evaluation is None else chance_of(evaluation),
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "stopped": outcome.stopped,
        "train_seconds": round(outcome.seconds, 2),
        "wall_seconds": round(outcome.wall_seconds, 2),
        "tokens": outcome.tokens,
        "tokens_per_second": round(outcome.tokens / outcome.seconds, 1) if outcome.seconds else None,
        "notes": list(notes),
    }
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    write_text(folder / "report.html", _page(folder, task, results, options, evaluation))


def chance_of(evaluation: Evaluation) -> dict[str, float]:
    """Metrics without a model: of always giving the most frequent class, of guessing, or of a random order."""
    metrics, found = evaluation.metrics, {}
    total = sum(map(sum, evaluation.confusion))
    if "accuracy" in metrics and total:
        found["accuracy"] = max(map(sum, evaluation.confusion)) / total
    for name, of in (("chance", "accuracy"), ("chance_mrr", "mrr")):
        if name in metrics:
            found[of] = metrics[name]
    if number := round(metrics.get("documents", 0)):
        found |= {"recall_at_1": 1 / number, "recall_at_10": min(1.0, 10 / number)}
        found["mrr"] = sum(1 / rank for rank in range(1, number + 1)) / number
    return found | {name: 0.0 for name in ("matthews", "pearson", "spearman") if name in metrics}


def _page(
    folder: Path, task: str, results: dict[str, Any], options: TrainingOptions, evaluation: Evaluation | None
) -> str:
    import jinja2

    template = (files("modernbert.training") / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"], environment.filters["spelled"] = _number, _spelled
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    evaluations = [row for row in history if any(name.startswith("eval_") for name in row)]
    first = evaluations[0] if evaluations else {}
    chosen, left = _options(options)
    title = f"{task}: {folder.name}"
    content = environment.from_string(template).render(
        title=title,
        results=results,
        about=_about(results, history, options),
        meaning=_meaning,
        parts=_by_part(results["figures"]),
        charts=_charts(history, evaluations),
        evaluations=evaluations,
        evaluated=[name for name in first if name.startswith("eval_") and "/" not in name],
        chosen=chosen,
        left=left,
        errors=[] if evaluation is None else evaluation.errors,
        **_confusion(evaluation),
    )
    return page(title, content)


def _about(results: dict[str, Any], history: list[dict[str, Any]], options: TrainingOptions) -> dict[str, str]:
    """The lines of the header: model, data, steps, time and machine."""
    lines: dict[str, str] = {}
    if "model" in results:
        lines["Model"] = f"{results['model']}, {results['parameters'] / 1e6:.2f} M parameters"
    if "train_examples" in results:
        sources = getattr(options, "train", None) or getattr(options, "data", None) or []
        named = f" ({', '.join(Path(source).name for source in sources)})" if sources else ""
        held = results["eval_examples"]
        lines["Data"] = f"{results['train_examples']:,} examples to train on{named}, " + (
            f"{held:,} others to evaluate on" if held else "none to evaluate on"
        )
    speed = results["tokens_per_second"]
    lines["Training"] = (
        f"{_counted(results['steps'], 'step')}"
        + (f", {_counted(round(history[-1]['epoch'], 2), 'epoch')}" if history else "")
        + f", {results['tokens']:,} tokens in {duration(results['train_seconds'])}"
        + (f", {speed:,.0f} tokens a second" if speed else "")
        + (f"; stopped early: {results['stopped']}" if results["stopped"] else "")
    )
    if best := results["best_step"]:
        lines["Weights kept"] = (
            f"those of step {best}, which had the best evaluation"
            if options.keep_best
            else f"those of the last step; step {best} had the best evaluation"
        )
    threads = f", {_counted(results['threads'], 'thread')}" if results["device"] == "cpu" else ""
    when = results["finished"].replace("T", " ").removesuffix("+00:00")
    versions = f"modernbert {results['modernbert']}, PyTorch {results['torch']}"
    lines["Finished"] = f"{when} UTC, on {results['device']}{threads}, {versions}"
    return lines


def _counted(number: float, what: str) -> str:
    return f"{number:,g} {what}" + ("" if number == 1 else "s")


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 else f"{value:.4g}"


def _spelled(note: str) -> str:
    """A note with its options in both forms, `name=VALUE` of Python and `--name VALUE` of the command line."""
    return re.sub(r"\b([a-z_]+)=([A-Z]+)\b", lambda n: f"{n[0]} (--{n[1].replace('_', '-')} {n[2]})", note)


def _meaning(name: str) -> str:
    """The meaning of a metric, "_64" at its end included: of vectors that were cut to 64 dimensions."""
    cut = None if name in _MEANINGS else re.fullmatch(r"(.+)_(\d+)", name)
    return f"{_MEANINGS.get(cut[1], '')}; first {cut[2]} dimensions" if cut else _MEANINGS.get(name, "")


def _options(options: TrainingOptions) -> tuple[dict[str, str], dict[str, str]]:
    """Options that were chosen, and those that were left at their defaults."""
    chosen: dict[str, str] = {}
    left: dict[str, str] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        (left if value == default else chosen)[field.name] = "not set" if value is None or not text else text
    return chosen, left


def _by_part(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """Metrics of parts of the data, "metric/part", by part."""
    parts: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        metric, found, part = name.partition("/")
        if found:
            parts.setdefault(part, {})[metric] = value
    return parts


class _Chart(NamedTuple):
    title: str
    lines: list[Line]
    svg: str


def _charts(history: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[_Chart]:
    """Loss, learning rate, speed, and the evaluations' metrics over the steps."""
    if not history:
        return []
    width = max(1, len(history) // 20) | 1
    ended, done = [0.0, *_column(history, "seconds")], [0.0, *_column(history, "tokens")]
    speeds = [(done[i + 1] - done[i]) / max(ended[i + 1] - ended[i], 1e-9) for i in range(len(history))]
    of_steps = {
        "Training loss": _with_mean(_column(history, "loss"), width),
        "Training speed, tokens a second": _with_mean(speeds, width),
        "Norm of the gradients": _with_mean(_column(history, "grad_norm"), width),
        "Learning rate": [Line("", _column(history, "lr"))],
    }
    of_evaluations: dict[str, list[Line]] = {}
    if len(evaluations) > 1:
        names = [name for name in evaluations[0] if name.startswith("eval_")]
        whole = [name for name in names if "/" not in name]
        shares = [name for name in whole if all(0 <= row.get(name, 2) <= 1 for row in evaluations)]
        groups = {"Held out": shares} if shares else {}
        for name in whole:  # with its values for each part of the data
            parts = [part for part in names if part.startswith(f"{name}/")]
            if parts or name not in shares:
                groups[f"Held out: {name.removeprefix('eval_')}"] = [name, *parts]
        for title, group in groups.items():
            of_evaluations[title] = [
                Line(name.removeprefix("eval_").rpartition("/")[2], _column(evaluations, name), f"line{i % 8}", True)
                for i, name in enumerate(group)
            ]
    charts = [
        _Chart(title, lines, draw_lines(_column(rows, "step"), lines, "step"))
        for rows, titled in ((history, of_steps), (evaluations, of_evaluations))
        for title, lines in titled.items()
    ]
    return [chart for chart in charts if chart.svg]


def _with_mean(values: list[float], width: int) -> list[Line]:
    """Each step's value and, without a lag, the mean of the steps before and after."""
    if width == 1:
        return [Line("", values)]
    return [Line("each step", values, "faint"), Line(f"mean of {width} steps", centred_mean(values, width))]


def _column(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [float(row.get(name, "nan")) for row in rows]


def _confusion(evaluation: Evaluation | None) -> dict[str, Any]:
    """The matrix of a few classes, and the pairs that are confused most of any number."""
    if evaluation is None or not evaluation.confusion:
        return {"classes": [], "matrix": [], "confused": []}
    names, counts = evaluation.classes, evaluation.confusion
    pairs: list[dict[str, Any]] = [
        {"label": names[i], "predicted": names[j], "count": counts[i][j], "of": sum(counts[i])}
        for i in range(len(names))
        for j in range(len(names))
        if i != j and counts[i][j]
    ]
    pairs.sort(key=lambda pair: pair["count"], reverse=True)
    small = len(names) <= _MATRIX
    matrix = [[(n, round(100 * n / (sum(row) or 1))) for n in row] for row in counts] if small else []
    return {"classes": names if small else [], "matrix": matrix, "confused": pairs[:_CONFUSIONS]}
