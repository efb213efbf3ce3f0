"""Draw docs/numbers.svg from benchmarks/results.json: speed beside transformers and OpenVINO.

python benchmarks/picture.py
"""

import json
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTENDERS = {"modernbert": ("modernbert, this library", "#2563eb"), "transformers": ("transformers", "#d18b2c"),
              "openvino": ("OpenVINO", "#7d8794")}  # fmt: skip
BATCHES = {
    "1x16": "1 text of 16 tokens",
    "8x128": "8 texts of 128 tokens",
    "4x512": "4 texts of 512 tokens",
    "var32": "32 texts of mixed length",
    "1x2048": "1 text of 2,048 tokens",
    "1x8192": "1 text of 8,192 tokens",
}
WIDTH, LABEL, BAR, ROW = 820, 210, 480, 20  # of the picture, the labels, the longest bar; height of a bar
STYLE = """
text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1b1f24 } .soft { fill: #566070 }
.title { font-size: 18px; font-weight: 600 } .best { font-weight: 700 } .paper { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #e7eaef } .soft { fill: #a0aaba } .paper { fill: #12151a } }
"""


def text(x, y, words, name="", anchor="start"):
    """A line of text."""
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{name}" text-anchor="{anchor}">{escape(words)}</text>'


def main():
    """Read the results and write the picture."""
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    speeds = {
        batch: {name: results["tokens"][batch] / row[name]["seconds"] for name in CONTENDERS}
        for batch, row in results["workloads"].items()
    }
    most = max(speed for row in speeds.values() for speed in row.values())
    body = [
        text(16, 30, "How many tokens a second ModernBERT of base size reads", "title"),
        text(
            16,
            54,
            f"Longer is better. {results['dtype']}, {results['threads']} CPU cores; padding does not count.",
            "soft",
        ),
    ]
    x, y = 16, 82
    for name, colour in CONTENDERS.values():
        body += [f'<rect x="{x}" y="{y - 12}" width="14" height="14" fill="{colour}"/>', text(x + 21, y, name)]
        x += 44 + 7 * len(name)
    y += 14
    for batch, named in BATCHES.items():
        y += 10
        body.append(text(LABEL - 12, y + 1.5 * ROW + 5, named, anchor="end"))
        for name, speed in speeds[batch].items():
            width, is_best = BAR * speed / most, speed == max(speeds[batch].values())
            body.append(
                f'<rect x="{LABEL}" y="{y + 1}" width="{width:.1f}" height="{ROW - 2}" fill="{CONTENDERS[name][1]}"/>'
            )
            body.append(text(LABEL + width + 7, y + ROW - 5, f"{speed:,.0f} tokens/s", "best" if is_best else ""))
            y += ROW
    y += 16
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" role="img">'
        f"<title>Tokens a second of modernbert, transformers and OpenVINO</title><style>{STYLE}</style>"
        f'<rect class="paper" width="100%" height="100%"/>{"".join(body)}</svg>\n'
    )
    (ROOT / "docs" / "numbers.svg").write_text(svg)


if __name__ == "__main__":
    main()
