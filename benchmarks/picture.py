"""Draw docs/numbers.svg from benchmarks/results.json: speed beside transformers and OpenVINO.

pip install matplotlib && python benchmarks/picture.py
"""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "modernbert"  # the same bytes at every run
import matplotlib.pyplot as plt  # noqa: E402 (after the backend is chosen)

ROOT = Path(__file__).parent.parent
COLOURS = {"modernbert": "#2563eb", "transformers": "#9ca3af", "openvino": "#d1d5db"}


def panel(axes, title, unit, rows):
    """Bars of one measure; `rows` are labels with a figure for each contender."""
    places, labels = [], []
    for i, (label, figures) in enumerate(rows):
        for j, (name, figure) in enumerate(figures.items()):
            y = i * (len(COLOURS) + 1) + j
            axes.barh(y, figure, color=COLOURS[name], height=0.9)
            text = f"{figure:,.1f}" if figure < 100 else f"{figure:,.0f}"
            axes.text(figure, y, f" {text} {unit}", va="center", fontsize=9)
        places.append(i * (len(COLOURS) + 1) + (len(figures) - 1) / 2)
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
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    names = {
        "8x128": "8 texts of 128",
        "4x512": "4 texts of 512",
        "var32": "32 mixed texts",
        "1x2048": "one text of 2,048",
        "1x8192": "one text of 8,192",
    }
    table = results["workloads"]

    def speeds(workloads):
        return [(names[w], {c: results["tokens"][w] / table[w][c]["seconds"] for c in COLOURS}) for w in workloads]

    panel(axes[0], "Real tokens a second", "", speeds(["8x128", "4x512", "var32"]))
    panel(axes[1], "", "", speeds(["1x2048", "1x8192"]))
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(
        handles,
        list(COLOURS),
        loc="lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(ROOT / "docs" / "numbers.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
