"""Runs of both objectives: they learn, stop, go on as if they had not, grow, extend, and change sides."""

import dataclasses
import json
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import modernbert
from modernbert import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from modernbert.errors import ConfigError, DivergedError, InputError
from modernbert.training.checkpoints import checkpoints
from modernbert.training.pretraining.feed import PretrainFeed
from modernbert.training.pretraining.models import to_decoder_weights, to_encoder_weights
from modernbert.training.pretraining.options import PretrainOptions
from modernbert.training.pretraining.prepare import prepare_data
from modernbert.training.pretraining.run import Data, Pretraining, pretrain
from modernbert.training.pretraining.stream import PassStream
from tests.commands import called
from tests.training.pretraining.conftest import SIZES
from tests.training.runs import PROGRAM, finish, history, wait_for_steps, weights_of

RUN = {
    **SIZES, "batch_tokens": 512, "micro_tokens": 256, "lr": 5e-3, "weight_decay": 0.1, "eval_every": 10,
    "save_every": 10, "max_steps": 30, "decay": 0.3, "progress": False,
}  # fmt: skip
AUTO = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM}


@pytest.mark.parametrize(("optimizer", "objective"), [("stableadamw", "mlm"), ("muon", "mlm"), ("muon", "clm")])
def test_a_run_learns_and_goes_on_as_if_it_had_not_stopped(optimizer, objective, prepared, tmp_path, monkeypatch):
    options = {**RUN, "optimizer": optimizer, "objective": objective}
    whole = pretrain(prepared, tmp_path / "whole", **options)
    rows = history(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["step"] for row in rows if "eval_loss" in row] == [10, 20, 30]
    assert rows[-1]["eval_loss"] < rows[0]["loss"] - 0.5
    assert whole.metrics["loss"] == rows[-1]["eval_loss"]
    assert {"loss/first", "loss/second", "accuracy/first"} < set(whole.metrics)
    assert ("bits_per_byte" in whole.metrics) == (objective == "clm")
    for name in ("report.html", "results.json", "run.yaml", "config.json", "tokenizer.json"):
        assert (tmp_path / "whole" / name).is_file(), name
    assert not getattr(whole.model.config, "sparse_prediction", False)

    class Stopped(Exception):
        pass

    collate, calls = Pretraining.collate, []

    def stop(self, examples, seeds):
        calls.append(1)
        if len(calls) == 50:  # two passes a step
            raise Stopped
        return collate(self, examples, seeds)

    monkeypatch.setattr(Pretraining, "collate", stop)
    with pytest.raises(Stopped):
        pretrain(prepared, tmp_path / "cut", **options)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["checkpoint-10", "checkpoint-20"]
    model = AUTO[objective].from_pretrained(tmp_path / "cut" / "checkpoint-20")
    assert not getattr(model.config, "sparse_prediction", False)
    assert AutoTokenizer.from_pretrained(tmp_path / "cut" / "checkpoint-20").mask_token == "[MASK]"
    with pytest.raises(InputError, match="another folder, or continue its run with resume=True"):
        pretrain(prepared, tmp_path / "cut", **options)
    with pytest.raises(InputError, match=r"batch_tokens is 1024 and was 512 in the run in"):
        pretrain(prepared, tmp_path / "cut", **{**options, "batch_tokens": 1024}, resume=True)
    cut = pretrain(prepared, tmp_path / "cut", **options, resume=True)
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(a, b)
    saved = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert (saved("a").input_ids[-1] == saved.sep_token_id) == (objective == "mlm")


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_bit_for_bit(prepared, tmp_path, capsys):
    flags = "--hidden-size 32 --intermediate-size 48 --layers 2 --heads 2 --batch-tokens 256 --micro-tokens 128"
    flags += " --max-steps 60 --save-every 7 --eval-every 20"
    command = ["pretrain", "--data", prepared, *flags.split(), "--output"]
    assert called(capsys, *command, tmp_path / "whole")[0] == 0
    process = subprocess.Popen(
        [*PROGRAM, *command, tmp_path / "killed"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    wait_for_steps(process, tmp_path / "killed", random.Random(time.time_ns()).randint(3, 50))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finish(PROGRAM, *command, tmp_path / "killed", "--resume")
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "whole")
    whole, killed = ([row["loss"] for row in history(tmp_path / name)] for name in ("whole", "killed"))
    assert whole == killed


def test_masks_and_batches_change_over_a_run(prepared, tmp_path):
    run = Pretraining(PretrainOptions(**_own(RUN), mask_rate="0.3,0.15@0.5,0.05@0.9"), Data.open([prepared]))
    rates = []
    for step in range(20):
        run.at_step(step, 20)
        rates.append(run.trained.mask_rate)
    assert rates == [0.3] * 10 + [0.15] * 8 + [0.05] * 2
    data = Data.open([prepared])
    options = PretrainOptions(micro_tokens=64, batch_tokens=512, batch_start=128, batch_warmup=4096, max_steps=30)
    feed = PretrainFeed(PassStream(data.train, 64, 0), options, "x")
    steps = list(feed.steps(0, None))
    sizes = [len(step.passes) for step in steps]
    assert sizes[0] == 2
    assert sizes[-1] == 8
    assert sizes == sorted(sizes)
    assert feed.total == len(steps) == 30
    again = next(feed.steps(17, steps[16].place))
    assert [[item.text for item in some] for some in again.passes] == [
        [item.text for item in some] for some in steps[17].passes
    ]
    whole = PretrainFeed(PassStream(data.train, 64, 0), dataclasses.replace(options, max_steps=None, epochs=2.0), "x")
    tokens = sum(item.tokens for step in whole.steps(0, None) for some in step.passes for item in some)
    size = sum(PassStream(data.train, 64, 0).sizes)
    assert 2 * size * 0.9 < tokens < 2 * size + 512
    result = pretrain(
        prepared, tmp_path / "run",
        **{**RUN, "batch_start": 256, "batch_warmup": 4000, "mask_rate": "0.4,0.1@0.5", "max_steps": 12},
    )  # fmt: skip
    assert result.outcome.steps == 12


def _own(options):
    return {k: v for k, v in options.items() if k != "progress"}


def test_a_model_changes_sides(prepared, tmp_path):
    """An encoder starts from a decoder and the reverse; the weights are the same, and both learn on."""
    first = pretrain(prepared, tmp_path / "decoder", **{**RUN, "objective": "clm", "max_steps": 4})
    weights = dict(first.model.state_dict())
    there = to_encoder_weights(weights)
    back = to_decoder_weights(there)
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    run = {k: v for k, v in RUN.items() if k not in SIZES} | {"max_steps": 4}
    encoder = pretrain(prepared, tmp_path / "encoder", model=str(tmp_path / "decoder"), **{**run, "lr": 0.0})
    assert isinstance(encoder.model, modernbert.ModernBertForMaskedLM)
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, there[name]), name
    framed = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    assert framed("a").input_ids[-1] == framed.sep_token_id
    same = encoder.model.config.rope_parameters
    assert same == first.model.config.rope_parameters
    decoder = pretrain(
        prepared, tmp_path / "again", model=str(tmp_path / "encoder"), objective="clm", **{**run, "lr": 0.0}
    )
    for name, value in decoder.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert pretrain(prepared, tmp_path / "on", model=str(tmp_path / "decoder"), **run).metrics["loss"] < 10


def test_a_context_is_extended(raw, prepared, tmp_path):
    short = pretrain(prepared, tmp_path / "short", **{**RUN, "max_steps": 3, "global_rope_theta": 10_000.0})
    assert short.model.config.max_position_embeddings == 32
    prepare_data([raw / "first.jsonl"], raw / "tokenizer", tmp_path / "long", max_length=128, held_out=0.1)
    run = {k: v for k, v in RUN.items() if k not in SIZES} | {"max_steps": 3, "model": str(tmp_path / "short")}
    with pytest.raises(InputError, match=r"up to 128 tokens and .*short reads 32; extend it with context 128"):
        pretrain(tmp_path / "long", tmp_path / "run", **run)
    with pytest.raises(InputError, match="context is 64"):
        pretrain(tmp_path / "long", tmp_path / "run", **run, context=64)
    longer = pretrain(tmp_path / "long", tmp_path / "run", **run, context=256, global_rope_theta=160_000.0)
    config = AutoModelForMaskedLM.from_pretrained(tmp_path / "run").config
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["full_attention"]["rope_theta"] == 160_000.0
    assert config.rope_parameters["sliding_attention"] == short.model.config.rope_parameters["sliding_attention"]
    assert longer.metrics["loss"] < 10
    scaled = pretrain(tmp_path / "long", tmp_path / "scaled", **run, context=128, rope_scaling="yarn:4")
    rope = scaled.model.config.rope_parameters
    assert rope["full_attention"]["rope_type"] == "yarn"
    assert rope["full_attention"]["original_max_position_embeddings"] == 32
    assert rope["sliding_attention"]["rope_type"] == "default"
    stream = PassStream(Data.open([tmp_path / "long"]).train, 256, 0)
    feed = PretrainFeed(stream, PretrainOptions(micro_tokens=256, batch_tokens=256), "x")
    lengths = [item.tokens for step in feed.steps(0, None) for some in step.passes for item in some]
    assert np.max(lengths) > 100


def test_weights_and_several_folders(raw, prepared, tmp_path):
    prepare_data([raw / "first.jsonl"], raw / "tokenizer", tmp_path / "more", max_length=32)
    data = Data.open([prepared, tmp_path / "more"])
    assert list(data.train) == ["first", "second", "more/first"]
    options = {**RUN, "max_steps": 2, "weight": ["first=0", "second=1", "more/first=3"]}
    assert pretrain([prepared, tmp_path / "more"], tmp_path / "run", **options).outcome.steps == 2
    (tmp_path / "deep").mkdir()
    prepare_data([raw / "first.jsonl"], raw / "tokenizer", tmp_path / "deep" / "more", max_length=32)
    with pytest.raises(InputError, match="has a source more/first, as another folder does"):
        Data.open([prepared, tmp_path / "more", tmp_path / "deep" / "more"])
    with pytest.raises(InputError, match="more is given twice; give each folder of data once"):
        Data.open([tmp_path / "more", prepared, tmp_path / "deep" / ".." / "more"])
    with pytest.raises(InputError, match="weight is not given for second"):
        pretrain(prepared, tmp_path / "bad", **{**RUN, "weight": ["first=1"]})
    with pytest.raises(InputError, match="micro_tokens is 16, and texts of the data have up to 32 tokens"):
        pretrain(prepared, tmp_path / "bad", **{**RUN, "micro_tokens": 16})
    with pytest.raises(InputError, match="weight is given for third; the data has first, second"):
        pretrain(prepared, tmp_path / "bad", **{**RUN, "weight": ["third=1"]})
    assert not (tmp_path / "bad").exists()


def test_a_resumed_run_must_be_the_same_run(raw, prepared, tmp_path):
    pretrain(prepared, tmp_path / "run", **{**RUN, "max_steps": 10})
    path = tmp_path / "run" / "checkpoint-10" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ConfigError, match=r"checkpoint-10 has intermediate_size 64 and this run 48"):
        pretrain(prepared, tmp_path / "run", **RUN, resume=True)
    path.write_text(json.dumps(config))
    prepare_data([raw / "second.jsonl"], raw / "tokenizer", tmp_path / "other", max_length=32)
    with pytest.raises(InputError, match="was trained on other data"):
        pretrain(tmp_path / "other", tmp_path / "run", **RUN, resume=True)
    assert pretrain(prepared, tmp_path / "run", **{**RUN, "max_steps": 12}, resume=True).outcome.steps == 12


def test_a_model_of_another_tokenizer_is_refused(prepared, tmp_path):
    run = {k: v for k, v in RUN.items() if k not in SIZES}
    with pytest.raises(InputError, match="has another tokenizer than the data"):
        pretrain(prepared, tmp_path / "run", model=modernbert.pipelines.small_model("encoder"), **run)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_checkpoint(prepared, tmp_path, monkeypatch):
    from modernbert.training import checkpoints as module

    save, calls = module.save_file, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match=r"checkpoint-20 cannot be written: .*No space left.*checkpoint-10 is whole"):
        pretrain(prepared, tmp_path / "run", **RUN)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-10"]
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_a_diverged_loss_ends_the_run_and_names_its_texts(prepared, tmp_path, monkeypatch):
    losses = Pretraining.losses
    monkeypatch.setattr(Pretraining, "losses", lambda *a: losses(*a) * float("nan"))
    with pytest.raises(DivergedError, match=r"loss is nan at step 1; no checkpoint .*shard 0, text \d+'"):
        pretrain(prepared, tmp_path / "run", **RUN)


def test_bfloat16_and_checkpointed_gradients_train(prepared, tmp_path):
    options = {**RUN, "max_steps": 3, "precision": "bfloat16", "gradient_checkpointing": True, "save_dtype": "float16"}
    result = pretrain(prepared, tmp_path / "run", **options)
    assert result.model.dtype == torch.float32
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mask_rate": "0"}, "between 0 and 1"), ({"mask_rate": "a"}, "mask_rate is 'a'"),
     ({"mask_rate": "0.3@0.5"}, "rise from 0"), ({"mask_rate": "0.3,0.2@0.8,0.1@0.5"}, "rise from 0"),
     ({"batch_tokens": 1000}, "multiples of micro_tokens"), ({"batch_start": 8192}, "needs both"),
     ({"batch_start": 131072, "batch_warmup": 9}, "must be at most"), ({"objective": "rtd"}, "choose one of mlm, clm"),
     ({"warmup": 0.7, "decay": 0.7}, "shares of the"), ({"save_dtype": "int8"}, "save_dtype is 'int8'"),
     ({"optimizer": "sgd"}, "choose one of adamw, stableadamw, muon"), ({"weight": ["a"]}, "write SOURCE=WEIGHT"),
     ({"rope_scaling": "ntk:2", "model": "x", "context": 9}, "write linear:4"),
     ({"rope_scaling": "yarn:2"}, "give both"), ({"model": "x", "layers": 3}, "layers is for a new model"),
     ({"context": 0}, "context is 0"), ({"eval_tokens": 0}, "eval_tokens is 0")],
)  # fmt: skip
def test_impossible_options_are_named(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        PretrainOptions(**options)


def test_from_text_to_a_filled_mask_by_commands(raw, documents, tmp_path, capsys):
    """train-tokenizer, prepare-data, pretrain, evaluate and run, one after another."""
    text = raw / "first.jsonl"

    def command(*arguments):
        code, out, err = called(capsys, *arguments)
        assert code == 0, err
        return out, err

    _, err = command("train-tokenizer", text, "--output", tmp_path / "tok", "--vocab-size", 320, "--max-length", 64)
    assert "320 ids" in err
    command("prepare-data", text, "--tokenizer", tmp_path / "tok", "--output", tmp_path / "data",
            "--max-length", 64, "--held-out", 0.1)  # fmt: skip
    sizes = ["--hidden-size", 32, "--intermediate-size", 48, "--layers", 2, "--heads", 2, "--initializer-range", 0.1]
    steps = ["--max-steps", 60, "--batch-tokens", 512, "--micro-tokens", 512, "--eval-every", 30, "--lr", 3e-3]
    out, err = command("pretrain", "--data", tmp_path / "data", "--output", tmp_path / "run", *sizes, *steps,
                       "--save-dtype", "float16")  # fmt: skip
    for part in ("tokens/s", "60 steps", "held out: loss"):
        assert part in err
    assert out.startswith("loss ")
    score = json.loads(command("evaluate", tmp_path / "run", text, "--held-out", 0.1)[0])
    assert set(score) == {"documents", "masked_tokens", "loss", "top1", "top5"}
    assert score["documents"] == 5
    assert score["top1"] > 0.05
    answer = json.loads(command("run", "--model", tmp_path / "run", "--json", "The [MASK] sat.")[0])
    assert len(answer["output"]) == 5
    command("pretrain", "--data", tmp_path / "data", "--output", tmp_path / "decoder", "--objective", "clm", *sizes,
            *steps)  # fmt: skip
    score = json.loads(command("evaluate", tmp_path / "decoder", text, "--held-out", 0.1)[0])
    assert {"perplexity", "bits_per_byte", "perplexity_per_byte"} < set(score)
    figures = json.loads((tmp_path / "decoder" / "results.json").read_text())["figures"]
    assert score["bits_per_byte"] == pytest.approx(figures["bits_per_byte"], rel=1e-3)
    assert score["perplexity"] < 150
    assert command("run", "--model", tmp_path / "decoder", "--max-new-tokens", 5, "The cat")[0].startswith("The cat")
    for arguments, message in (
        (["pretrain", "--data", tmp_path / "data", "--output", "x", "--objective", "rtd"], "objective is 'rtd'"),
        (["pretrain", "--output", "x"], "data is not given"),
        (["pretrain", "--data", tmp_path / "data"], "output is not given"),
        (["evaluate", tmp_path / "run", text, "--held-out", "0.001"], "leaves no document"),
        (["evaluate", tmp_path / "run", text, "--mask-rate", "2"], "--mask-rate is 2"),
    ):
        code, _, err = called(capsys, *arguments)
        assert code == 2
        assert message in err
