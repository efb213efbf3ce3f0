"""The documentation site: its navigation, its reference and its pictures; and, slowly, the built site itself."""

import fnmatch
import html.parser
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import tomllib
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml

import modernbert
import modernbert.corpus
import modernbert.errors
import modernbert.indexing
import modernbert.interop
import modernbert.serving
import modernbert.tools
import modernbert.training
from modernbert.pipelines import TASKS
from modernbert.serving.app import _PROBLEMS

ROOT = Path(__file__).parents[1]
SMALL = {name for _, name in TASKS.values() if name is not None}
PACKAGES = (
    modernbert,
    modernbert.corpus,
    modernbert.indexing,
    modernbert.interop,
    modernbert.serving,
    modernbert.tools,
    modernbert.training,
)
BUILDER = ROOT / ".venv-docs" / "bin" / "python"  # where site/build installs Zensical


def script(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, pictures = script("build"), script("pictures")


def pages_of(nav):
    for entry in nav:
        inside = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from [inside] if isinstance(inside, str) else pages_of(inside)


def test_every_page_is_in_the_navigation_once_and_those_for_users_in_llms_txt():
    project = tomllib.loads((ROOT / "site" / "zensical.toml").read_text())["project"]
    pages = [str(place) for place in build.sources().values() if place.suffix == ".md"]
    assert sorted(pages_of(project["nav"])) == sorted(pages)
    patterns = [pattern for patterns in project["plugins"]["llmstxt"]["sections"].values() for pattern in patterns]
    missing = {page for page in pages if not any(fnmatch.fnmatch(page, pattern) for pattern in patterns)}
    elsewhere = {path.removesuffix(".md") for path in missing}
    assert elsewhere == {"changelog", "contributing", "security", *(f"small-{name}" for name in SMALL)}


@pytest.mark.parametrize("source", [p for p in build.sources() if p.suffix == ".md"], ids=lambda p: p.name)
def test_links_of_a_page_lead_to_pages_of_the_site(source):
    places = build.sources()
    text = build.page(source, places)
    for link in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", text):
        if not link.startswith(("http://", "https://")):
            target = Path(urljoin(f"/{places[source]}", link).lstrip("/"))
            assert target in places.values(), f"{source}: {link}"


def test_a_link_out_of_the_site_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    source = tmp_path / "docs" / "page.md"
    source.parent.mkdir()
    source.write_text("[code](../src/code.py)")
    with pytest.raises(SystemExit, match=r"docs/page\.md links to \.\./src/code\.py, which is no page of the site"):
        build.page(source, {source: Path("page.md")})


def test_every_public_name_stands_on_a_page_of_the_reference():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    described = re.findall(r"^<!-- reference: ([\w.]+) -->$", text, re.MULTILINE)
    assert len(described) == len(set(described))
    told = set(re.findall(r"`([\w.]+)`", text))
    classes = {id(pkgutil.resolve_name(name)) for name in described}
    for package in PACKAGES:
        for name in package.__all__:
            value, full = getattr(package, name), f"{package.__name__}.{name}"
            short = full.removeprefix("modernbert.")
            is_elsewhere = not getattr(value, "__module__", "").startswith("modernbert.") or id(value) in classes
            assert full in described or (is_elsewhere and {name, short} & told), f"{full} is on no page"
    for name, value in vars(modernbert.errors).items():
        if inspect.isclass(value) and issubclass(value, Exception):
            assert f"modernbert.errors.{name}" in described
            assert f"`{name}`" in (ROOT / "docs/errors.md").read_text(encoding="utf-8"), f"errors.md lacks {name}"


def test_the_page_of_errors_has_every_status_of_the_server():
    statuses = re.findall(r"^\| (\d{3}) \|", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(map(int, statuses)) == sorted(_PROBLEMS)


def test_docstrings_that_cannot_be_read_fail_the_build():
    line = "griffe: src/modernbert/text/tokenizer.py:550: Failed to get 'name: description' pair"
    assert build.warnings_of(f"Build started\n{line}\nNo issues found\n") == [line]
    assert build.warnings_of("\x1b[33mWarning:\x1b[0m page does not exist\n")
    assert not build.warnings_of("Build started\nNo issues found\nBuild finished in 9.1s\n")


def test_files_for_visitors_of_the_repository_say_what_is_true():
    read = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").rglob("*.yml")}
    steps = [step.get("run", "") for job in read["check.yml"]["jobs"].values() for step in job["steps"]]
    assert "./check" in steps
    assert "site/build" in steps
    for name in ("bug.yml", "slow.yml", "wish.yml"):
        assert {part["type"] for part in read[name]["body"]} <= {"textarea", "input", "checkboxes"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == modernbert.__version__
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_what_their_script_draws(name):
    assert (ROOT / f"docs/pictures/{name}.svg").read_text(encoding="utf-8") == pictures.PICTURES[name]()


class Page(html.parser.HTMLParser):
    """Links and anchors of a built page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if link := found.get("src" if tag in ("img", "script") else "href"):
            self.links.append(link)


@pytest.mark.slow
@pytest.mark.skipif(not BUILDER.exists(), reason="site/build has not installed Zensical in .venv-docs")
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path):
    command = [BUILDER, "site/build.py", "--output", tmp_path, "--url", "https://site.invalid/docs/"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    built = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(built) >= sum(place.suffix == ".md" for place in build.sources().values())
    broken = []
    for path, page in built.items():
        here = f"/docs/{path.relative_to(site)}"
        for link in page.links:
            parts = urlsplit(urljoin(f"https://site.invalid{here}", link))
            if parts.netloc != "site.invalid":
                assert parts.netloc in ("", "zensical.org") or parts.scheme == "https", f"{here}: {link}"
                continue
            target = site / unquote(parts.path).removeprefix("/docs/").removeprefix("/docs")
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (
                parts.fragment and target in built and unquote(parts.fragment) not in built[target].anchors
            ):
                broken.append(f"{here}: {link}")
    assert not broken, broken
    for name in ("llms.txt", "llms-full.txt", "sitemap.xml", "objects.inv"):
        assert (site / name).stat().st_size > 1000, name
    full = (site / "llms-full.txt").read_text(encoding="utf-8")
    assert "ModernBertForMaskedLM" in full
    assert "Start in five minutes" in (site / "llms.txt").read_text(encoding="utf-8")
