"""`modernbert quantize`, and what `modernbert info` tells of its checkpoints."""

import json

import pytest

from modernbert import AutoModelForMaskedLM
from modernbert.pipelines import small_model
from modernbert.quantization.calibration import own_texts
from tests.commands import called


def test_the_command_writes_a_checkpoint_that_info_describes(tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"body": text}) + "\n" for text in own_texts()))
    where = ["quantize", small_model(), "--output", tmp_path / "q", "--texts", texts, "--column", "body"]
    code, out, err = called(capsys, *where, "--json")
    assert code == 0, err
    assert "at the worst token" in err
    said = json.loads(out)
    assert said["bytes"]["after"] < 0.3 * said["bytes"]["before"] * 2  # the small model's file is bfloat16
    assert said["measured"]["cosine_min"] >= 0.999
    assert {path.name for path in (tmp_path / "q").iterdir()} >= {
        "tokenizer.json",
        "quantized.safetensors",
        "config.json",
    }
    code, out, err = called(capsys, "info", tmp_path / "q", "--json")
    found = json.loads(out)
    assert found["quantization"]["measured"] == said["measured"]
    assert found["model"]["parameters"] == AutoModelForMaskedLM.from_pretrained(small_model()).num_parameters()
    code, out, err = called(capsys, "info", tmp_path / "q")
    assert "at the worst token 0.999" in " ".join(out.split())
    code, out, err = called(capsys, *where)
    assert (code, out) == (2, "")
    assert "which exists already" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "int5"], "scheme is 'int5'"),
        (["--column", "a"], "--column is for --texts"),
        (["--texts", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--scheme", "int4", "--min-cosine", "0.9999", "--most-kept", "0"], "int4 was refused"),
    ],
)
def test_a_command_that_cannot_be_served_writes_nothing(arguments, message, tmp_path, capsys):
    code, out, err = called(capsys, "quantize", small_model(), "--output", tmp_path / "q", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())
