"""The report of a run: what it tells, and that its curves are where the numbers are."""

import json
import math
import re

import pytest
import torch

from modernbert.training.chart import Line, centred_mean, draw_lines
from modernbert.training.contract import Evaluation, Outcome
from modernbert.training.report import chance_of, write_results
from modernbert.training.tasks.options import OPTIONS


def written(folder, history, evaluation, task="text-classification", best=None, notes=("a <note>",), **options):
    lines = [
        {"epoch": i / 2, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100 * i, "seconds": float(i), **row}
        for i, row in enumerate(history, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **x}) + "\n" for i, x in enumerate(lines, 1)))
    outcome = Outcome(torch.nn.Linear(2, 2), evaluation, len(lines), best, 4.0, 100 * len(lines))
    chosen = OPTIONS[task].of({"train": ["data/rows.csv"], "output": str(folder), **options}, "the test")
    about = {"model": "some/encoder", "parameters": 4_390_000, "train_examples": 1234, "eval_examples": 6}
    write_results(folder, task, "accuracy", outcome, chosen, about, notes)
    return json.loads((folder / "results.json").read_text()), (folder / "report.html").read_text()


def test_a_drawn_mean_does_not_lag_behind_what_it_is_the_mean_of():
    ramp = [float(i) for i in range(50)]
    assert centred_mean(ramp, 9) == pytest.approx(ramp)  # a mean of earlier steps alone would be behind
    assert centred_mean([1.0, 5.0, 3.0, 7.0], 3) == pytest.approx([1.0, 3.0, 5.0, 7.0])


@pytest.mark.parametrize(
    ("values", "least", "most"),
    [([0.0, 1.0, 2.0], 0, 2), ([5.0, 5.0, 5.0], 2, 8), ([-1e-7, 0.0, 1e-7], -1e-7, 1e-7), ([1e9, 2e9, 3e9], 0, 3e9)],
)
def test_points_of_a_chart_lie_at_their_values(values, least, most):
    svg = draw_lines([1.0, 2.0, 3.0], [Line("loss", values, marked=True)], "step")
    places = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    grid = [float(y) for y in re.findall(r'class="grid" d="M\d+ ([\d.]+)', svg)]
    bottom, top = max(grid), min(grid)
    assert all(top - 0.1 <= y <= bottom + 0.1 for y in places)
    share = [(bottom - y) / (bottom - top) for y in places]
    assert share == pytest.approx([(v - least) / (most - least) for v in values], abs=0.01)


def test_a_chart_leaves_gaps_keeps_peaks_and_is_empty_without_numbers():
    assert draw_lines([1.0, 2.0], [Line("", [math.nan, math.nan])], "step") == ""
    assert draw_lines([1.0], [Line("", [3.0], marked=True)], "step").count("<circle") == 1
    assert (
        len(re.findall("M", draw_lines([1, 2, 3, 4], [Line("", [1.0, math.nan, 2.0, 3.0])], "").split("line0")[1])) == 2
    )
    values = [0.0] * 100_000
    values[77_777] = 9.0
    svg = draw_lines([float(i) for i in range(100_000)], [Line("", values)], "step")
    assert len(svg) < 20_000
    assert min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", svg.split("line0")[1])) < 30


def test_results_and_report_tell_model_rows_date_and_chance(tmp_path):
    confusion = [[3, 1], [0, 2]]
    evaluation = Evaluation({"accuracy": 5 / 6, "matthews": 0.7}, ["yes & no", "maybe"], confusion, [{"text": "<b>"}])
    history = [{"eval_accuracy": 0.5, "eval_matthews": 0.1}, {}, {"eval_accuracy": 5 / 6, "eval_matthews": 0.7}]
    results, page = written(tmp_path, history, evaluation, lr=2e-3)
    assert results["model"] == "some/encoder"
    assert (results["train_examples"], results["eval_examples"]) == (1234, 6)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", results["finished"])
    assert results["chance"] == {"accuracy": 4 / 6, "matthews": 0.0}
    header = page.split("<h2>")[0]
    for said in ("some/encoder, 4.39 M parameters", "1,234 examples", "rows.csv", "3 steps, 1.5 epochs", "UTC"):
        assert said in header
    assert "without a model: 0.6667" in page
    assert "&lt;note&gt;" in page
    assert "yes &amp; no" in page
    assert "<b>" not in page.replace("<b>0", "")
    chosen, left = page.split("<h2>Options</h2>")[1].split("<details>")
    assert "<code>lr</code><span>0.002" in chosen
    assert "<code>seed</code>" in left
    assert "matplotlib" not in page


def test_each_value_of_the_evaluations_stands_under_its_name(tmp_path):
    """The last evaluation may measure more than those before it."""
    more = {"eval_accuracy": 0.5, "eval_top5": 0.9, "eval_loss": 1.5}
    _, page = written(tmp_path, [{"eval_accuracy": 0.25, "eval_loss": 2.5}, more], Evaluation({"accuracy": 0.5}))
    table = page.split("<h2>Evaluations</h2>")[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t", row) for row in table.split("<tr>")[1:]]
    assert rows == [
        ["step", "epoch", "accuracy", "loss"],
        ["1", "0.50", "0.2500", "2.5000"],
        ["2", "1.00", "0.5000", "1.5000"],
    ]


def test_the_header_says_which_weights_were_kept(tmp_path):
    for keep_best, said in ((True, "those of step 1, which had the best"), (False, "those of the last step; step 1")):
        _, page = written(tmp_path, [{}, {}], Evaluation({"accuracy": 0.5}), best=1, keep_best=keep_best)
        assert said in page


def test_a_run_without_evaluation_has_a_report_too(tmp_path):
    results, page = written(tmp_path, [{}], None)
    assert results["chance"] == {}
    assert "There was nothing to evaluate on." in page


@pytest.mark.parametrize(
    ("figures", "chance"),
    [
        ({"accuracy": 0.9, "chance": 0.25}, {"accuracy": 0.25}),
        ({"mrr": 0.9, "chance_mrr": 0.5}, {"mrr": 0.5}),
        ({"mrr": 0.9, "documents": 2.0}, {"recall_at_1": 0.5, "recall_at_10": 1.0, "mrr": 0.75}),
        ({"pearson": 0.9, "mse": 1.0}, {"pearson": 0.0}),
        ({"f1": 0.4}, {}),
    ],
)
def test_chance_is_what_guessing_scores(figures, chance):
    assert chance_of(Evaluation(figures)) == chance


def test_notes_name_options_as_they_are_given_from_python_and_on_the_command_line(tmp_path):
    note = "labels look like single-label; problem=KIND says otherwise"
    results, page = written(tmp_path, [{}], None, notes=[note])
    assert results["notes"] == [note]
    assert "Note: labels look like single-label; problem=KIND (--problem KIND) says otherwise<" in page
