"""A picture of measurements: tokens a second, and how much of the limit that is."""

from __future__ import annotations

from html import escape

from modernbert.bench.measure import Limits, Result

_ROW, _LABEL, _BAR, _WIDTH = 26, 190, 420, 860
_COLOURS = ("#1d4ed8", "#0ea5e9", "#14b8a6", "#84cc16", "#f59e0b", "#ef4444", "#8b5cf6", "#9ca3af")


def draw(title: str, machines: dict[str, Limits], results: dict[str, list[Result]]) -> str:
    """An SVG with a bar for each batch: its length is the share of the limit, its colours are where the time goes.

    Args:
        title: its first line.
        machines: limits of each dtype.
        results: measurements of each dtype.
    """
    names = list(dict.fromkeys(name for rows in results.values() for row in rows for name in row.parts))
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    y, body = 24, [_text(12, 24, title, 15)]
    for dtype, rows in results.items():
        y += _ROW + 6
        limit = machines[dtype]
        body.append(
            _text(12, y, f"{dtype}: limit {limit.flops / 1e9:,.0f} GFLOP/s, {limit.reading / 1e9:.1f} GB/s", 13)
        )
        for row in rows:
            y += _ROW
            share = min(1.0, row.limit / row.seconds)
            body.append(_text(24, y, row.workload, 12))
            body.append(_box(_LABEL, y - 13, _BAR, "#f3f4f6"))
            x, total = float(_LABEL), sum(row.parts.values())
            for name, seconds in row.parts.items() if total else [("", 1.0)]:
                width = _BAR * share * seconds / (total or 1.0)
                body.append(_box(x, y - 13, width, colour.get(name, _COLOURS[0])))
                x += width
            said = f"{row.limit / row.seconds:.0%} of the limit, {row.tokens / row.seconds:,.0f} tokens/s"
            body.append(_text(_LABEL + _BAR + 10, y, said, 12))
    y += _ROW
    x = 12.0
    for name in names:
        if x + 30 + 7 * len(name) > _WIDTH:
            x, y = 12.0, y + 20
        body += [_box(x, y - 10, 12, colour[name], 12), _text(x + 17, y, name, 12)]
        x += 34 + 7 * len(name)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 16}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(body)}</svg>\n'
    )


def _text(x: float, y: float, text: str, size: int) -> str:
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}" fill="#111827">{escape(text)}</text>'


def _box(x: float, y: float, width: float, fill: str, height: int = 17) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{fill}"/>'
