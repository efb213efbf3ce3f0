"""Draw docs/numbers.svg from benchmarks/results.json: time and memory beside transformers.

pip install matplotlib && python benchmarks/picture.py
"""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "modernbert"  # the same bytes at every run
import matplotlib.pyplot as plt  # noqa: E402 (after the backend is chosen)

ROOT = Path(__file__).parent.parent
COLOURS = {"modernbert": "#2563eb", "transformers": "#9ca3af"}


def panel(axes, title, unit, rows):
    """Bars of one measure; `rows` are labels with a figure for each contender."""
    places, labels = [], []
    for i, (label, figures) in enumerate(rows):
        for j, (name, figure) in enumerate(figures.items()):
            y = i * 3 + j
            axes.barh(y, figure, color=COLOURS[name], height=0.9)
            text = f"{figure:,.1f}" if figure < 100 else f"{figure:,.0f}"
            axes.text(figure, y, f" {text} {unit}", va="center", fontsize=9)
        places.append(i * 3 + (len(figures) - 1) / 2)
        labels.append(label)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlim(0, max(f for _, figures in rows for f in figures.values()) * 1.3)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def main():
    """Read the results and write the picture."""
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.6))
    names = {"var32": "32 mixed texts", "1x8192": "one text of 8,192"}
    contenders = ("modernbert", "transformers")

    def rows(key, scale):
        table = results["workloads"]
        return [(label, {c: table[w][c][key] * scale for c in contenders}) for w, label in names.items()]

    panel(left, "Seconds", "s", rows("seconds", 1))
    panel(right, "Peak memory of the process", "GiB", rows("peak_kib", 2**-20))
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[c]) for c in contenders]
    figure.legend(
        handles,
        ["modernbert", f"transformers {results['transformers']} (sdpa)"],
        loc="lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(ROOT / "docs" / "numbers.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
