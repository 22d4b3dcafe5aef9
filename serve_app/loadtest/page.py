"""The report as one HTML file: no script, no outside resource, light and dark.

Everything that a plot shows is also in a table; what folds is a `details`, and what scrolls
takes the focus, so a keyboard reaches all of it. Charts are inline SVG, so they work in a mail
and behind any policy: colours are CSS classes of the page, every line also has its own dash, and
every point a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import pairwise
from string import Template

from serve_app.loadtest.report import LABELS, facts, milliseconds, verdict
from serve_app.loadtest.summary import PERCENTILES, Json

SHOWN_CDFS = 6  # stages; nobody distinguishes more lines
_KEYS = ("mean", *(f"p{rank}" for rank in PERCENTILES), "max")
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 44
STYLES = 6  # line styles that the page defines


def render(report: Json) -> str:
    """Render a report as a page."""
    template = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    title = f"Load test of {report['model']}"
    return template.substitute(title=escape(title), body="\n".join(_body(title, report)))


def _body(title: str, report: Json) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    made = f"{report['target']} · {report['created']} · serve-app {report['version']}"
    yield f'<p class="soft">{escape(made)}</p>'
    if report["interrupted"]:
        yield '<p class="warn">Interrupted: these are the numbers until then.</p>'
    if report["search"]:
        yield f"<p><strong>{escape(verdict(report['search']))}</strong></p>"
    stages = report["stages"]
    if not stages:
        yield "<p>Nothing was measured.</p>"
        return
    yield "<h2>Stages</h2>" + _overview(stages)
    if len({stage["rate"] for stage in stages}) > 1:
        yield "<h2>Latency against rate</h2>" + _figures(_against_rate(stages))
    yield "<h2>Distributions</h2>" + _figures(_distributions(stages))
    yield "<h2>Timeline</h2>" + _figures(_timelines(report))
    yield "<h2>Details</h2>" + "".join(map(_details, stages))


def _figures(charts: Iterator[str]) -> str:
    return f'<div class="figures">{"".join(charts)}</div>'


def _overview(stages: Sequence[Json]) -> str:
    head = ["stage", "ok", "errors", "req/s", "output tok/s", "in the SLO"]
    head += [f"{label} p{rank}" for label in LABELS.values() for rank in (50, 95)]
    rows = []
    for stage in stages:
        share = (stage["goodput"] or {}).get("share")
        row = [stage["name"], str(stage["completed"]), str(sum(stage["errors"].values()))]
        row += [f"{stage['req_s']:.4g}", f"{stage['output_tok_s']:.4g}"]
        row += ["-" if share is None else f"{share:.1%}"]
        for name in LABELS:
            spread = stage["latency"][name] or {}
            row += [milliseconds(spread.get(f"p{rank}")) for rank in (50, 95)]
        rows.append(row)
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _against_rate(stages: Sequence[Json]) -> Iterator[str]:
    by_rate = sorted((s for s in stages if s["rate"] is not None), key=lambda s: s["rate"])
    for name, label in LABELS.items():
        lines = [
            Line(f"p{rank}", [(s["rate"], _ms(s, name, f"p{rank}")) for s in by_rate], dots=True)
            for rank in (50, 95, 99)
        ]
        yield chart(Axes(f"{label} against rate", "offered req/s", "ms"), lines)
    tokens = [(s["rate"], s["output_tok_s"]) for s in by_rate]
    yield chart(
        Axes("Output tokens against rate", "offered req/s", "tok/s"),
        [Line("output tok/s", tokens, dots=True)],
    )


def _ms(stage: Json, name: str, key: str) -> float | None:
    spread = stage["latency"][name]
    return None if spread is None else spread[key] * 1000


def _distributions(stages: Sequence[Json]) -> Iterator[str]:
    for name, label in LABELS.items():
        lines = [
            Line(
                s["name"],
                [(ms * 1000, share) for share, ms in enumerate(s["latency"][name]["cdf"])],
            )
            for s in stages[-SHOWN_CDFS:]
            if s["latency"][name]
        ]
        yield chart(Axes(f"{label}: share of values below", "ms", "%", log_x=True), lines)


def _timelines(report: Json) -> Iterator[str]:
    """What the client saw in each second of every stage, and the server beside it."""
    for key, label in (("output_tokens", "Output tokens"), ("in_flight", "Requests in flight")):
        points: list[tuple[float, float | None]] = []
        for stage in report["stages"]:
            seen = enumerate(stage["seconds"][key])
            points += [(stage["start_s"] + at, value) for at, value in seen]
            points.append((stage["start_s"] + len(stage["seconds"][key]), None))
        axes = Axes(f"{label}, seen by the client", "seconds", "tok/s" if "tokens" in key else "")
        yield chart(axes, [Line(label.lower(), points)])
    if timeline := report["timeline"]:
        for names in (("running", "waiting"), ("replicas",), ("kv_cache_usage",)):
            lines = [
                Line(name, list(zip(timeline["at_s"], timeline[name], strict=True)))
                for name in names
            ]
            title = ", ".join(names).replace("_", " ").capitalize()
            yield chart(Axes(f"{title}, as the server counts", "seconds", ""), lines)
        yield chart(
            Axes("Generated tokens, as the server counts", "seconds", "tok/s"),
            [Line("generated", list(_slope(timeline["at_s"], timeline["generation_tokens"])))],
        )


def _slope(times: Sequence[float], values: Sequence[float | None]) -> Iterator[tuple[float, float]]:
    """Turn a counter into a rate; a drop is a restart of the server."""
    seen = [(t, v) for t, v in zip(times, values, strict=True) if v is not None]
    for (before, low), (after, high) in pairwise(seen):
        if high >= low and after > before:
            yield after, (high - low) / (after - before)


def _details(stage: Json) -> str:
    rows = [
        [label, *(milliseconds((stage["latency"][name] or {}).get(key)) for key in _KEYS)]
        for name, label in LABELS.items()
    ]
    said = "".join(
        f"<tr><td>{escape(label)}</td><td>{escape(text)}</td></tr>" for label, text in facts(stage)
    )
    return (
        f'<details><summary>{escape(stage["name"])}</summary><table class="facts">{said}</table>'
        f"{_table(['', *_KEYS], rows)}</details>"
    )


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
            label = escape(f"{line.name}: {value:.4g} at {at:.4g}")
            yield (
                f'<circle class="dot s{style}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="4">'
                f"<title>{label}</title></circle>"
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
