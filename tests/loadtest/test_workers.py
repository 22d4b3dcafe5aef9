"""The client processes: load that no answer slows, and an end that loses nothing."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from serve_app.loadtest.client import Target
from serve_app.loadtest.stage import Lengths, Span, closed, parse_length, poisson
from serve_app.loadtest.workers import Workers
from tests.loadtest.scripted import Scripted, serving

pytestmark = pytest.mark.slow

LENGTHS = Lengths(parse_length("20"), parse_length("4"))


def run(url, stage, *, processes=1, drain_s=5.0, stop_after=None):
    stop = threading.Event()
    shown = []
    if stop_after:
        threading.Timer(stop_after, stop.set).start()
    target = Target(url, "acme/tiny", timeout_s=20)
    with Workers(target, processes=processes, drain_s=drain_s, stop=stop) as workers:
        return workers.run(stage, shown.append), shown


def test_run_open_loop_is_not_slowed_by_a_slow_server():
    """All requests are sent in time, and the queue behind the server shows in their latency."""
    app = Scripted((0.1, "a"), places=1, calibrations=0)  # holds 10 a second
    with serving(app) as url:
        stage = poisson(20, LENGTHS, Span(2, 0), seed=3)
        ran, shown = run(url, stage, processes=2, drain_s=30)
    assert len(ran.samples) == len(stage.shots)
    assert all(sample.error is None for sample in ran.samples)
    assert max(sample.sent_s - sample.at_s for sample in ran.samples) < 0.2
    last = max(ran.samples, key=lambda sample: sample.at_s)
    # 0.1 s for each of those before it, less the time since the first came
    assert last.ttft_s == pytest.approx(0.1 * len(stage.shots) - last.at_s, rel=0.3)
    assert len(ran.strains) == 2
    assert shown


def test_run_closed_loop_keeps_its_number_of_clients():
    """Never more requests at a time, and each client asks again at once."""
    app = Scripted((0.1, "a"), calibrations=0)
    with serving(app) as url:
        ran, _ = run(url, closed(3, LENGTHS, Span(2, 0), seed=1), processes=2)
    assert app.most_running == 3
    assert len(ran.samples) == pytest.approx(3 * 2 / 0.1, rel=0.35)
    assert len({str(body["messages"]) for body in app.bodies}) == len(app.bodies)


def test_run_stopped_keeps_what_was_measured():
    """The stage ends at once; finished samples stay, those in flight are marked."""
    with serving(Scripted(lambda n: (0.05, "a") if n % 2 else (30.0, "a"), calibrations=0)) as url:
        began = time.monotonic()
        ran, _ = run(url, poisson(20, LENGTHS, Span(60, 0), seed=1), stop_after=3)
        assert time.monotonic() - began < 15
    kinds = {sample.error for sample in ran.samples}
    assert kinds == {None, "unfinished"}
    assert ran.stopped_s is not None
    assert ran.stopped_s < 10


def test_run_closed_loop_ends_at_a_stop():
    """A client whose request was cancelled does not ask again."""
    app = Scripted((0.2, "a"), calibrations=0)
    with serving(app) as url:
        ran, _ = run(url, closed(4, LENGTHS, Span(60, 0), seed=1), stop_after=2)
        asked = len(app.bodies)
        time.sleep(0.3)
        assert len(app.bodies) == asked
    assert sum(sample.error == "unfinished" for sample in ran.samples) <= 4


def test_run_counts_answers_that_never_come():
    """After the drain time the rest is unfinished, not forgotten."""
    with serving(Scripted((60.0, "a"), calibrations=0)) as url:
        stage = poisson(20, LENGTHS, Span(1, 0), seed=1)
        ran, _ = run(url, stage, drain_s=0.5)
    assert len(ran.samples) == len(stage.shots)
    assert {sample.error for sample in ran.samples} == {"unfinished"}


def test_run_leaves_a_ctrl_c_during_imports_to_the_parent(monkeypatch):
    """A terminal sends it to all of them; they still do their part of the stage."""
    process = multiprocessing.get_context("spawn").Process
    start = process.start

    def start_and_interrupt(self):
        start(self)
        os.kill(self.pid, signal.SIGINT)

    monkeypatch.setattr(process, "start", start_and_interrupt)
    with serving(Scripted((0.1, "a"), calibrations=0)) as url:
        ran, _ = run(url, closed(2, LENGTHS, Span(1, 0), seed=1), processes=2)
    assert len(ran.strains) == 2
    assert {sample.error for sample in ran.samples} == {None}
