"""What a canary has to keep, and when it is known that it does not."""

import random

import pytest

from serve_app.deployments.canary import Report, Seen
from serve_app.errors import ConfigError
from serve_app.rollout.judge import AGAINST_STABLE, chance, faults, parse_slo, summary


def seen(first=(), *, failed=0, waiting=(), token=()):
    found = Seen(failed=failed, unanswered=failed)
    for sketch, values in ((found.first, first), (found.waiting, waiting), (found.token, token)):
        for seconds in values:
            sketch.add(seconds)
    return found


def judged(slo, canary, stable=None, *, surely=False, least=0):
    """Return the names of the limits that are not kept."""
    report = Report(1, 0, stable or seen([0.1] * 100), canary)
    found = faults(report, parse_slo(slo), surely=surely, least=least)
    return [words.partition(":")[0] for words in found]


def test_parse_slo_adds_what_is_compared():
    """Unless the same name has another factor; an absolute limit replaces none of it."""
    names = [limit.name for limit in parse_slo("ttft_p95=1s, error_rate=0.5%")]
    assert names == ["ttft_p95=1s", "error_rate=0.5%", *[each.name for each in AGAINST_STABLE]]
    names = [limit.name for limit in parse_slo("ttft_p95=3x,error_rate=+2%,tpot_p50=50ms")]
    assert names == ["ttft_p95=3x", "error_rate=+2%", "tpot_p50=50ms", "tpot_p95=1.5x"]
    assert parse_slo("") == AGAINST_STABLE


@pytest.mark.parametrize(
    "text",
    ["ttft_p95", "ttft_p95=1", "ttft=1s", "p95=1s", "error_rate=1s", "error_rate=0.5", "x=y"],
)
def test_parse_slo_refuses(text):
    """And shows how it is written."""
    with pytest.raises(ConfigError, match="ttft_p95=1s"):
        parse_slo(text)


def test_faults_of_a_good_canary():
    """Neither the same nor a little slower is a fault, nor is a canary that is faster."""
    for seconds in (0.05, 0.1, 0.14):
        assert judged("ttft_p95=1s,error_rate=0.5%", seen([seconds] * 100)) == []


def test_faults_of_few_times():
    """Most answers have one token: one slow one of few longer ones is chance, many are not."""
    stable = seen([0.1] * 100, token=[0.01] * 100)
    one, many = ([0.1] * 100, [0.01] * 2 + [0.05]), ([0.1] * 100, [0.05] * 19)
    assert judged("tpot_p95=20ms", seen(one[0], token=one[1]), stable, least=20) == []
    assert judged("", seen(many[0], token=many[1]), stable, least=20) == ["tpot_p95=1.5x"]
    few = seen([0.1] * 100, token=[0.01])
    assert judged("", seen(many[0], token=many[1]), few, least=20) == []


def test_faults_by_seconds():
    """Six of a hundred over the limit are too many for a p95, five are not."""
    for late, expected in ((5, []), (6, ["ttft_p95=1s"])):
        canary = seen([0.1] * (100 - late) + [1.5] * late)
        assert judged("ttft_p95=1s,ttft_p95=99x", canary) == expected
    assert judged("tpot_p50=10ms,tpot_p95=9x", seen([0.1], token=[0.02])) == ["tpot_p50=10ms"]


def test_faults_by_the_serving_version():
    """Half as much again, but no less than the noise of a machine."""
    assert judged("", seen([0.2] * 50)) == ["ttft_p95=1.5x"]
    fast = seen([0.001] * 50)
    assert judged("", seen([0.018] * 50), fast) == []
    assert judged("", seen([0.03] * 50), fast) == ["ttft_p95=1.5x"]
    assert judged("", seen([9.0] * 50), seen()) == [], "nothing to compare with"


def test_faults_count_who_waits():
    """Who waits longer than the limit is late already; who has just come is not counted."""
    canary = seen([0.1] * 50, waiting=[0.01] * 50)
    assert judged("ttft_p95=1s", canary) == []
    canary = seen([0.1] * 50, waiting=[1.5] * 5)
    assert judged("ttft_p95=1s,ttft_p95=99x", canary) == ["ttft_p95=1s"]
    assert judged("ttft_p95=1s,ttft_p95=99x", seen(waiting=[5.0] * 5)) == ["ttft_p95=1s"]


def test_faults_by_errors():
    """An absolute share, and one point more than the serving version."""
    one = seen([0.1] * 99, failed=1)
    assert judged("error_rate=0.5%", one) == ["error_rate=0.5%"]
    assert judged("error_rate=2%", one) == []
    two = seen([0.1] * 98, failed=2)
    assert judged("", two) == ["error_rate=+1%"]
    assert judged("", two, seen([0.1] * 95, failed=5)) == []


def test_faults_surely_need_more_than_chance():
    """One early error ends nothing; two of two do, and so do three late ones of three."""
    slo = "ttft_p95=1s,ttft_p95=99x,error_rate=0.5%"
    assert judged(slo, seen([0.1] * 9, failed=1), surely=True) == []
    assert judged(slo, seen(failed=2), surely=True)[0] == "error_rate=0.5%"
    assert judged(slo, seen([2.0] * 2), surely=True) == []
    assert judged(slo, seen([2.0] * 3), surely=True) == ["ttft_p95=1s"]


def test_chance_is_the_tail_of_the_binomial_distribution():
    """Against a count of draws, at its edges, and where a naive sum would overflow."""
    draws = random.Random(7)
    often = sum(sum(draws.random() < 0.2 for _ in range(20)) >= 7 for _ in range(20_000)) / 20_000
    assert chance(7, 20, 0.2) == pytest.approx(often, abs=0.01)
    assert chance(2, 2, 0.005) == pytest.approx(0.005**2)
    assert (chance(0, 5, 0.1), chance(1, 5, 0.0), chance(5, 5, 1.0)) == (1.0, 0.0, 1.0)
    assert 0 < chance(6000, 100_000, 0.05) < 1e-12
    assert chance(100_000, 100_000, 0.05) == 0.0


def test_chance_takes_few_back_that_are_at_their_limit():
    """Looked at after each request, for 300 requests: under 3 % of the steps."""
    draws = random.Random(3)
    taken = 0
    for _ in range(400):
        bad = 0
        for total in range(1, 301):
            bad += draws.random() < 0.05
            if chance(bad, total, 0.05) < 0.001:
                taken += 1
                break
    assert taken / 400 < 0.03


def test_summary_has_both_versions():
    """Also before there are any numbers."""
    canary = seen([0.25] * 3, failed=1)
    canary.dropped = 2
    words = summary(Report(1, 0, seen(), canary))
    assert "canary 4 requests, ttft p50 0.25" in words
    assert "1 errors; serving version 0 requests, ttft p50 -" in words
    assert words.endswith("2 copies left out")
