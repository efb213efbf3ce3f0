"""The pages that users read: every code block runs and prints what the page shows, and every link leads somewhere.

A page is read from top to bottom, its Python in one namespace and its commands in one temporary folder. What a block
prints is compared with the ```text block that follows it, if one does: `...` stands for anything, spaces and line ends
count as one, and numbers with a point may differ a little. Comments, which a rendered page does not show, mark blocks:

    <!-- file: reviews.csv -->            the block below is the content of this file
    <!-- not run: it needs the Hub -->    the block below is only checked: syntax, imported names, flags
    <!-- needs: lancedb -->               the page is skipped where this package is not installed
"""

import ast
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main

from modernbert.cli import app, main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "examples" / "README.md",
    *sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")]),
]
PUBLIC = {
    "modernbert",
    "modernbert.corpus",
    "modernbert.errors",
    "modernbert.indexing",
    "modernbert.interop",
    "modernbert.serving",
    "modernbert.tools",
    "modernbert.training",
}
_BLOCK = re.compile(r"(?:^<!-- (file|not run): (.*?) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = r"-?\d+\.\d+"


class Block(NamedTuple):
    """A fenced block of a page; `shown` is what the page says that it prints."""

    place: str
    language: str
    code: str
    file: str | None
    reason: str | None
    shown: str | None


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    for match, after in zip(found, [*found[1:], None][: len(found)], strict=True):
        mark, value, language, code = match.groups()
        follows = after is not None and after[3] == "text" and not text[match.end() : after.start()].strip()
        if language in ("python", "bash") or mark:
            place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
            file, reason = (value if mark == kind else None for kind in ("file", "not run"))
            yield Block(place, language, code, file, reason, after[4] if follows else None)


BLOCKS = [(page, block) for page in PAGES for block in blocks_of(page)]
RUN = [page for page in PAGES if any(block.reason is None for at, block in BLOCKS if at == page)]
NOT_RUN = [block for _, block in BLOCKS if block.reason]


def commands_of(block):
    """Arguments of each command of ours; every other command has to be marked as not run."""
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    assert block.reason or all(words[0] == "modernbert" for words in commands), block.place
    return [words[words.index("modernbert") + 1 :] for words in commands if "modernbert" in words]


def run_block(block, names):
    printed = io.StringIO()
    if block.language == "python":
        with contextlib.redirect_stdout(printed):
            exec(compile(block.code, block.place, "exec"), names)
        return printed.getvalue()
    for arguments in commands_of(block):
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as end:
            main(arguments)
        assert not end.value.code, f"{block.place}: {arguments} ends with {end.value.code}\n{printed.getvalue()}"
    return printed.getvalue()


def differs(shown, printed):
    """What a page shows beside what was printed; None where they agree."""
    shown_words, printed_words = (" ".join(re.sub("─+", "─", text).split()) for text in (shown, printed))
    pattern = re.escape(shown_words).replace(r"\.\.\.", ".*?")
    pattern = re.sub(r"(\\-)?\d+\\\.\d+", lambda _: f"({_NUMBER})", pattern)
    match = re.fullmatch(pattern, printed_words, re.DOTALL)
    numbers = [float(number) for number in re.findall(_NUMBER, shown)]
    if match and [float(number) for number in match.groups()] == pytest.approx(numbers, rel=0.02, abs=0.003):
        return None
    return f"the page shows\n{shown}\nbut this was printed\n{printed}"


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run_and_print_what_the_page_shows(page, tmp_path, monkeypatch):
    for name in re.findall(r"^<!-- needs: (\w+) -->$", page.read_text(encoding="utf-8"), re.MULTILINE):
        pytest.importorskip(name, reason=f"the page needs {name}")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # pages show what a CPU prints
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.file:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.code, encoding="utf-8")
        elif block.reason is None:
            printed = run_block(block, names)
            difference = None if block.shown is None else differs(block.shown, printed)
            assert difference is None, f"{block.place}: {difference}"


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.place)
def test_code_blocks_that_are_not_run(block):
    """Their commands and flags exist; the reason is listed."""
    for arguments in commands_of(block) if block.language == "bash" else ():
        command = typer.main.get_command(app)
        context = typer.Context(command)
        while getattr(command, "commands", None) and arguments and arguments[0] in command.commands:
            command, arguments = command.commands[arguments[0]], arguments[1:]
        flags = {flag for option in command.get_params(context) for flag in (*option.opts, *option.secondary_opts)}
        given = {word for word in arguments if word.startswith("--")}
        assert given <= flags, f"{block.place}: {command.name} has no {given - flags}"
    pytest.skip(block.reason)


@pytest.mark.parametrize("block", [b for _, b in BLOCKS if b.language == "python"], ids=lambda block: block.place)
def test_pages_import_public_names_alone(block):
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "modernbert":
            assert node.module in PUBLIC, f"{block.place}: {node.module}"
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), f"{block.place}: {ast.unparse(node)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_are_of_a_kind_that_is_run_or_only_shown(page):
    """A block that is run in no test is a file, an output, settings of other programs, or marked with the reason."""
    kinds = re.findall(
        r"(<!-- (?:file|not run): .*-->\n)?^```(.*)\n(?:.|\n)*?^```$", page.read_text("utf-8"), re.MULTILINE
    )
    assert {kind for mark, kind in kinds if not mark} <= {"python", "bash", "text", "yaml", "ini"}


def anchors_of(page):
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{link} leads nowhere"
            assert not anchor or anchor in anchors_of(target), f"{link}: {target.name} has no such heading"


def test_every_page_is_linked():
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    }
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} <= linked


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md", "docs/gpu.md", "docs/invariance.md"])
def test_files_that_pages_name_exist(page):
    for path in re.findall(r"`([\w.]+(?:/[\w.]+)*(?:/|\.(?:py|c|inc)))`", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or any((ROOT / "src").rglob(path.rstrip("/"))), f"{path} does not exist"


def test_each_place_that_equal_bits_cost_names_the_page():
    page = (ROOT / "docs/invariance.md").read_text(encoding="utf-8").partition("## What it takes")[2]
    for path in re.findall(r"`([\w/]+\.(?:py|inc))`", page):
        assert "docs/invariance.md" in (ROOT / "src/modernbert" / path).read_text(encoding="utf-8"), path
