"""Build the documentation site: `docs/` and the pages that lie elsewhere, by Zensical, with warnings as errors.

The pages are plain Markdown that GitHub shows, too. Here they are copied to `build/pages`, with what a site needs:
links to pages outside of `docs/` lead to their copies, and the comment `<!-- reference: NAME -->` becomes what
mkdocstrings makes of that name's docstring.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
# Pages that lie outside of docs/, and where they stand in the site.
ELSEWHERE = {
    "README.md": "index.md",  # the site's home page says the same
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "src/modernbert/small/encoder/README.md": "small-encoder.md",
    "src/modernbert/small/decoder/README.md": "small-decoder.md",
    "src/modernbert/small/sentence-encoder/README.md": "small-sentence-encoder.md",
    "src/modernbert/small/sparse-encoder/README.md": "small-sparse-encoder.md",
    "src/modernbert/small/multi-vector-encoder/README.md": "small-multi-vector-encoder.md",
}
_LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_REFERENCE = re.compile(r"^<!-- reference: ([\w.]+) -->$", re.MULTILINE)


def sources() -> dict[Path, Path]:
    """Each page's file, and where it stands in the site; pictures too."""
    found = {path: path.relative_to(ROOT / "docs") for path in sorted((ROOT / "docs").rglob("*")) if path.is_file()}
    found |= {ROOT / path: Path(place) for path, place in ELSEWHERE.items() if path != "README.md"}
    return found


def page(source: Path, places: dict[Path, Path]) -> str:
    """A page as the site has it."""
    here = places[source].parent

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        place = places.get(target)
        if place is None and target.is_relative_to(ROOT):
            place = Path(ELSEWHERE.get(str(target.relative_to(ROOT)), "")) or None
        if place is None or not place.name:
            raise SystemExit(f"{source.relative_to(ROOT)} links to {link[1]}, which is no page of the site")
        return os.path.relpath(place, here) + (link[2] or "")

    text = _LINK.sub(moved, source.read_text(encoding="utf-8"))
    level = 3 if re.search(r"^## ", text, re.MULTILINE) else 2
    return _REFERENCE.sub(rf"\n::: \1\n    options:\n      heading_level: {level}\n", text)


def build(url: str, out: Path) -> int:
    """Write the site to `out`/site; 0 if nothing was complained of."""
    places, pages = sources(), out / "pages"
    for folder in (pages, out / "site", out / ".cache"):
        shutil.rmtree(folder, ignore_errors=True)
    for source, place in places.items():
        target = pages / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            target.write_text(page(source, places), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    shutil.copyfile(SITE / "style.css", pages / "style.css")
    config = (SITE / "zensical.toml").read_text(encoding="utf-8").replace("SITE_URL", url)
    (out / "zensical.toml").write_text(config.replace("ROOT", str(ROOT)), encoding="utf-8")
    paths = [str(SITE), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(out / "zensical.toml")]
    done = subprocess.run(
        command, env=environment, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, end="")
    return done.returncode or int(bool(warnings_of(done.stdout)))


def warnings_of(output: str) -> list[str]:
    """What was complained of; Zensical's strict mode knows nothing of docstrings that griffe cannot read."""
    return [line for line in output.splitlines() if re.match(r"(griffe|mkdocstrings|.*warning)\b", line, re.IGNORECASE)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/", help="where the site will stand")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build", help="folder for the site and what it is made of"
    )
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    sys.exit(build(given.url, given.output.resolve()))
