"""`modernbert doctor`: what it finds of this installation, what it calls broken, and what it says of a model."""

import importlib.metadata
import json

import pytest
import torch

from modernbert import ModernBertForSequenceClassification
from modernbert.engines.cpu.library import library
from modernbert.pipelines import small_model
from modernbert.tools import doctor
from modernbert.tools.doctor import examine
from tests.commands import called, run
from tests.conftest import threads


def test_the_command_says_what_there_is_and_what_runs_a_model(capsys):
    code, out, err = called(capsys, "doctor", small_model(), "--json")
    found = json.loads(out)
    assert (code, err, found["ok"], found["problems"]) == (0, "", True, [])
    assert found["torch"]["version"] == torch.__version__
    kernels = library()
    assert found["kernels"]["serving"] == ("none" if kernels is None else kernels.name)
    assert {"encoder, float32, cpu", "decoder, bfloat16, cpu"} <= found["self-test"].keys()
    assert all(said.startswith("OK, ") for said in found["self-test"].values())
    assert (found["model"]["task"], found["model"]["class"]) == ("fill-mask", "ModernBertForMaskedLM")
    expected = "kernels, whole layers" if kernels is not None else "module by module"
    assert expected in found["runs on"]["cpu, float32"]
    code, out, _ = called(capsys, "doctor")
    assert code == 0
    assert "Nothing is broken." in out
    for name in ("threads", "oneDNN", "Hub cache", "self-test"):
        assert name in out


def test_a_model_that_is_not_there_is_one_line(capsys):
    code, out, err = called(capsys, "doctor", "./none")
    assert (code, out) == (2, "")
    assert "'./none' is neither a folder on this disk nor the id of a repository" in err


def test_kernels_that_do_not_exist_are_broken():
    done = run("doctor", small_model(), MODERNBERT_KERNELS="nonsense")
    assert done.returncode == 1, done.stderr
    assert "MODERNBERT_KERNELS is 'nonsense'; choose one of" in done.stdout.decode()


def test_a_wrong_result_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_LIMITS", {torch.bfloat16: 1e-6})
    code, out, _ = called(capsys, "doctor", "--json")
    assert code == 1
    assert any("differs by" in problem for problem in json.loads(out)["problems"])


@pytest.mark.parametrize(
    ("requirement", "problem", "advice"),
    [
        ("torch>=99", "is installed, and the package needs >=99", ""),
        ("nonsense-package>=1", "nonsense-package is missing: install the package again", ""),
        ("torch<1; extra == 'serve'", "", "is installed, and serve needs <1"),
        ("nonsense-package>=1; extra == 'serve'", "", ""),
    ],
)
def test_packages_are_held_against_what_is_supported(monkeypatch, requirement, problem, advice):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [requirement])
    report = examine()
    assert len(report.problems) == bool(problem)
    assert problem in "".join(report.problems)
    assert advice in "".join(report.advice)
    assert ("self-test" in report.sections) == (not problem)


def test_threads_beyond_what_a_container_allows_are_named():
    with threads(2):
        report = examine(cores=8, quota=1.5)
    assert any("PyTorch takes 2 threads, and this process may use 1.5 cores' worth" in line for line in report.advice)
    with threads(1):
        assert not any("PyTorch takes" in line for line in examine(cores=1).advice)


def test_info_and_doctor_describe_an_adapter_and_a_model_without_a_tokenizer(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model = ModernBertForSequenceClassification.from_pretrained(small_model(), num_labels=3)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["Wi"])).save_pretrained(tmp_path / "adapter")
    found = json.loads(called(capsys, "info", tmp_path / "adapter", "--json")[1])
    assert found["adapter"]["of"] == str(tmp_path / "base")
    assert (found["adapter"]["kind"], found["adapter"]["rank"], found["adapter"]["layers"]) == ("LoRA", 2, "Wi")
    code, out, _ = called(capsys, "doctor", tmp_path / "adapter", "--json")
    said = json.loads(out)
    assert (code, said["model"]["adapter"]["rank"]) == (1, 2)
    assert any("has no tokenizer.json" in problem for problem in said["problems"])
