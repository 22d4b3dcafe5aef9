"""Lengths: every form draws what it says."""

import random
import statistics

import pytest

from serve_app.errors import ConfigError
from serve_app.loadtest.lengths import Lengths, parse


def drawn(text, count=4000):
    rng = random.Random(1)
    draw = parse(text)
    return [draw(rng) for _ in range(count)]


def test_a_number_is_itself():
    """No spread."""
    assert set(drawn("256")) == {256}


def test_a_range_is_uniform_and_holds_its_ends():
    """Every length of the range comes about equally often."""
    values = drawn("3-6")
    assert set(values) == {3, 4, 5, 6}
    assert all(850 < values.count(n) < 1150 for n in (3, 4, 5, 6))


def test_a_normal_has_its_mean_and_spread():
    """Mean and standard deviation are those asked for."""
    values = drawn("normal:500,50")
    assert statistics.mean(values) == pytest.approx(500, rel=0.01)
    assert statistics.stdev(values) == pytest.approx(50, rel=0.05)


def test_a_lognormal_has_its_median_and_a_tail():
    """The median is the one asked for, and the mean lies above it."""
    values = drawn("lognormal:200,0.8")
    assert statistics.median(values) == pytest.approx(200, rel=0.05)
    assert statistics.mean(values) > 250


def test_no_length_is_below_one():
    """A draw far to the left is still a request."""
    assert min(drawn("normal:2,50")) == 1


@pytest.mark.parametrize("text", ["", "0", "9-3", "-5", "normal:1", "uniform:1,2", "1e3", "many"])
def test_nonsense_is_refused_with_the_forms(text):
    """The message names the forms there are."""
    with pytest.raises(ConfigError, match="normal:512,128"):
        parse(text)


def test_pairs_are_drawn_together():
    """A long prompt keeps its own answer's length."""
    lengths = Lengths(parse("1"), parse("1"), pairs=((10, 1), (1000, 100)))
    rng = random.Random(2)
    assert {lengths.draw(rng) for _ in range(50)} == {(10, 1), (1000, 100)}
