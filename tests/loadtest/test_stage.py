"""What is offered: arrivals, lengths, texts, parts for several processes."""

import random
import statistics
from itertools import pairwise

import pytest

from serve_app.errors import ConfigError
from serve_app.loadtest.stage import (
    Lengths,
    Prompts,
    Shot,
    Span,
    closed,
    parse_length,
    poisson,
    replay,
)

LENGTHS = Lengths(parse_length("10-20"), parse_length("5"))


def test_poisson_arrivals_have_the_rate_and_no_memory():
    """The mean gap is 1 / rate, and its spread equals its mean."""
    stage = poisson(50, LENGTHS, Span(100, 10), seed=1)
    times = [shot.at_s for shot in stage.shots]
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.07)
    assert 0 <= times[0] <= times[-1] < 100


def test_poisson_offers_its_rate_in_a_short_stage():
    """Whatever the seed, ten seconds at 5/s are fifty requests."""
    assert {len(poisson(5, LENGTHS, Span(10, 1), seed=s).shots) for s in range(9)} == {50}


def test_poisson_of_the_same_seed_is_the_same_load():
    """Another seed is another one."""
    one, same, other = (poisson(5, LENGTHS, Span(10, 1), seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.shots != other.shots


def test_poisson_parts_make_the_whole():
    """No request is lost or sent twice."""
    stage = poisson(20, LENGTHS, Span(10, 1), seed=1)
    parts = [stage.part(i, 3) for i in range(3)]
    shots = [shot for part in parts for shot in part.shots]
    assert sorted(shots, key=lambda shot: shot.at_s) == list(stage.shots)


def test_closed_parts_share_its_clients():
    """Seven clients over three processes are seven clients."""
    stage = closed(7, LENGTHS, Span(10, 1), seed=1)
    assert [stage.part(i, 3).concurrency for i in range(3)] == [3, 2, 2]


def test_replay_ends_with_its_span():
    """What comes later is left out, and the warm-up leaves something to count."""
    shots = [Shot(float(i), 10, 5) for i in range(100)]
    stage = replay("t", shots, Span(30, 6), seed=1)
    assert len(stage.shots) == 30
    assert (stage.duration_s, stage.warmup_s) == (30, 6)
    assert len({shot.serial for shot in stage.shots}) == 30


def test_replay_of_a_short_trace_does_not_wait_for_its_span():
    """A trace of three seconds takes about three seconds."""
    stage = replay("t", [Shot(0, 10, 5), Shot(3, 10, 5)], Span(600, 100), seed=1)
    assert stage.duration_s == 4
    assert stage.warmup_s == 2


def drawn(text, count=4000):
    rng = random.Random(1)
    draw = parse_length(text)
    return [draw(rng) for _ in range(count)]


def test_parse_length_of_a_number_is_itself():
    """No spread."""
    assert set(drawn("256")) == {256}


def test_parse_length_of_a_range_is_uniform_and_holds_its_ends():
    """Every length of the range comes about equally often."""
    values = drawn("3-6")
    assert set(values) == {3, 4, 5, 6}
    assert all(850 < values.count(n) < 1150 for n in (3, 4, 5, 6))


def test_parse_length_of_a_normal_has_its_mean_and_spread():
    """Mean and standard deviation are those asked for."""
    values = drawn("normal:500,50")
    assert statistics.mean(values) == pytest.approx(500, rel=0.01)
    assert statistics.stdev(values) == pytest.approx(50, rel=0.05)


def test_parse_length_of_a_lognormal_has_its_median_and_a_tail():
    """The median is the one asked for, and the mean lies above it."""
    values = drawn("lognormal:200,0.8")
    assert statistics.median(values) == pytest.approx(200, rel=0.05)
    assert statistics.mean(values) > 250


def test_parse_length_draws_none_below_one():
    """A draw far to the left is still a request."""
    assert min(drawn("normal:2,50")) == 1


@pytest.mark.parametrize("text", ["", "0", "9-3", "-5", "normal:1", "uniform:1,2", "1e3", "many"])
def test_parse_length_refuses_nonsense_with_the_forms(text):
    """The message names the forms there are."""
    with pytest.raises(ConfigError, match="normal:512,128"):
        parse_length(text)


def test_lengths_are_drawn_in_pairs():
    """A long prompt keeps its own answer's length."""
    lengths = Lengths(parse_length("1"), parse_length("1"), pairs=((10, 1), (1000, 100)))
    rng = random.Random(2)
    assert {lengths.draw(rng) for _ in range(50)} == {(10, 1), (1000, 100)}


def test_prompts_fitted_by_two_measurements():
    """The line through both gives back the tokens of any number of words."""
    prompts = Prompts.fitted((8, 42), (72, 122))  # 32 for the template, 1.25 a word
    text = prompts.text(Shot(0, 232, 1), seed=0)
    assert len(text.split()) * 1.25 + 32 == 232


def test_prompts_fitted_to_a_server_that_counts_nothing():
    """A flat line is no reason to divide by zero."""
    assert len(Prompts.fitted((8, 5), (72, 5)).text(Shot(0, 64, 1), seed=0).split()) == 64


def test_prompts_differ_by_serial_and_seed_alone():
    """No prefix cache is hit by chance."""
    prompts = Prompts()
    texts = [prompts.text(Shot(0, 50, 1, serial=n), seed=s) for n in range(20) for s in (0, 1)]
    assert len({text[:40] for text in texts}) == 40
    assert prompts.text(Shot(9, 50, 1, serial=3), seed=0) == texts[6]


def test_prompts_of_equal_blocks_are_equal_text():
    """Prompts that share a block share exactly its 512 tokens."""
    prompts = Prompts()
    one = prompts.text(Shot(0, 1000, 1, (1, 2), serial=1), seed=0).split()
    two = prompts.text(Shot(0, 1000, 1, (1, 3), serial=2), seed=0).split()
    assert one[:512] == two[:512]
    assert one[512:] != two[512:]
    assert len(one) == len(two) == 1000
