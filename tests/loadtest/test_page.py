"""The page: complete, self-contained, and right in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from serve_app.loadtest.page import HEIGHT, WIDTH, Axes, Line, chart, render, ticks
from tests.loadtest.test_report import SEARCH, whole

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Strict(HTMLParser):
    """Refuses tags that do not close in order; keeps every attribute."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def report(**more):
    """Three stages at different rates, and the server's view."""
    stage = whole()["stages"][0]
    stages = [
        stage | {"name": f"{rate} req/s", "rate": float(rate), "start_s": 11.0 * rate}
        for rate in (1, 2, 3)
    ]
    timeline = {
        "at_s": [1.0, 2.0, 3.0],
        "running": [1, 2, 3],
        "waiting": [0, 0, 9],
        "replicas": [1, 1, 2],
        "kv_cache_usage": [0.1, 0.2, None],
        "generation_tokens": [0, 50, 20],
    }
    return whole(search=SEARCH, timeline=timeline) | {"stages": stages, **more}


def test_render_closes_tags_and_draws_every_plot():
    """Five plots against the rate, four distributions, two timelines of the client, four more."""
    page = Strict(render(report()))
    assert page.tags.count("figure") == 5 + 4 + 2 + 4
    assert page.tags.count("details") == 3
    text = " ".join(page.text)
    assert "Up to 2 req/s 95% of the requests meet the SLO" in text
    for label in ("Replicas, as the server counts", "ttft against rate", "Running, waiting"):
        assert label in text


def test_render_needs_nothing_from_outside():
    """No script, no link, no image, no import, and a policy that allows none."""
    text = render(report())
    page = Strict(text)
    assert not {"script", "link", "img", "iframe", "base", "form"} & set(page.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert "url(" not in text
    assert "@import" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_render_lets_a_keyboard_reach_all_of_it():
    """What scrolls takes the focus, the focus is visible, and details fold by themselves."""
    text = render(report())
    assert text.count('class="scroll"') == text.count('class="scroll" tabindex="0"') > 0
    assert ":focus-visible" in text
    assert all(f'aria-label="{label}' in text for label in ("ttft", "table"))


def test_render_defines_the_same_colours_for_light_and_dark():
    """No colour is forgotten in one of the two."""
    light, dark = re.findall(r":root \{(.*?)\}", render(report()), re.DOTALL)
    colours = [set(re.findall(r"--\w+", part)) for part in (light, dark)]
    assert colours[0] == colours[1]
    assert len(colours[0]) == 11


def test_render_escapes_names_of_strangers():
    """A model's name is text, whatever it holds."""
    page = Strict(render(report(model='<script>alert("x")</script>&')))
    assert "script" not in page.tags
    assert any('<script>alert("x")</script>&' in text for text in page.text)


def test_render_of_a_run_without_anything():
    """Interrupted before the first number."""
    page = Strict(render(whole() | {"stages": [], "interrupted": True}))
    assert "Interrupted" in " ".join(page.text)
    assert "figure" not in page.tags


def in_a_real_browser(tmp_path, scheme):
    """Chromium renders every figure, complains of nothing, and takes a picture in each scheme."""
    path, picture = tmp_path / "r.html", tmp_path / f"{scheme}.png"
    path.write_text(render(report()))
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        *(
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            "--window-size=1200,2400",
        ),
    ]
    done = subprocess.run(
        [*command, f"--screenshot={picture}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
    shown = subprocess.run(
        [*command, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert shown.stdout.count("<figure") == 15


if BROWSER is not None:  # one more test where there is a Chromium; it is not counted elsewhere
    test_render_in_a_real_browser = pytest.mark.parametrize("scheme", ["light", "dark"])(
        in_a_real_browser
    )


AXES = Axes("Latency", "req/s", "ms")


def drawn(*lines, axes=AXES):
    return ElementTree.fromstring(chart(axes, lines))


def steps(figure):
    paths = [p.get("d") for p in figure.iter("path") if "line" in p.get("class")]
    return [re.findall(r"([ML])([\d.]+) ([\d.]+)", path) for path in paths if "H28" not in path]


def test_chart_line_goes_through_its_points_inside_the_plot():
    """A larger value is higher up, a later one further right."""
    (line,) = steps(drawn(Line("p50", [(1, 10), (2, 20), (4, 5)])))
    xs, ys = [float(x) for _, x, _ in line], [float(y) for _, _, y in line]
    assert xs == sorted(xs)
    assert ys[1] < ys[0] < ys[2]
    assert all(0 < x < WIDTH for x in xs)
    assert all(0 < y < HEIGHT for y in ys)


def test_chart_line_is_parted_by_a_hole():
    """Where nothing was measured nothing is drawn."""
    (line,) = steps(drawn(Line("x", [(1, 1), (2, 2), (3, None), (4, 4), (5, 5)])))
    assert [pen for pen, _, _ in line] == ["M", "L", "M", "L"]


def test_chart_names_every_line_with_a_style_of_its_own():
    """Colour alone says nothing to some people."""
    figure = drawn(Line("a <b>", [(1, 1), (2, 2)]), Line("c", [(1, 2), (2, 1)]))
    names = ["".join(item.itertext()) for item in figure.iter("li")]
    assert names == ["a <b>", "c"]
    styles = [p.get("class") for p in figure.iter("path") if p.get("class").startswith("line")]
    assert set(styles) == {"line s0", "line s1"}


def test_chart_points_have_their_numbers():
    """A tooltip for each."""
    figure = drawn(Line("p95", [(2, 10.5)], dots=True))
    assert [circle.findtext("title") for circle in figure.iter("circle")] == ["p95: 10.5 at 2"]


def test_chart_of_nothing_is_no_figure():
    """Neither of no points nor of none on a log scale."""
    assert chart(AXES, [Line("x", [(1, None)])]) == ""
    assert chart(Axes("t", "x", "y", log_x=True), [Line("x", [(0, 1)])]) == ""


def test_chart_of_a_wide_range_counts_by_powers():
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
