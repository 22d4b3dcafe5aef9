"""Stages: what is offered, and how it is split over processes."""

import statistics
from itertools import pairwise

import pytest

from serve_app.loadtest.lengths import Lengths, parse
from serve_app.loadtest.stage import Shot, Span, closed, poisson, replay

LENGTHS = Lengths(parse("10-20"), parse("5"))


def test_poisson_arrivals_have_the_rate_and_no_memory():
    """The mean gap is 1 / rate, and its spread equals its mean."""
    stage = poisson(50, LENGTHS, Span(100, 10), seed=1)
    times = [shot.at_s for shot in stage.shots]
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.07)
    assert 0 <= times[0] <= times[-1] < 100


def test_a_short_stage_offers_its_rate():
    """Whatever the seed, ten seconds at 5/s are fifty requests."""
    assert {len(poisson(5, LENGTHS, Span(10, 1), seed=s).shots) for s in range(9)} == {50}


def test_the_same_seed_is_the_same_load():
    """Another seed is another one."""
    one, same, other = (poisson(5, LENGTHS, Span(10, 1), seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.shots != other.shots


def test_parts_of_an_open_loop_make_the_whole():
    """No request is lost or sent twice."""
    stage = poisson(20, LENGTHS, Span(10, 1), seed=1)
    parts = [stage.part(i, 3) for i in range(3)]
    shots = [shot for part in parts for shot in part.shots]
    assert sorted(shots, key=lambda shot: shot.at_s) == list(stage.shots)


def test_parts_of_a_closed_loop_share_its_clients():
    """Seven clients over three processes are seven clients."""
    stage = closed(7, LENGTHS, Span(10, 1), seed=1)
    assert [stage.part(i, 3).concurrency for i in range(3)] == [3, 2, 2]


def test_a_replay_ends_with_its_span():
    """What comes later is left out, and the warm-up leaves something to count."""
    shots = [Shot(float(i), 10, 5) for i in range(100)]
    stage = replay("t", shots, Span(30, 6), seed=1)
    assert len(stage.shots) == 30
    assert (stage.duration_s, stage.warmup_s) == (30, 6)
    assert len({shot.serial for shot in stage.shots}) == 30


def test_a_short_replay_does_not_wait_for_its_span():
    """A trace of three seconds takes about three seconds."""
    stage = replay("t", [Shot(0, 10, 5), Shot(3, 10, 5)], Span(600, 100), seed=1)
    assert stage.duration_s == 4
    assert stage.warmup_s == 2
