"""The examples print what their first lines say; the page of the site and the README show the same.

An example is run in this process, in an empty folder. A line with `...` stands for what may differ between processors.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.test_docs import PUBLIC, differs

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "walk.ipynb"
NEEDS = {"answer_questions": ["lancedb"], "search_folder": ["lancedb"], "serve_demo": ["lancedb", "fastapi"]}
LONG = ("classify_csv", "tag_words")


def shown(script):
    """The lines that a script says it prints: the indented ones after `and prints:`."""
    about = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    return textwrap.dedent(re.search(r"prints:\n\n((?:    .*\n)+)", about)[1])


def printed(script, tmp_path, monkeypatch, *arguments):
    for name in NEEDS.get(script.stem, []):
        pytest.importorskip(name, reason=f"the example needs {name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", [script.name, *arguments])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(script), run_name="__main__")
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
    return out.getvalue()


def runs():
    for script in SCRIPTS:
        marks = [pytest.mark.slow] if script.stem in LONG else []
        marks += [pytest.mark.network] if script.stem == "serve_demo" else []
        yield pytest.param(script, marks=marks, id=script.stem)


@pytest.mark.parametrize("script", list(runs()))
def test_an_example_prints_what_it_says(script, tmp_path, monkeypatch):
    difference = differs(shown(script), printed(script, tmp_path, monkeypatch))
    assert difference is None, difference


@pytest.mark.parametrize("name", LONG)
def test_a_long_example_runs_through_when_it_is_made_short(name, tmp_path, monkeypatch):
    script = EXAMPLES / f"{name}.py"
    lines, wanted = printed(script, tmp_path, monkeypatch, "--epochs", "1").splitlines(), shown(script).splitlines()
    assert len(lines) == len(wanted)
    assert lines[0] == wanted[0]
    assert re.search(r" [01]\.\d\d\b", lines[1])


def test_a_search_takes_a_folder_and_questions_of_your_own(tmp_path, monkeypatch):
    pytest.importorskip("lancedb", reason="the example needs lancedb")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "ships.txt").write_text("Two ships sailed from England.")
    (folder / "bread.txt").write_text("Bread is baked from flour.")
    main = runpy.run_path(str(EXAMPLES / "search_folder.py"))["main"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(folder, "ships from England")
    expected = ["ships from England", "    ships.txt: Two ships sailed from England. ..."]
    assert out.getvalue().splitlines()[1:] == expected


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_is_short_says_how_it_is_run_and_imports_public_names_alone(script):
    code = script.read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 90
    about = ast.get_docstring(ast.parse(code))
    assert f"python examples/{script.name}" in about
    assert "pip install" in about
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("modernbert"):
            assert node.module in PUBLIC
            assert all(hasattr(importlib.import_module(node.module), name.name) for name in node.names)


def test_every_example_is_listed_and_shown_with_its_output():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in [*SCRIPTS, NOTEBOOK]:
        assert f"]({path.name})" in listed
        assert f"examples/{path.name}" in page
    for script in SCRIPTS:
        assert f"```text\n{shown(script)}```" in page, f"docs/examples.md does not show what {script.name} prints"


def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def outputs_of(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")


def test_the_notebook_has_its_outputs_and_nothing_of_the_machine_that_made_them():
    assert NOTEBOOK.stat().st_size < 20_000
    for number, cell in enumerate(cells(), 1):
        assert cell["execution_count"] == number
        assert [output["output_type"] for output in cell["outputs"]] == ["stream"]
        assert [output["name"] for output in cell["outputs"]] == ["stdout"]
    assert not re.search(r"/(home|root|tmp|work|Users)/", NOTEBOOK.read_text(encoding="utf-8"))


def test_the_cells_of_the_notebook_print_what_it_shows(tmp_path, monkeypatch):
    import modernbert

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = modernbert.logging.get_verbosity()
    names = {"__name__": "__main__"}
    try:
        for cell in cells():
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("".join(cell["source"]), "cell", "exec"), names)
            difference = differs(outputs_of(cell), out.getvalue())
            assert difference is None, difference
    finally:
        modernbert.logging.set_verbosity(before)


@pytest.mark.slow
def test_jupyter_runs_the_notebook(tmp_path):
    pytest.importorskip("ipykernel", reason="the notebook needs a kernel of Jupyter")
    client = pytest.importorskip("nbclient", reason="nbclient runs the notebook")
    nbformat = pytest.importorskip("nbformat", reason="nbformat reads the notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell, new in zip(cells(), ran, strict=True):
        difference = differs(outputs_of(cell), outputs_of(new))
        assert difference is None, difference


def test_an_example_is_a_program_of_its_own():
    """As a user starts it, from another folder; it says what is wrong with its arguments in one line."""
    script = EXAMPLES / "classify_csv.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--epochs" in done.stdout
