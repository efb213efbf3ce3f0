"""Two processes on the CPU (gloo): replicated and sharded runs, their checkpoints, and what a lost one leaves."""

import os
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from modernbert import AutoModelForMaskedLM
from modernbert.errors import CheckpointError, InputError
from modernbert.training.checkpoints import checkpoints
from modernbert.training.pretraining.convert import convert
from modernbert.training.pretraining.run import pretrain
from tests.commands import called
from tests.training.runs import (
    PROGRAM,
    TWO_PROCESSES,
    assert_close_by_name,
    finish,
    history,
    wait_for_steps,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--hidden-size", "32", "--intermediate-size", "48", "--layers", "2", "--heads", "2", "--batch-tokens", "512",
         "--micro-tokens", "128", "--max-steps", "12", "--save-every", "4", "--eval-every", "6", "--lr", "3e-3",
         "--weight-decay", "0.1", "--initializer-range", "0.1", "--precision", "float32"]  # fmt: skip


def command(prepared, output, *more):
    """The command, with other values of the flags that `more` names again."""
    flags, others = list(FLAGS), []
    for i, word in enumerate(more):
        if word in flags and word.startswith("--"):
            flags[flags.index(word) + 1] = more[i + 1]
        elif i == 0 or more[i - 1] not in flags or not more[i - 1].startswith("--"):
            others.append(word)
    return ["pretrain", "--data", str(prepared), "--output", str(output), *flags, *others]


def launch(*arguments):
    finish([*TWO_PROCESSES, "modernbert"], *arguments)


def losses(folder, name="loss"):
    return [row[name] for row in history(folder) if name in row]


def close(folder, other):
    one, two = (load_file(place / "model.safetensors") for place in (folder, other))
    assert one.keys() == two.keys()
    assert_close_by_name(two, one, 2e-4)


@pytest.mark.parametrize("optimizer", ["stableadamw", "muon"])
def test_two_processes_train_as_one(optimizer, prepared, tmp_path, capsys):
    """Replicated and sharded, with a tracker, whose end is not that of the processes' group."""
    called(capsys, *command(prepared, tmp_path / "one", "--optimizer", optimizer))
    launch(*command(prepared, tmp_path / "two", "--optimizer", optimizer))
    launch(*command(prepared, tmp_path / "parts", "--optimizer", optimizer, "--shard", "--tracker", "tensorboard"))
    one = losses(tmp_path / "one")
    for name in ("two", "parts"):
        assert losses(tmp_path / name) == pytest.approx(one, rel=1e-4), name
        assert losses(tmp_path / name, "grad_norm") == pytest.approx(losses(tmp_path / "one", "grad_norm"), rel=1e-3)
        assert losses(tmp_path / name, "eval_loss") == pytest.approx(losses(tmp_path / "one", "eval_loss"), rel=1e-3)
        close(tmp_path / "one", tmp_path / name)


def test_a_process_without_a_text_takes_part_all_the_same(prepared, tmp_path, capsys):
    """Steps of three texts, a pass each, on two sharded processes."""
    few = ["--micro-tokens", "32", "--batch-tokens", "96", "--max-steps", "6"]
    called(capsys, *command(prepared, tmp_path / "one", *few))
    launch(*command(prepared, tmp_path / "two", *few, "--shard"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    close(tmp_path / "one", tmp_path / "two")


def test_a_sharded_checkpoint_resumes_and_becomes_one_folder(prepared, tmp_path, capsys):
    launch(*command(prepared, tmp_path / "whole", "--shard"))
    checkpoint = tmp_path / "whole" / "checkpoint-12"
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == ["config.json", "shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors",
                     "tokenizer.json", "tokenizer_config.json", "trainer.json"]  # fmt: skip
    sizes = [(checkpoint / name).stat().st_size for name in names if name.startswith("shard")]
    assert max(sizes) < 1.1 * min(sizes)
    assert called(capsys, "convert", checkpoint, "--output", tmp_path / "converted")[0] == 0
    assert weights_of(tmp_path / "converted") == weights_of(tmp_path / "whole")
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "converted").num_parameters() > 10_000
    with pytest.raises(InputError, match="exists"):
        convert(checkpoint, tmp_path / "converted")
    with pytest.raises(CheckpointError, match="holds no shard"):
        convert(tmp_path / "whole", tmp_path / "again")

    launch(*command(prepared, tmp_path / "cut", "--shard", "--max-steps", "8", "--schedule", "constant"))
    launch(*command(prepared, tmp_path / "uncut", "--shard", "--schedule", "constant"))
    launch(*command(prepared, tmp_path / "cut", "--shard", "--schedule", "constant"), "--resume")
    cut, uncut = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "uncut"))
    assert all(torch.equal(value, uncut[name]) for name, value in cut.items())
    (tmp_path / "cut" / "checkpoint-12" / "shard-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds 1 of 2 shards"):
        convert(tmp_path / "cut" / "checkpoint-12", tmp_path / "again")


def test_sharding_needs_processes(prepared, tmp_path):
    with pytest.raises(InputError, match="shard needs several processes"):
        pretrain(prepared, tmp_path / "run", shard=True, batch_tokens=512, micro_tokens=512, progress=False)


@pytest.mark.parametrize(("victim", "optimizer"), [(0, "stableadamw"), (1, "muon")])
def test_a_lost_process_ends_the_run_with_a_word_and_a_checkpoint(victim, optimizer, prepared, tmp_path):
    """Processes are started one by one, as on two machines, so that nothing but the run itself notices."""
    output = tmp_path / "run"
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    program = [*PROGRAM, *command(prepared, output, "--max-steps", "4000", "--optimizer", optimizer)]
    processes = [
        subprocess.Popen(
            program, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    wait_for_steps(processes[0], output, 10)
    processes[victim].send_signal(signal.SIGKILL)
    processes[victim].communicate()
    said = processes[1 - victim].communicate(timeout=120)[1]
    assert processes[1 - victim].returncode == 2, said
    words = [line for line in said.splitlines() if line.startswith("modernbert: ")]
    assert len(words) == 1, said
    assert "a process of the run was lost after step" in words[0]
    assert "is saved; --resume continues from it" in words[0]
    last = checkpoints(output)[-1]
    assert str(last) in words[0]
    step = int(last.name.removeprefix("checkpoint-"))
    if victim == 0:
        assert step % 4 == 0
    elif step % 4:  # the first process had it all, and kept it, but for in the middle of the optimizer's work
        assert f"lost after step {step} " in words[0]
    launch(*command(prepared, output, "--max-steps", str(step + 3), "--optimizer", optimizer), "--resume")
    assert len(losses(output)) == step + 3


def _free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
