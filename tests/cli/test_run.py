"""`modernbert run` as a user meets it: in a process of its own."""

import io
import json
import os
import subprocess
import sys

import pytest

from modernbert.cli import main


def run(*arguments, stdin="", **environment):
    command = [sys.executable, "-c", "from modernbert.cli import main; main()", *arguments]
    return subprocess.run(
        command,
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        check=False,
        env={**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1", **environment},
    )


def test_a_table_for_arguments():
    done = run("run", "The dog ran across the [MASK].", "--top-k", "3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "The dog ran across the [MASK]."
    assert [w for w in ("score", "word", "text") if w in lines[1] + lines[2]] == ["score", "word", "text"]
    assert sum("The dog ran across the" in line for line in lines) == 4
    assert not done.stderr


def test_several_masks_give_several_tables():
    done = run("run", "The [MASK] ran across the [MASK].", "--top-k", "1")
    assert "mask 1" in done.stdout.decode()
    assert "mask 2" in done.stdout.decode()


def test_json_one_object_a_line_in_order_from_standard_input_and_from_a_file(tmp_path):
    texts = [f"Sentence {i} has a [MASK] in it." for i in range(40)] + ["Två [MASK] på svenska: åäö “quoted”."]
    file = tmp_path / "texts.txt"
    file.write_bytes(("\r\n".join(texts) + "\n\n").encode())
    piped = run("run", "--task", "fill-mask", "--json", "--top-k", "2", stdin="\n".join(texts))
    read = run("run", "--json", "--top-k", "2", "--file", str(file))
    assert piped.returncode == read.returncode == 0, piped.stderr + read.stderr
    assert piped.stdout == read.stdout
    rows = [json.loads(line) for line in piped.stdout.decode().splitlines()]
    assert [row["input"] for row in rows] == texts
    assert all(set(row) == {"input", "output"} and len(row["output"]) == 2 for row in rows)
    assert set(rows[0]["output"][0]) == {"score", "token", "token_str", "sequence"}
    alone = run("run", "--json", "--top-k", "2", texts[7])
    assert json.loads(alone.stdout) == rows[7]


def test_targets():
    done = run("run", "--json", "The dog ran across the [MASK].", "--target", "house", "--target", "door")
    assert {a["token_str"] for a in json.loads(done.stdout)["output"]} == {" house", " door"}


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("run", "no mask"), "", "there is no [MASK] in 'no mask'"),
        (("run",), "", "no text: standard input is empty or blank"),
        (("run",), "\n \n", "no text: standard input is empty or blank"),
        (("run",), b"fine [MASK]\n\xff\xfe [MASK]\n", "standard input, line 2, is not UTF-8"),
        (("run", "[MASK]", "--task", "sing"), "", "task is 'sing'; choose one of fill-mask"),
        (("run", "[MASK]", "--model", "./no/such/folder"), "", "neither a folder on this disk"),
        (
            ("run", "[MASK]", "--model", "no-one/nothing"),
            "",
            "no such model in the cache",
        ),
        (("run", "[MASK]", "--top-k", "many"), "", "'--top-k'"),
        (("run", "[MASK]", "--top-k", "0"), "", "--top-k is 0"),
        (("run", "[MASK]", "--device", "toaster"), "", "--device is 'toaster'"),
        (("run", "[MASK]", "--dtype", "int3"), "", "--dtype is torch.int3"),
        (("run", "[MASK]", "--attn-implementation", "magic"), "", "--attn-implementation is 'magic'"),
        (("run", "[MASK]", "--file", "x"), "", "texts are given both as arguments and by --file"),
        (("run", "--file", "/no/such/file"), "", "/no/such/file"),
        (("sing",), "", "No such command 'sing'"),
        (("run", "[MASK]", "--loud"), "", "No such option"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, stdin, message, monkeypatch, capsys):
    given = io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("modernbert: ")
    assert message in lines[0]


def test_bad_input_ends_a_process_the_same_way():
    done = run("run", "no mask")
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [
        "modernbert: there is no [MASK] in 'no mask'; write it where a word is missing"
    ]
    assert not done.stdout


def test_a_gpu_that_is_not_there_is_said_and_the_cpu_serves():
    done = run("run", "--device", "0", "The dog ran across the [MASK].", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "no GPU; the CPU is used" in done.stderr.decode()


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -c 'from modernbert.cli import main; main()' run --json | head -n 1"
    texts = "\n".join(f"Sentence {i} has a [MASK] in it." for i in range(2000))
    done = subprocess.run(["bash", "-c", command], input=texts.encode(), capture_output=True, check=False)
    assert json.loads(done.stdout)["input"].startswith("Sentence 0")
    assert not done.stderr, done.stderr


@pytest.mark.parametrize("task", [["--task", "ner"], ["--task=token-classification"]])
def test_help_lists_the_options_of_the_task(task, capsys):
    for arguments, listed in ((["run", *task, "--help"], True), (["run", "--help"], False)):
        with pytest.raises(SystemExit):
            main(arguments)
        assert ("--ignore-labels" in capsys.readouterr().out) is listed


def test_help_and_version():
    assert b"train-tokenizer" in run("--help").stdout
    assert run("--version").stdout.startswith(b"modernbert 0.")
    assert b"--top-k" in run("run", "--help").stdout
