"""Measuring: the work of a batch is counted right, the limits are a machine's, and the command says it all."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from modernbert import ModernBertConfig, ModernBertDecoderConfig, ModernBertModel
from modernbert.errors import InputError
from modernbert.tools.bench import Limits, Result, lengths_of, measure, useful_flops
from modernbert.tools.picture import draw
from tests.commands import called
from tests.conftest import SMALL, threads

MACHINE = Limits(1e11, "PyTorch", 1e10, 1e10)


@pytest.mark.parametrize("kind", [ModernBertConfig, ModernBertDecoderConfig])
def test_useful_work_is_what_the_weights_and_the_visible_pairs_take(kind):
    config = kind(**SMALL)
    lengths = [1, 5, 200]
    model_weights = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    expected = 2 * sum(lengths) * model_weights * config.num_hidden_layers
    for layer_kind in config.layer_types:
        left, right = config.reach(layer_kind)
        for n in lengths:
            ahead = torch.arange(n)[None, :] - torch.arange(n)[:, None]
            seen = torch.ones(n, n, dtype=torch.bool)
            if left is not None:
                seen &= ahead >= -left
            if right is not None:
                seen &= ahead <= right
            expected += 4 * config.hidden_size * int(seen.sum())
    assert useful_flops(config, lengths) == expected


def test_workloads():
    assert lengths_of("3x40") == [40, 40, 40]
    assert lengths_of("var32") == lengths_of("var32:0") != lengths_of("var32:1")
    assert all(8 <= n <= 512 for n in lengths_of("var50"))
    assert all(64 <= n <= 8192 for n in lengths_of("long50"))
    for bad in ("0x4", "4x0", "var", "x", "1x2x3", "var0"):
        with pytest.raises(InputError, match="NxL, varN, varN:SEED"):
            lengths_of(bad)


@pytest.mark.parametrize("implementation", ["auto", "sdpa"])
def test_a_measurement(implementation):
    torch.manual_seed(0)
    model = ModernBertModel(ModernBertConfig(**SMALL), implementation).optimize_for_inference()
    result = measure(model, "var3", MACHINE, seconds=0.01)
    assert result.tokens == sum(lengths_of("var3"))
    assert result.seconds > 0
    assert result.limit >= result.flops / MACHINE.flops
    if model.runner is not None:
        assert {"qkv", "local", "global", "out", "gate", "down", "ends", "rest"} == set(result.parts)
        assert "kernels" in result.backend
    else:
        assert result.backend == "PyTorch, sdpa attention"
    with pytest.raises(InputError, match="the model takes"):
        measure(model, "1x9000", MACHINE)


def test_the_picture_is_a_picture():
    rows = [
        Result("1x16", 16, 0.1, 1e9, 0.05, {"qkv": 0.06, "rest": 0.04}, "x"),
        Result("var2", 1, 1.0, 1.0, 2.0, {}, "x"),
    ]
    root = ET.fromstring(draw("A title & more", {"float32": MACHINE}, {"float32": rows}))
    said = " ".join(element.text or "" for element in root.iter())
    assert "A title & more" in said
    assert "Longer bars are better" in said
    assert "queries, keys and values" in said
    assert "1 text of 16 tokens" in said
    assert "50% of the limit, 160 tokens/s" in said
    widths = [float(e.get("width")) for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("width") != "100%"]
    assert max(widths) <= 400


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    ModernBertModel(ModernBertConfig(**SMALL)).save_pretrained(tmp_path / "model")
    picture = tmp_path / "bench.svg"
    arguments = ["bench", str(tmp_path / "model"), "--lengths", "1x16,var2", "--seconds", "0.01"]
    with threads(1):
        code, out, _ = called(capsys, *arguments, "--dtype=float32", "--json", "--picture", picture, "--threads", "1")
    assert code == 0
    said = json.loads(out)
    assert said["threads"] == 1
    assert [r["workload"] for r in said["float32"]["results"]] == ["1x16", "var2"]
    assert said["float32"]["limits"]["flops"] > 1e8
    ET.parse(picture)
    said = called(capsys, *arguments, "--dtype", "bfloat16")[1]
    assert "1 text of 16 tokens" in said
    assert "More tokens/s is better" in said


@pytest.mark.parametrize(("arguments", "message"), [
    (["--dtype", "int8"], "--dtype is 'int8'"), (["--picture", "a.png"], "must end in .svg"),
    (["--threads", "0"], "at least 1"), (["--lengths", "many"], "the batch 'many' is unknown"),
])  # fmt: skip
def test_what_is_refused(arguments, message, capsys):
    code, _, err = called(capsys, "bench", *arguments)
    assert code == 2
    assert message in err


def test_the_benchmark_for_cards_runs_without_one(tmp_path):
    """On small models and a CPU: every part, the peers too."""
    script, out = Path(__file__).parents[2] / "benchmarks" / "gpu.py", tmp_path / "gpu.json"
    command = [sys.executable, str(script), "--smoke", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert not [part["error"] for part in found.values() if "error" in part]
    assert set(found["processes"].values()) == {"exit 0"}
    assert found["exactness"]["same bits alone"]
    assert found["exactness"]["same bits in a large batch"]
    parts = {"limits", "latency, ms", "training step", "generate 2 x (8 + 6)", "encode 2x64", "compiled peer 2x64"}
    assert parts < set(found)
    assert "| 2x64 |" in done.stdout
