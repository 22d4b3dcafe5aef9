"""The regression gate: it sees what is there, and does not flap over what is not."""

import numpy as np
import pytest

from serve_app.errors import ConfigError
from serve_app.loadtest.compare import compare
from serve_app.loadtest.report import document
from serve_app.loadtest.summary import summarise
from tests.loadtest.scripted import ran, sample

ABOUT = {"model": "m", "load": {"endpoint": "chat"}, "slo": None}


def report(seed, *, slower=1.0, failed=0.0, tokens=10, count=300, **more):
    """A run whose requests queue behind each other: neighbours are slow together."""
    rng = np.random.default_rng(seed)
    level, samples = 0.0, []
    for i in range(count):
        level = 0.8 * level + rng.normal(0, 0.12)
        error = "http_429" if rng.random() < failed else None
        ttft_s = 0.1 * slower * float(np.exp(level))
        gaps = [0.01 * slower] * (tokens - 1)
        samples.append(sample(i * 60 / count, ttft_s=ttft_s, gaps=gaps, error=error))
    return document(ABOUT, [summarise(ran(samples, duration_s=60.0, **more), None)])


def regressed(before, after, threshold=0.1):
    changes = compare(before, after, threshold=threshold)
    return {change.quantity for change in changes if change.verdict == "regressed"}


def test_compare_finds_no_regression_in_two_runs_of_the_same():
    """In thirty pairs of equal services, the gate fails at most once."""
    failures = sum(bool(regressed(report(2 * i), report(2 * i + 1), 0.05)) for i in range(30))
    assert failures <= 1


def test_compare_by_plain_error_bars_would_flap():
    """Such pairs, judged by their medians alone, fail more than once in ten."""
    medians = [report(i)["stages"][0]["latency"]["ttft_s"]["p50"] for i in range(120)]
    worse = sum(
        after / before > 1.05 for before, after in zip(medians[::2], medians[1::2], strict=True)
    )
    assert worse > 6


def test_compare_finds_a_slower_service():
    """Sixty percent more latency fails, whatever the seed."""
    for seed in range(5):
        found = regressed(report(seed), report(100 + seed, slower=1.6))
        assert {"ttft_s p50", "tpot_s p50", "e2e_s p50", "itl_s p95"} <= found


def test_compare_accepts_a_faster_service():
    """Better is not worse."""
    assert regressed(report(1), report(2, slower=0.5)) == set()


def test_compare_finds_fewer_tokens_per_second():
    """Throughput counts the other way round."""
    assert "output_tok_s" in regressed(report(1, tokens=20), report(2, tokens=10))


def test_compare_finds_more_errors():
    """From none to a tenth of the requests; points count, so from nothing works too."""
    assert regressed(report(1), report(1, failed=0.12)) == {"failed_share"}


def test_compare_tolerates_what_is_below_the_threshold():
    """What may be twice as slow is not failed for less."""
    assert regressed(report(1), report(2, slower=1.5), threshold=1.0) == set()


def test_compare_leaves_too_little_evidence_unclear():
    """A change about as large as the threshold passes, and it is said."""
    changes = compare(report(1), report(2, slower=1.12), threshold=0.1)
    ttft = next(change for change in changes if change.quantity == "ttft_s p95")
    assert ttft.verdict == "unclear"
    assert ttft.low < 0.1 < ttft.high


def test_compare_gives_the_same_files_the_same_verdict():
    """Twice the same, to the last digit."""
    assert compare(report(1), report(2), threshold=0.1) == compare(
        report(1), report(2), threshold=0.1
    )


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({**report(1), "model": "other"}, "model"),
        ({**report(1), "load": {}}, "load"),
        ({**report(1), "stages": []}, "stages"),
        (report(1, strain=(0.99, 0.0)), "bottleneck"),
        (report(1, count=39), "fewer than 40"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(other, word):
    """Another load, a client that could not keep up, or too few requests."""
    with pytest.raises(ConfigError, match=word):
        compare(report(1), other, threshold=0.1)
