"""A run's report: one HTML page that needs nothing else, with curves, figures, errors and the configuration."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from modernbert.files import write_text
from modernbert.training.contract import Evaluation, Outcome
from modernbert.training.folder import METRICS, RESULTS
from modernbert.training.options import TrainingOptions
from modernbert.training.progress import duration

_CONFUSIONS = 25  # pairs of classes that are listed
_MATRIX = 20  # classes that a whole matrix has room for


def write_results(
    folder: Path,
    task: str,
    metric: str,
    outcome: Outcome,
    options: TrainingOptions,
    seconds: float,
    notes: Sequence[str] = (),
) -> None:
    """Write `results.json` and `report.html` of a finished run.

    Args:
        folder: of the run, with its `metrics.jsonl`.
        task: its name.
        metric: the figure that checkpoints were compared by.
        outcome: what `fit` returned.
        options: the run's.
        seconds: that it took in all.
        notes: lines about the data.
    """
    results = {
        "task": task,
        "metric": metric,
        "figures": {} if outcome.evaluation is None else outcome.evaluation.figures,
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "stopped": outcome.stopped,
        "train_seconds": round(outcome.seconds, 2),
        "wall_seconds": round(seconds, 2),
        "tokens": outcome.tokens,
        "tokens_per_second": round(outcome.tokens / outcome.seconds, 1) if outcome.seconds else None,
        "notes": list(notes),
    }
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    write_report(folder, task, results, dataclasses.asdict(options), outcome.evaluation)


def write_report(
    folder: Path, task: str, results: dict[str, Any], options: dict[str, Any], evaluation: Evaluation | None
) -> Path:
    """Write `report.html` of a run.

    Args:
        folder: of the run, with its `metrics.jsonl`.
        task: its name.
        results: what `results.json` holds.
        options: all of the run's.
        evaluation: the last one.
    """
    import jinja2

    template = (files("modernbert.training") / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    page = environment.from_string(template).render(
        title=f"{task}: {folder.name}",
        results=results,
        parts=_by_part(results["figures"]),
        duration=duration,
        curves=[figure for figure in _curves(history) if figure],
        evaluations=[row for row in history if any(name.startswith("eval_") for name in row)],
        options=options,
        errors=[] if evaluation is None else evaluation.errors,
        **_confusion(evaluation),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _by_part(figures: dict[str, float]) -> dict[str, dict[str, float]]:
    """Figures of parts of the data, "metric/part", by part."""
    parts: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        metric, found, part = name.partition("/")
        if found:
            parts.setdefault(part, {})[metric] = value
    return parts


def _curves(history: list[dict[str, Any]]) -> list[str]:
    """SVG pictures of loss, learning rate, speed, and the evaluations' figures."""
    if not history:
        return []
    steps = [row["step"] for row in history]
    judged = [row for row in history if any(name.startswith("eval_") for name in row)]
    losses = _column(history, "loss")
    pictures = [
        _picture("training loss", steps, {"each step": losses, "mean": _smooth(losses)}),
        _picture("learning rate", steps, {"": _column(history, "lr")}),
        _picture("norm of the gradients", steps, {"": _column(history, "grad_norm")}),
        _picture("real tokens a second", steps, {"": _column(history, "tokens_per_second")}),
    ]
    names = [name for name in (judged[0] if judged else {}) if name.startswith("eval_")]
    whole = [name for name in names if "/" not in name]
    shares = [name for name in whole if all(0 <= row.get(name, 2) <= 1 for row in judged)]
    groups = [("evaluation", shares)]
    for name in whole:  # with what it is of each part of the data
        parts = [part for part in names if part.startswith(f"{name}/")]
        if parts or name not in shares:
            groups.append((name.removeprefix("eval_"), [name, *parts]))
    for title, group in groups:
        if group and len(judged) > 1:
            lines = {name.removeprefix("eval_").rpartition("/")[2]: _column(judged, name) for name in group}
            pictures.append(_picture(title, [row["step"] for row in judged], lines, marker="o"))
    return pictures


def _column(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [float(row.get(name, "nan")) for row in rows]


def _smooth(values: list[float]) -> list[float]:
    """A running mean that forgets over a twentieth of the run."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    out, mean = [], values[0]
    for value in values:
        mean = keep * mean + (1 - keep) * value
        out.append(mean)
    return out


def _picture(title: str, steps: list[int], lines: dict[str, list[float]], marker: str = "") -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(lines.items()):
        faint = name == "each step"
        axes.plot(
            steps, values, label=name, linewidth=0.8 if faint else 1.6, alpha=0.35 if faint else 1.0, marker=marker,
            markersize=3, color="#1d4ed8" if len(lines) == 1 or "each step" in lines else f"C{i}",
        )  # fmt: skip
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(fontsize=7, frameon=False)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL)


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
