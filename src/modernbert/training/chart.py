"""Line charts as SVG that a page's own style colours: text stays text, and light and dark pages share one drawing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 8, 36  # what axes and their labels take
_POINTS = 400  # stretches of a line; of each the lowest and the highest point are drawn


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the key.
        values: one for each x; NaN where there is none.
        style: its class in the page's style: "faint", or "line0", "line1", ... in the order of the key.
        marked: whether each point gets a dot that tells its value.
    """

    name: str
    values: Sequence[float]
    style: str = "line0"
    marked: bool = False


def draw_lines(x: Sequence[float], lines: Sequence[Line], x_label: str) -> str:
    """An SVG of lines over a common axis; empty where no line has a number.

    Args:
        x: rising numbers, one a point.
        lines: at least one, drawn in this order.
        x_label: what x counts.
    """
    numbers = [value for line in lines for value in line.values if math.isfinite(value)]
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    if 0 <= low < 0.6 * high:  # a scale that begins at 0 shows shares as they are, where there is room for it
        low = 0.0
    y_ticks, x_ticks = _ticks(low, high, 4), _ticks(x[0], x[-1], 5, whole=True)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    across = (_WIDTH - _LEFT - _RIGHT) / ((x[-1] - x[0]) or 1.0)
    up = (_HEIGHT - _TOP - _BOTTOM) / ((high - low) or 1.0)

    def place(at: float, value: float) -> tuple[float, float]:
        return _LEFT + (at - x[0]) * across, _HEIGHT - _BOTTOM - (value - low) * up

    body = []
    for tick in y_ticks:
        y = place(x[0], tick)[1]
        body.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        body.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_written(tick, y_ticks)}</text>')
    for tick in x_ticks:
        at = place(tick, low)[0]
        body.append(f'<text x="{at:.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{_written(tick, x_ticks)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    body.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for line in lines:
        points = [place(a, b) if math.isfinite(b) else None for a, b in zip(x, line.values, strict=True)]
        body.append(f'<path class="{line.style}" d="{_path(_thinned(points))}"/>')
        for at, value, point in zip(x, line.values, points, strict=True) if line.marked else ():
            if point is not None:
                text = escape(f"{line.name}, {x_label} {at:g}: {value:.4g}")
                body.append(
                    f'<circle class="{line.style}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3">'
                    f"<title>{text}</title></circle>"
                )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(body)}</svg>'


def centred_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean around each value, over at most `width` of them: as many before it as after it, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    out = []
    for i in range(len(values)):
        reach = min(width // 2, i, len(values) - 1 - i)
        out.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return out


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers from `low` or just below it to `high` or just above it; between the two if `whole`."""
    if high <= low:
        spread = abs(low) / 2 or 1.0
        low, high = (low, low) if whole else (low - spread, low + spread)
        if whole:
            return [low]
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _written(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.0
    if step and (step < 1e-4 or abs(ticks[-1]) >= 1e7):
        return f"{tick:.3g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return f"{tick:,.{decimals}f}"


Point = tuple[float, float] | None


def _thinned(points: list[Point]) -> list[Point]:
    """Of many points the lowest and the highest of each stretch, so that no peak is lost."""
    size = -(-len(points) // _POINTS)
    if size <= 2:
        return points
    out: list[Point] = []
    for start in range(0, len(points), size):
        stretch = [point for point in points[start : start + size] if point is not None]
        if stretch:
            ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
            out += sorted(ends)
    return out


def _path(points: Sequence[Point]) -> str:
    """Straight lines from point to point; a missing one is a gap."""
    parts, pen = [], "M"
    for point in points:
        if point is not None:
            parts.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "M" if point is None else "L"
    return "".join(parts)
