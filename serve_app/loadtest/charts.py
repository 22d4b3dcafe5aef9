"""Line charts as inline SVG: no script, so they work in a mail and behind any policy.

Colours are CSS classes of the page, which knows light and dark; every line also has its own
dash, and every point a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 44
STYLES = 6  # line styles that the page defines


@dataclass(frozen=True, slots=True)
class Line:
    """One line.

    Args:
        name: in the legend.
        points: (x, y), by x; None as y leaves a hole.
        dots: mark every point, for lines of few.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """Labels, and whether x counts by powers of ten where its range is wide."""

    title: str
    x: str
    y: str
    log_x: bool = False


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def chart(axes: Axes, lines: Sequence[Line]) -> str:
    """Draw a figure: the plot, and its legend below."""
    points = [(x, y) for line in lines for x, y in line.points if y is not None]
    if axes.log_x:
        points = [(x, y) for x, y in points if x > 0]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low * 0.9, x_high * 1.1 or 1.0
    log_x = axes.log_x and x_high > 5 * x_low  # less has no room for marks
    x = _Scale(x_low, x_high, LEFT, WIDTH - RIGHT, log_x)
    y = _Scale(0.0, max(ys) * 1.05 or 1.0, HEIGHT - BOTTOM, TOP, log=False)
    parts = [*_grid(axes, x, y)]
    for index, line in enumerate(lines):
        parts += _drawn(line, index % STYLES, x, y)
    title = escape(axes.title)
    legend = "".join(
        f'<li><svg width="28" height="10" aria-hidden="true"><path class="line s{i % STYLES}"'
        f' d="M0 5H28"/></svg>{escape(line.name)}</li>'
        for i, line in enumerate(lines)
    )
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{title}">{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )


def _grid(axes: Axes, x: _Scale, y: _Scale) -> Iterator[str]:
    for value in ticks(y.low, y.high):
        at = y(value)
        yield f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
    for value in _decades(x.low, x.high) if x.log else ticks(x.low, x.high):
        at = x(value)
        yield f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
    middle, foot = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6
    yield f'<text x="{middle}" y="{foot}" text-anchor="middle">{escape(axes.x)}</text>'
    turned = f'transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
    yield f'<text {turned} text-anchor="middle">{escape(axes.y)}</text>'


def _drawn(line: Line, style: int, x: _Scale, y: _Scale) -> Iterator[str]:
    steps, pen = [], "M"
    for at, value in line.points:
        if value is None or (x.log and at <= 0):
            pen = "M"
            continue
        steps.append(f"{pen}{x(at):.1f} {y(value):.1f}")
        pen = "L"
        if line.dots:
            told = escape(f"{line.name}: {value:.4g} at {at:.4g}")
            yield (
                f'<circle class="dot s{style}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="4">'
                f"<title>{told}</title></circle>"
            )
    yield f'<path class="line s{style}" d="{"".join(steps)}"/>'


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    return [round(mark, 12) for mark in marks if low <= mark <= high]
