"""Charts: well-formed, in place, and readable without colour."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from serve_app.loadtest.charts import HEIGHT, WIDTH, Axes, Line, chart, ticks

AXES = Axes("Latency", "req/s", "ms")


def drawn(*lines, axes=AXES):
    return ElementTree.fromstring(chart(axes, lines))


def steps(figure):
    paths = [p.get("d") for p in figure.iter("path") if "line" in p.get("class")]
    return [re.findall(r"([ML])([\d.]+) ([\d.]+)", path) for path in paths if "H28" not in path]


def test_a_line_goes_through_its_points_inside_the_plot():
    """A larger value is higher up, a later one further right."""
    (line,) = steps(drawn(Line("p50", [(1, 10), (2, 20), (4, 5)])))
    xs, ys = [float(x) for _, x, _ in line], [float(y) for _, _, y in line]
    assert xs == sorted(xs)
    assert ys[1] < ys[0] < ys[2]
    assert all(0 < x < WIDTH for x in xs)
    assert all(0 < y < HEIGHT for y in ys)


def test_a_hole_parts_the_line():
    """Where nothing was measured nothing is drawn."""
    (line,) = steps(drawn(Line("x", [(1, 1), (2, 2), (3, None), (4, 4), (5, 5)])))
    assert [pen for pen, _, _ in line] == ["M", "L", "M", "L"]


def test_every_line_is_named_and_has_a_style_of_its_own():
    """Colour alone tells nothing to some people."""
    figure = drawn(Line("a <b>", [(1, 1), (2, 2)]), Line("c", [(1, 2), (2, 1)]))
    names = ["".join(item.itertext()) for item in figure.iter("li")]
    assert names == ["a <b>", "c"]
    styles = [p.get("class") for p in figure.iter("path") if p.get("class").startswith("line")]
    assert set(styles) == {"line s0", "line s1"}


def test_points_tell_their_numbers():
    """A tooltip for each."""
    figure = drawn(Line("p95", [(2, 10.5)], dots=True))
    assert [circle.findtext("title") for circle in figure.iter("circle")] == ["p95: 10.5 at 2"]


def test_nothing_is_no_figure():
    """Neither of no points nor of none on a log scale."""
    assert chart(AXES, [Line("x", [(1, None)])]) == ""
    assert chart(Axes("t", "x", "y", log_x=True), [Line("x", [(0, 1)])]) == ""


def test_a_wide_range_counts_by_powers():
    """Each factor of ten takes the same room."""
    (line,) = steps(
        drawn(Line("x", [(1, 1), (10, 2), (100, 3)]), axes=Axes("t", "x", "y", log_x=True))
    )
    first, second, third = (float(x) for _, x, _ in line)
    assert second - first == pytest.approx(third - second, abs=0.2)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.004), (0, 1234), (3.2, 3.9), (0.1, 987654)]
)
def test_ticks_are_round_and_few(low, high):
    """Between three and eight numbers inside the range, evenly apart."""
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 8
    assert low <= marks[0] <= marks[-1] <= high * 1.0001
    gaps = {round(b - a, 9) for a, b in pairwise(marks)}
    assert len(gaps) <= 1
