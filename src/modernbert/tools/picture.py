"""A picture of measurements: how near to the machine's limit each batch comes, and where its time goes."""

from __future__ import annotations

from html import escape

from modernbert.tools.bench import PARTS, Limits, Result, described

_LEFT, _LABEL, _BAR, _WIDTH = 16, 250, 400, 910  # the margin, where bars begin, the length of 100 %, the whole picture
_ROW = 30
_COLOURS = ("#2563eb", "#0891b2", "#0d9488", "#65a30d", "#d97706", "#dc2626", "#7c3aed", "#6b7280")
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1b1f24 } .soft { fill: #566070 } .bold { font-weight: 600 }
.paper { fill: #fff } .track { fill: #eef1f5 } .grid { stroke: #c5ccd5 }
@media (prefers-color-scheme: dark) { text { fill: #e7eaef } .soft { fill: #a0aaba } .paper { fill: #12151a }
.track { fill: #232a34 } .grid { stroke: #4a5463 } }
"""


def draw(title: str, machines: dict[str, Limits], results: dict[str, list[Result]]) -> str:
    """An SVG with a bar for each batch: its length is the share of the limit, its colours are where the time goes.

    Args:
        title: its first line.
        machines: limits of each dtype.
        results: measurements of each dtype.
    """
    best = "Longer bars are better: 100 % is the least time that this machine can take for the batch."
    body, y = [_text(_LEFT, 30, f"Speed of {title}", "bold", 17), _text(_LEFT, 52, best, "soft")], 52
    for dtype, rows in results.items():
        machine = machines[dtype]
        flops, reading = f"{machine.flops / 1e9:,.0f} GFLOP/s in products", f"{machine.reading / 1e9:.1f} GB/s"
        y += 34
        body.append(_text(_LEFT, y, dtype, "bold", 15))
        body.append(_text(_LEFT + 9 * len(dtype) + 8, y, f"at most {flops}, {reading} reading memory", "soft"))
        y += 20
        for percent in (0, 25, 50, 75, 100):
            x = _LABEL + _BAR * percent / 100
            body.append(_text(x, y, f"{percent} %", "soft", 11, "middle"))
            body.append(f'<path class="grid" d="M{x:.1f} {y + 5}v{_ROW * len(rows)}"/>')
        for row in rows:
            y += _ROW
            body += _bar(row, y)
    names = [name for name in PARTS if any(name in row.parts for rows in results.values() for row in rows)]
    if names:
        y += 38
        body.append(_text(_LEFT, y, "Where the time goes:", "soft"))
    for i, name in enumerate(names):
        x = _LEFT + (i % 3) * 280
        y += 24 if i % 3 == 0 else 0
        body += [_box(x, y - 11, 13, f'fill="{_colour(name)}"', height=13), _text(x + 20, y, PARTS[name])]
    y += 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}" role="img">'
        f'<style>{_STYLE}</style><rect class="paper" width="100%" height="100%"/>{"".join(body)}</svg>\n'
    )


def _bar(row: Result, y: int) -> list[str]:
    """The label of a batch, its bar in the colours of the parts, and its numbers."""
    label = _text(_LABEL - 10, y - 4, described(row.workload), "", 13, "end")
    body, share, x = [label, _box(_LABEL, y - 18, _BAR, 'class="track"')], row.limit / row.seconds, float(_LABEL)
    parts = {name: row.parts[name] for name in PARTS if name in row.parts} or {"": 1.0}
    for name, seconds in parts.items():
        part = seconds / sum(parts.values())
        width = _BAR * min(1.0, share) * part
        tip = f"<title>{escape(PARTS.get(name, 'all of the pass'))}: {part:.0%} of the time</title>"
        body.append(_box(x, y - 18, width, f'fill="{_colour(name)}"', tip))
        x += width
    numbers = f"{share:.0%} of the limit, {row.tokens / row.seconds:,.0f} tokens/s"
    return [*body, _text(_LABEL + _BAR + 14, y - 4, numbers)]


def _colour(part: str) -> str:
    return _COLOURS[list(PARTS).index(part) if part in PARTS else 0]


def _text(x: float, y: float, text: str, name: str = "", size: int = 13, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y}" text-anchor="{anchor}"'
    return f'<text {place} class="{name}" style="font-size: {size}px">{escape(text)}</text>'


def _box(x: float, y: float, width: float, fill: str, inside: str = "", height: int = 20) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" {fill}>{inside}</rect>'
