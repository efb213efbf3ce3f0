"""Whole runs: what they write, killed and resumed ones, diverged ones, and folders they may not touch."""

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from typer.main import get_command

import modernbert
from modernbert import (
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    OnePass,
    Tokenizer,
    finetune,
    pipeline,
)
from modernbert.auto import load_as_saved
from modernbert.cli import app
from modernbert.errors import DivergedError, InputError
from modernbert.training.checkpoints import checkpoints, recover, write_checkpoint
from modernbert.training.folder import METRICS, append_metrics
from modernbert.training.schedules import default_rate
from modernbert.training.tasks.catalog import TASKS
from tests.commands import called, files_of_at_most
from tests.training.runs import PROGRAM, TWO_PROCESSES, assert_close_by_name, finish, history, wait_for_steps
from tests.training.tasks.conftest import TASK_ROWS, mood_rows, text_rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def moods(tmp_path):
    return written(tmp_path / "moods.jsonl", mood_rows())


# What a model of the task is asked, where that is more than a text.
INPUTS = {
    "question-answering": {"question": "which animal", "context": "the cat sat on the mat"},
    "multiple-choice": {"prompt": "the cat", "choices": ["sat", "ran"]},
    "masked-lm": "the [MASK] sat",
    "text-ranking": {"query": "q cat", "documents": ["the cat", "a dog"]},
}


@pytest.mark.parametrize("task", list(TASKS))
def test_each_task_runs_learns_and_is_served(task, base, tmp_path):
    rows, kind, changes = TASK_ROWS[task]
    data = rows(24 if rows is text_rows else 60)
    folder = tmp_path / "run"
    run = finetune(
        task, data, output=folder, model=base(kind, **changes), epochs=4, lr=3e-3, batch_size=8, progress=False,
        held_out=0.2,
    )  # fmt: skip
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "run.yaml"} <= names
    assert {"results.json", "report.html"} <= names
    losses = [row["loss"] for row in history(folder)]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert run.metrics
    assert json.loads((folder / "results.json").read_text())["figures"] == run.metrics == run.figures
    predicted = folder / "predictions.jsonl"
    if task not in ("masked-lm", "causal-lm"):
        assert len(predicted.read_text().splitlines()) >= 12
    assert run.pipeline()(INPUTS.get(task, "the cat")) is not None


def test_a_learnable_task_is_learnt_and_labels_are_saved(base, tmp_path, moods):
    run = finetune(
        "text-classification", moods, output=tmp_path / "run", model=base(), epochs=24, lr=5e-3, batch_size=8,
        progress=False, held_out=0.25,
    )  # fmt: skip
    assert run.metrics["accuracy"] >= 0.9
    answer = pipeline("text-classification", str(tmp_path / "run"))("the bird flew sad")
    assert answer[0]["label"] == "sad"
    assert run.model.config.id2label == {0: "calm", 1: "happy", 2: "sad"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") >= 5
    assert "Which classes are confused" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "src=" not in page


def test_a_finished_folder_is_transformers_too_and_goes_on_with_its_own_labels(base, tmp_path, moods):
    import transformers

    options = {"max_steps": 6, "batch_size": 8, "progress": False}
    run = finetune("text-classification", moods, output=tmp_path / "run", model=base(), lr=1e-3, **options)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    x = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(run.model(x).logits, peer(x).logits, rtol=1e-4, atol=1e-5)
    assert peer.config.id2label == {0: "calm", 1: "happy", 2: "sad"}
    two = [{"text": "the cat", "label": label} for label in ("sad", "calm", "sad", "calm")]
    again = finetune(
        "text-classification", two, output=tmp_path / "two", model=tmp_path / "run", held_out=0.0, **options
    )
    assert again.model.config.id2label == {0: "calm", 1: "happy", 2: "sad"}


@pytest.mark.parametrize(("task", "labels"), [("text-classification", 3), ("text-ranking", 1)])
def test_decoders_learn_what_they_have_a_head_for(task, labels, base, tmp_path):
    rows = TASK_ROWS[task][0](40)
    folder = base("ModernBertDecoderForSequenceClassification", num_labels=labels)
    run = finetune(task, rows, output=tmp_path / "run", model=folder, max_steps=6, batch_size=8, progress=False)
    assert run.pipeline()(INPUTS.get(task, "the cat"))
    with pytest.raises(ValueError, match="no model for model_type 'modernbert-decoder'"):
        finetune("token-classification", TASK_ROWS["token-classification"][0](), output=tmp_path / "x", model=folder,
                 progress=False)  # fmt: skip


WAYS = {
    "tokens a step": {"batch_tokens": 90, "micro_tokens": 50},
    "frozen below": {"freeze_layers": 1, "layer_decay": 0.8, "schedule": "wsd"},
    "orthogonal steps": {"optimizer": "muon", "weight_decay": 0.1},
    "weights of classes": {"class_weights": {"sad": 3.5}, "micro_tokens": 60},
    "without clipping": {"max_grad_norm": 0, "gradient_checkpointing": True, "schedule": "constant"},
}


@pytest.mark.parametrize("way", list(WAYS))
def test_other_ways_to_train(way, base, tmp_path, moods):
    folder = base("ModernBertForSequenceClassification", num_labels=3)
    # All rows in each step: its loss says whether the model learns.
    plain = {"model": folder, "max_steps": 12, "lr": 3e-3, "batch_size": 48, "held_out": 0.0, "progress": False}
    finetune("text-classification", moods, output=tmp_path / "run", **{**plain, **WAYS[way]})
    rows = history(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"] or way == "tokens a step"
    if way == "tokens a step":
        steps = [b["tokens"] - a["tokens"] for a, b in itertools.pairwise(rows)]
        assert max(steps) <= 90


def test_the_best_weights_are_kept_and_a_run_stops_early(base, tmp_path, moods, monkeypatch):
    """Evaluations get worse after the second."""
    values = iter([0.5, 0.9, 0.8, 0.7, 0.6, 0.5])
    evaluate_on = TASKS["text-classification"].evaluate_on

    def falling(self, model, examples):
        found = evaluate_on(self, model, examples)
        found.metrics["accuracy"] = next(values)
        return found

    monkeypatch.setattr(TASKS["text-classification"], "evaluate_on", falling)
    run = finetune(
        "text-classification", moods, output=tmp_path / "run", model=base(), max_steps=20, eval_every=2, patience=2,
        batch_size=8, lr=1e-2, progress=False,
    )  # fmt: skip
    assert run.outcome.best_step == 4
    assert run.outcome.steps == 8
    assert "no better accuracy in 2 evaluations" in run.outcome.stopped
    best = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    assert best.read_bytes() == (tmp_path / "run" / "model.safetensors").read_bytes()


COMMAND = [
    "finetune", "text-classification", "--max-steps", "60", "--eval-every", "7", "--batch-size", "8", "--lr", "3e-3",
    "--micro-tokens", "40", "--seed", "5", "--optimizer", "stableadamw", "--weight-decay", "0.01",
]  # fmt: skip


def with_options(command, **options):
    """A command with other values of options that it has."""
    changed = list(command)
    for name, value in options.items():
        changed[changed.index(f"--{name.replace('_', '-')}") + 1] = str(value)
    return changed


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_bit_for_bit(base, tmp_path, moods, capsys):
    """Killed at two random moments, with dropout, accumulation and the best checkpoint kept."""
    folder = base("ModernBertForMaskedLM", mlp_dropout=0.1, classifier_dropout=0.2)
    command = [*COMMAND, "--model", str(folder), "--train", str(moods), "--output"]
    assert called(capsys, *command, tmp_path / "whole")[0] == 0
    rng, killed = random.Random(time.time_ns()), 0
    for _ in range(2):
        before = len(history(tmp_path / "killed"))
        process = subprocess.Popen(
            [*PROGRAM, *command, tmp_path / "killed", "--resume"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        wait_for_steps(process, tmp_path / "killed", before + rng.randint(1, 20))
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 1
    assert called(capsys, *command, tmp_path / "killed", "--resume")[0] == 0
    for name in ("model.safetensors", "config.json", "predictions.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    histories = [history(tmp_path / name) for name in ("whole", "killed")]
    assert [row["step"] for row in histories[1]] == list(range(1, 61))
    assert [row["loss"] for row in histories[0]] == [row["loss"] for row in histories[1]]


def test_adapters_are_trained_resumed_saved_and_merged(base, tmp_path, moods):
    import peft

    folder = base("ModernBertForSequenceClassification", num_labels=3)
    options = {"model": folder, "lora_rank": 4, "lr": 5e-3, "batch_size": 8, "progress": False, "eval_every": 4}
    options |= {"schedule": "constant", "warmup": 0.0, "keep_best": False}
    part = finetune("text-classification", moods, output=tmp_path / "part", max_steps=8, **options)
    run = finetune("text-classification", moods, output=tmp_path / "run", max_steps=16, **options)
    again = finetune("text-classification", moods, output=tmp_path / "part", max_steps=16, resume=True, **options)
    assert part.outcome.steps == 8
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    plain = ModernBertForSequenceClassification.from_pretrained(folder, num_labels=3)
    same = dict(plain.named_parameters())
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, same[name])}
    assert "model.embeddings.tok_embeddings.weight" not in moved
    assert {"model.layers.0.attn.Wqkv.weight", "model.layers.2.mlp.Wo.weight", "classifier.weight"} <= moved
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()
    x = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(adapted(input_ids=x).logits, run.model(x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("text-classification", "ModernBertForSequenceClassification"),
        ("token-classification", "ModernBertForTokenClassification"),
        ("causal-lm", "ModernBertDecoderForCausalLM"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_run_leaves_adapters_that_peft_loads_onto_transformers_models_and_we_onto_ours(task, kind, base, tmp_path):
    import peft
    import transformers

    rows, _, changes = TASK_ROWS[task]
    folder = base(kind, **changes)
    run = finetune(
        task, rows(20), output=tmp_path / "run", model=folder, lora_rank=3, max_steps=6, lr=0.05, progress=False
    )
    adapter = tmp_path / "run" / "adapter"
    more = {} if task == "causal-lm" else {"num_labels": run.model.config.num_labels, "ignore_mismatched_sizes": True}
    plain = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager", **more)
    theirs = peft.PeftModel.from_pretrained(plain, adapter).eval()
    x = torch.randint(3, 96, (2, 9))
    with torch.no_grad():
        wanted = run.model(x).logits
        torch.testing.assert_close(theirs(input_ids=x).logits, wanted, rtol=1e-4, atol=1e-4)
        ours = load_as_saved(adapter)
        assert type(ours) is type(run.model)
        assert ours.config.id2label == run.model.config.id2label
        for model in (ours, getattr(modernbert, kind).from_pretrained(folder, adapter=adapter)):
            torch.testing.assert_close(model(x).logits, wanted, rtol=1e-4, atol=1e-4)
    more = finetune(task, rows(20), output=tmp_path / "more", model=adapter, max_steps=1, lr=1e-9, progress=False)
    with torch.no_grad():  # what goes on from an adapter goes on from the merged model
        torch.testing.assert_close(more.model(x).logits, wanted, rtol=1e-4, atol=1e-3)
    serve = modernbert.pipeline(model=adapter, dtype="float32")
    assert serve.task == {"causal-lm": "text-generation"}.get(task, task)
    if task != "causal-lm":
        text = "the cat sat"
        named = [[one.get("label", one.get("entity")) for one in of(text)] for of in (serve, run.pipeline())]
        assert named[0] == named[1]


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_a_sentence_encoder_are_a_folder_for_sentence_transformers(base, tmp_path):
    from sentence_transformers import SentenceTransformer

    rows, kind, changes = TASK_ROWS["sentence-embedding"]
    options = {"lora_rank": 3, "max_steps": 4, "lr": 0.05, "progress": False}
    run = finetune("sentence-embedding", rows(20), output=tmp_path / "run", model=base(kind, **changes), **options)
    texts = ["the cat sat", "a dog ran far"]
    wanted = run.pipeline(dtype="float32")(texts)
    ours = pipeline(model=tmp_path / "run" / "adapter", dtype="float32")
    assert ours.task == "sentence-embedding"
    np.testing.assert_allclose(ours(texts), wanted, rtol=0, atol=1e-5)
    theirs = SentenceTransformer(str(tmp_path / "run" / "adapter"), device="cpu")
    np.testing.assert_allclose(theirs.encode(texts), wanted, rtol=0, atol=1e-5)
    plain = pipeline("sentence-embedding", base(kind, **changes), dtype="float32")(texts)
    assert np.abs(plain - wanted).max() > 1e-3
    theirs.save_pretrained(str(tmp_path / "again"))
    np.testing.assert_allclose(pipeline(model=tmp_path / "again", dtype="float32")(texts), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", list(TASKS))
def test_adapters_serve_every_task(task, base, tmp_path):
    rows, kind, changes = TASK_ROWS[task]
    options = {"lora_rank": 3, "max_steps": 3, "batch_size": 4, "progress": False, "gradient_checkpointing": True}
    run = finetune(
        task, rows(20), output=tmp_path / "run", model=base(kind, **changes), optimizer="muon",
        freeze_layers=1, **options,
    )  # fmt: skip
    assert run.metrics
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert not any("lora" in name for name in run.model.state_dict())


def test_models_trained_on_one_frozen_encoder_answer_from_one_pass(base, tmp_path, capsys, moods):
    folder = base("ModernBertForMaskedLM")
    options = {"max_steps": 2, "batch_size": 4, "progress": False, "freeze_layers": "all"}
    rows = {task: TASK_ROWS[task][0] for task in ("token-classification", "late-interaction", "sentence-embedding")}
    tasks = ("token-classification", "late-interaction")
    for task in tasks:
        finetune(task, rows[task](8), output=tmp_path / task, model=folder, **options)
    few = [*with_options(COMMAND, max_steps=2), "--freeze-layers", "all"]
    code, _, err = called(
        capsys, *few, "--model", folder, "--train", moods, "--output", tmp_path / "text-classification"
    )
    assert code == 0, err
    places = {task: tmp_path / task for task in (*tasks, "text-classification")} | {"fill-mask": folder}
    one = OnePass(places)
    assert len({id(serve.model) for serve in one.pipelines.values()}) == len(places)
    trained = ModernBertForTokenClassification.from_pretrained(tmp_path / tasks[0]).head.dense.weight
    assert not torch.equal(trained, ModernBertForMaskedLM.from_pretrained(folder).head.dense.weight)
    text = "the day was lovely [MASK]"
    for task, place in places.items():
        wanted, got = pipeline(task, place)([text]), one([text])[task]
        assert str(got) == str(wanted)
    with pytest.raises(InputError, match="every parameter is frozen, by freeze_layers"):
        finetune(
            "sentence-embedding", rows["sentence-embedding"](8), output=tmp_path / "nothing", model=folder, **options
        )


def test_two_processes_train_as_one(base, tmp_path, moods, capsys):
    folder = base("ModernBertForSequenceClassification", num_labels=3)
    few = with_options(COMMAND, max_steps=12)
    common = [*few, "--model", folder, "--train", moods, "--precision", "float32", "--device", "cpu"]
    common += ["--class-weights", "sad=3.5", "--output"]
    assert called(capsys, *common, tmp_path / "one")[0] == 0
    finish([*TWO_PROCESSES, "modernbert"], *common, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert_close_by_name(two, one, 1e-4)


def test_a_loss_that_is_no_number_stops_the_run(base, tmp_path, moods, monkeypatch):
    losses, calls = TASKS["text-classification"].losses, []

    def breaking(self, model, batches, total, one_pass):
        calls.append(1)
        found = losses(self, model, batches, total, one_pass)
        return found * float("nan") if len(calls) == 7 else found

    monkeypatch.setattr(TASKS["text-classification"], "losses", breaking)
    options = {"model": base(), "batch_size": 4, "progress": False, "save_every": 2, "eval_every": 50}
    with pytest.raises(DivergedError, match=r"loss is nan at step 7; .*checkpoint-6\..*examples: '.*' and 1 more"):
        finetune("text-classification", moods, output=tmp_path / "run", max_steps=20, **options)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-6"]
    monkeypatch.undo()
    again = finetune("text-classification", moods, output=tmp_path / "run", max_steps=20, resume=True, **options)
    assert again.outcome.steps == 20

    def spoiling(self, model, batches, total, one_pass):
        found = losses(self, model, batches, total, one_pass)
        with torch.no_grad():
            model.classifier.weight[0, 0] = float("inf")
        return found

    monkeypatch.setattr(TASKS["text-classification"], "losses", spoiling)
    with pytest.raises(DivergedError, match=r"classifier\.weight is no number any more after step 1"):
        finetune("text-classification", moods, output=tmp_path / "spoilt", max_steps=1, **options)
    assert checkpoints(tmp_path / "spoilt") == []


def test_a_disk_that_is_full_leaves_the_checkpoints_before(base, tmp_path, moods, capsys):
    """A limit on files' sizes stands for the full disk: the same error from the same call."""
    few = with_options(COMMAND, max_steps=8, eval_every=4)
    command = [*few, "--model", base(), "--train", moods, "--output", tmp_path / "run"]
    with files_of_at_most(60_000):
        code, _, err = called(capsys, *command)
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith("modernbert: ")
    assert "checkpoint-4 cannot be written" in last
    assert "File too large" in last
    assert not list((tmp_path / "run").glob("*checkpoint*"))
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert called(capsys, *command, "--resume")[0] == 0


def test_folders_that_are_in_use_or_hold_something_else(base, tmp_path, moods, capsys):
    folder = base()
    options = {"model": folder, "max_steps": 2, "progress": False}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"holds thesis\.txt"):
            finetune("text-classification", moods, output=tmp_path / "other", resume=resume, **options)
    with pytest.raises(InputError, match="which is a file"):
        finetune("text-classification", moods, output=tmp_path / "other" / "thesis.txt", **options)
    with FileLock(tmp_path / ".busy.lock"), pytest.raises(InputError, match="another process is writing"):
        finetune("text-classification", moods, output=tmp_path / "busy", **options)
    (tmp_path / ".busy.lock").unlink()
    assert not (tmp_path / "busy").exists()
    finetune("text-classification", moods, output=tmp_path / "run", **options)
    with pytest.raises(InputError, match="name another folder, or continue its run with resume=True"):
        finetune("text-classification", moods, output=tmp_path / "run", **options)
    changed = {"batch_size": 3, "held_out": 0.2, "max_steps": 3}  # the steps of a run may change
    with pytest.raises(
        InputError, match=r"held_out is 0.2 and was 0.1; batch_size is 3 and was 32 in the run in .*/run;"
    ):
        finetune("text-classification", moods, output=tmp_path / "run", resume=True, **{**options, **changed})
    code, _, err = called(capsys, "finetune", "text-classification", "--train", moods, "--output", tmp_path / "run")
    assert code == 2
    assert len(err.strip().splitlines()) <= 2
    assert list(tmp_path.glob(".*lock")) == []


def test_flags_and_a_file_say_the_same(base, tmp_path, moods, capsys):
    folder = base()
    values = {
        "train": str(moods), "model": str(folder), "max_steps": 3, "lr": "1e-3", "batch-size": 8, "held_out": 0.2,
        "output": str(tmp_path / "file"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = ["finetune", "text-classification", "--seed", "4"]
    assert called(capsys, *command, "--config", tmp_path / "run.yaml")[0] == 0
    flags = ["--train", moods, "--model", folder, "--max-steps", "3", "--lr", "1e-3", "--batch-size", "8"]
    assert called(capsys, *command, *flags, "--held-out", "0.2", "--output", tmp_path / "flags")[0] == 0
    saved = [yaml.safe_load((tmp_path / name / "run.yaml").read_text()) for name in ("file", "flags")]
    assert {**saved[0], "output": ""} == {**saved[1], "output": ""}
    assert saved[0]["task"] == "text-classification"
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("file", "flags")]
    assert weights[0] == weights[1]
    values["task"] = "masked-lm"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match="is for masked-lm"):
        finetune("text-classification", config=tmp_path / "run.yaml", output=tmp_path / "x")


def test_trackers_of_accelerate_follow_a_run(base, tmp_path, moods):
    options = {"model": base(), "max_steps": 3, "progress": False}
    finetune("text-classification", moods, output=tmp_path / "run", tracker=["tensorboard"], **options)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    with pytest.raises(InputError, match="tracker is abacus"):
        finetune("text-classification", moods, output=tmp_path / "other", tracker=["abacus"], **options)


def test_errors_name_flags_on_the_command_line(base, tmp_path, moods, capsys):
    folder, command = base(), ["finetune", "text-classification"]
    whole = [*command, "--train", moods, "--model", folder, "--output", tmp_path / "x", "--max-steps", "1"]
    one = written(tmp_path / "one.jsonl", mood_rows(1))
    odd = written(tmp_path / "odd.jsonl", [{"a": "x", "b": "y"}])
    hot = written(tmp_path / "hot.jsonl", [{"text": "x", "label": [1, 0]}] * 3)
    given = [
        (command, "modernbert: --output is not given; name a folder for the run"),
        ([*command, "--output", tmp_path / "x"], "modernbert: --train is not given; name a file to train on"),
        ([*whole, "--batch-size", "0"], "modernbert: --batch-size is 0; it must be a whole number of at least 1"),
        ([*whole, "--max-length", "900"], "modernbert: --max-length is 900; the model's context holds 64 tokens"),
        ([*command, "--output", tmp_path / "x", "--train", one],
         "give more rows, rows to evaluate on (--eval FILE), or --held-out 0"),
        ([*command, "--output", tmp_path / "x", "--train", odd],
         "none is known to hold the text. Say which one does: --column text=COLUMN"),
        ([*command, "--output", tmp_path / "x", "--train", hot, "--problem", "single-label"],
         "has a list of labels, and --problem is single-label; --problem multi-label reads it"),
    ]  # fmt: skip
    for arguments, said in given:
        code, _, err = called(capsys, *arguments)
        assert code == 2
        assert said in err.strip().splitlines()[-1]
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.yaml").write_text("task: text-classification\n")
    assert called(capsys, *whole)[2].strip().endswith("name another folder, or continue its run with --resume")


def test_the_default_learning_rate_follows_the_model_and_says_so(base, tmp_path, moods):
    assert default_rate(5e-5, 768, 22) == 5e-5
    assert default_rate(5e-5, 1024, 28) == 2.9e-5
    assert default_rate(5e-5, 256, 6) == 5.5e-4
    assert default_rate(8e-5, 48, 3) == 1e-3  # and no more
    said = []
    options = {"model": base(hidden_size=192, intermediate_size=64), "max_steps": 2, "progress": False, "warmup": 0.0}
    run = finetune("text-classification", moods, output=tmp_path / "run", say=said.append, **options)
    assert run.metrics
    assert any(
        "learning rate 0.001, for 3 layers of width 192 (5e-05 at base size, 22 layers of 768)" in line for line in said
    )
    rows = history(tmp_path / "run")
    assert rows[0]["lr"] == 1e-3
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["lr"] == 1e-3
    said.clear()
    finetune("text-classification", moods, output=tmp_path / "other", say=said.append, lr=3e-4, **options)
    assert not any("learning rate" in line for line in said)
    assert history(tmp_path / "other")[0]["lr"] == 3e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_16_bits_are_trained_in_float32_and_that_is_said_once(dtype, base, tmp_path, moods):
    name, said = str(dtype).removeprefix("torch."), []
    half = ModernBertForMaskedLM.from_pretrained(base(), dtype=torch.float32).to(dtype)
    half.save_pretrained(tmp_path / "half")
    Tokenizer.from_pretrained(base()).save_pretrained(tmp_path / "half")
    options = {"model": tmp_path / "half", "max_steps": 2, "batch_size": 4, "progress": False, "say": said.append}
    run = finetune("text-classification", moods, output=tmp_path / "run", **options)
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert {value.dtype for value in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}
    assert said.count(f"weights are stored in {name} and trained in float32") == 1


def test_a_damaged_checkpoint_is_passed_over_by_name(base, tmp_path, moods, caplog):
    options = {"model": base(), "batch_size": 8, "progress": False, "eval_every": 2, "keep_best": False, "lr": 1e-3}
    options["schedule"] = "constant"
    whole = finetune("text-classification", moods, output=tmp_path / "whole", max_steps=6, **options)
    finetune("text-classification", moods, output=tmp_path / "run", max_steps=4, **options)
    (tmp_path / "run" / "checkpoint-4" / "trainer.json").write_text('{"step": 4, "be')
    again = finetune("text-classification", moods, output=tmp_path / "run", max_steps=6, resume=True, **options)
    (warned,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert "checkpoint-4/trainer.json is damaged" in warned
    assert warned.endswith(
        f"renamed to checkpoint-4.damaged, and the run continues from {tmp_path / 'run/checkpoint-2'}"
    )
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    for path in checkpoints(tmp_path / "run"):
        (path / "optimizer.safetensors").write_bytes(b"cut")
    with pytest.raises(
        InputError, match=r"no checkpoint of .*run is whole: .*checkpoint-6/optimizer.safetensors is dam"
    ):
        finetune("text-classification", moods, output=tmp_path / "run", max_steps=8, resume=True, **options)


def test_a_checkpoint_is_never_lost_while_another_takes_its_place(tmp_path, monkeypatch):
    def written_with(text):
        return lambda folder: (folder.mkdir(parents=True), (folder / "model.safetensors").write_text(text))

    write_checkpoint(tmp_path, 4, written_with("first"), {}, {})
    rename, renamed = Path.rename, []

    def killed(self, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(self)
        return rename(self, target)

    monkeypatch.setattr("modernbert.io.files._exchanged", lambda one, other: False)  # as on systems that cannot
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 4, written_with("second"), {}, {})
    monkeypatch.undo()
    assert checkpoints(tmp_path) == []
    recover(tmp_path)
    (found,) = checkpoints(tmp_path)
    assert (found / "model.safetensors").read_text() == "first"
    write_checkpoint(tmp_path, 4, written_with("third"), {}, {})
    assert (found / "model.safetensors").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / METRICS).symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '.*{METRICS}'"):
        append_metrics(tmp_path, {"step": 1})


@pytest.mark.parametrize("name", ["pretrain", "mine", *(f"finetune {task}" for task in TASKS)])
def test_help_says_every_default_and_what_is_required(name):
    command = get_command(app)
    for part in name.split():
        command = command.commands[part]
    said = {
        option.name: option.help for option in command.params if option.name not in ("config", "resume", "settings")
    }
    required = {option for option, text in said.items() if "(required)" in text}
    others = {"pretrain": {"data", "output"}, "mine": {"pairs", "model", "output"}}
    assert required == others.get(name, {"train", "output"})
    assert [option for option, text in said.items() if option not in required and "(default: " not in text] == []
    assert not any("[" in text or "None" in text or "_" in text for text in said.values())


def test_help_is_quick_and_names_the_options(capsys):
    code = (
        "import sys\nfrom modernbert.cli import app\nassert 'torch' not in sys.modules\n"
        "from typer.main import get_command\nc = get_command(app).commands['finetune']\n"
        "print(sorted(c.commands), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "question-answering" in said
    assert said.endswith("False\n")
    shown = called(capsys, "finetune", "sentence-embedding", "--help")[1]
    for flag in ("--matryoshka", "--temperature", "--micro-tokens", "--resume"):
        assert flag in shown


@pytest.mark.parametrize(("number", "every"), [(signal.SIGINT, 9), (signal.SIGINT, 1), (signal.SIGTERM, 9)])
def test_a_signal_ends_a_command_with_its_code_and_what_is_saved(
    number, every, base, tmp_path, moods, monkeypatch, capsys
):
    collate, calls = TASKS["text-classification"].collate, []

    def struck(self, examples, seeds):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(number)
        return collate(self, examples, seeds)

    monkeypatch.setattr(TASKS["text-classification"], "collate", struck)
    output = ["--output", str(tmp_path / "run")]
    command = with_options(COMMAND, max_steps=9, eval_every=every, batch_size=4, micro_tokens=400)
    before = signal.getsignal(signal.SIGTERM)
    code, _, err = called(capsys, *command, "--model", base(), "--train", moods, *output)
    assert code == 128 + number
    assert signal.getsignal(signal.SIGTERM) is before
    again = ["finetune", "text-classification", *output, "--resume"]
    step = 1 if number == signal.SIGINT else 2  # which ends at once, or after the step
    said = f"after step {step} of 9; {tmp_path / 'run' / f'checkpoint-{step}'} is saved; --resume continues from it"
    if number == signal.SIGINT and every == 9:
        said = "interrupted after step 1 of 9; nothing is saved yet; --resume starts from the beginning"
    assert err.strip().splitlines()[-1].endswith(f"{said} (modernbert {' '.join(again)})")
    assert "Traceback" not in err
    assert called(capsys, *again)[0] == 0


def test_an_interruption_before_the_first_step_says_what_there_is(base, tmp_path, moods, monkeypatch, capsys):
    def struck(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("modernbert.training.finetuning.read_rows", struck)
    output = ["--output", str(tmp_path / "run")]
    command = [*COMMAND, "--model", str(base()), "--train", str(moods), *output, "--resume"]

    def last_line():
        code, _, err = called(capsys, *command)
        assert code == 130
        return err.strip().splitlines()[-1]

    nothing = "modernbert: interrupted; nothing is saved yet: the same command"
    assert last_line() == f"{nothing} starts from the beginning"
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("task: text-classification\n")
    assert last_line() == f"{nothing} with --resume starts from the beginning"
    (tmp_path / "run" / "checkpoint-3").mkdir()
    monkeypatch.setattr("modernbert.training.run.changes_of", struck)
    assert last_line() == "modernbert: interrupted; the same command with --resume continues from what is saved"


def test_a_resumed_run_refuses_another_seed_and_fewer_steps_and_tells_of_other_changes(base, tmp_path, moods):
    said, folder = [], tmp_path / "run"
    options = {"model": base(), "batch_size": 8, "progress": False, "say": said.append}
    finetune("text-classification", moods, output=folder, max_steps=4, lr=1e-3, **options)
    written = (folder / "run.yaml").read_bytes()
    with pytest.raises(InputError, match=r"seed is 5 and was 0 in the run in .*run; resume it with the same"):
        finetune("text-classification", output=folder, resume=True, seed=5, **options)
    with pytest.raises(InputError, match=r"max_steps is 3, 3 steps in all, and the run in .* has done 4; give more"):
        finetune("text-classification", output=folder, resume=True, max_steps=3, **options)
    assert (folder / "run.yaml").read_bytes() == written
    results = [json.loads((folder / "results.json").read_text())]
    said.clear()
    for _ in range(2):  # what was changed once is told once, and stays true
        finetune("text-classification", output=folder, resume=True, max_steps=6, lr=5e-4, **options)
        results.append(json.loads((folder / "results.json").read_text()))
    changed = "max_steps is 6 and was 4; lr is 0.0005 and was 0.001"
    line = f"from step 4 on: {changed}; the weights may not be those of a run that began so"
    assert said.count(line) == 1
    assert (folder / "run.yaml").read_text().count(line) == 1
    assert yaml.safe_load((folder / "run.yaml").read_text())["max_steps"] == 6
    assert line not in results[0]["notes"]
    assert [found["notes"].count(line) for found in results[1:]] == [1, 1]
    assert (folder / "report.html").read_text().count(line) == 1
    assert [found["steps"] for found in results] == [4, 6, 6]
    walls = [found["wall_seconds"] for found in results]
    assert walls[0] < walls[1]
    for found in results:
        assert found["train_seconds"] <= found["wall_seconds"]


def test_a_null_in_a_file_does_not_change_a_resumed_run(base, tmp_path, moods):
    options = {"model": base(), "batch_size": 8, "progress": False}
    finetune("text-classification", moods, output=tmp_path / "run", max_steps=2, lr=3e-3, **options)
    (tmp_path / "more.yaml").write_text("lr: null\nmax_steps: 3\n")
    finetune("text-classification", output=tmp_path / "run", resume=True, config=tmp_path / "more.yaml", **options)
    kept = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (kept["lr"], kept["max_steps"]) == (3e-3, 3)


def test_resuming_what_has_not_begun_starts_it_and_says_so(base, tmp_path, moods):
    said, folder = [], tmp_path / "run"
    options = {"model": base(), "batch_size": 8, "max_steps": 1, "progress": False, "say": said.append}
    finetune("text-classification", moods, output=folder, resume=True, **options)
    assert said[0] == f"there is no run in {folder} yet; starting one"
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    said.clear()
    finetune("text-classification", output=folder, resume=True, **options)
    assert said[0] == f"the run in {folder} has saved nothing yet; starting it from the beginning"
