"""Numbers: right by hand, without the warm-up, and honest about the client."""

import pytest

from serve_app.errors import ConfigError
from serve_app.loadtest.summary import Slo, summarise
from tests.loadtest.scripted import ran, sample


def test_summarise_percentiles_of_the_samples():
    """Of ttfts from 1 to 101 ms, the 50th percentile is 51 ms."""
    samples = [sample(i / 20, ttft_s=(i + 1) / 1000) for i in range(101)]
    ttft = summarise(ran(samples), None)["latency"]["ttft_s"]
    assert {key: round(ttft[key], 6) for key in ("p50", "p90", "p95", "p99", "max", "mean")} == {
        "p50": 0.051,
        "p90": 0.091,
        "p95": 0.096,
        "p99": 0.1,
        "max": 0.101,
        "mean": 0.051,
    }
    assert (ttft["count"], len(ttft["cdf"])) == (101, 101)


def test_summarise_pools_the_gaps_of_all_requests():
    """The itl is over gaps, so a long answer counts for more; tpot is over requests."""
    samples = [sample(1.0, gaps=[0.01] * 90), sample(2.0, gaps=[0.1] * 10)]
    latency = summarise(ran(samples), None)["latency"]
    assert latency["itl_s"]["count"] == 100
    assert latency["itl_s"]["p50"] == pytest.approx(0.01)
    assert latency["tpot_s"]["mean"] == pytest.approx(0.055)


def test_summarise_leaves_the_warm_up_out():
    """Slow first requests change nothing."""
    slow = [sample(i / 10, ttft_s=5.0, error=None) for i in range(10)]
    fast = [sample(2 + i / 10) for i in range(10)]
    stage = summarise(ran(slow + fast, warmup_s=2.0), None)
    assert stage["requests"] == 10
    assert stage["latency"]["ttft_s"]["max"] == pytest.approx(0.1)


def test_summarise_counts_rates_of_the_window():
    """Ten tokens that stream over the border of the window count by their share."""
    streams = [sample(0.0, ttft_s=1.0, gaps=[1.0] * 9)]  # ten tokens from second 1 to 10
    stage = summarise(ran(streams, duration_s=10.0, warmup_s=5.5), None)
    assert stage["output_tok_s"] == pytest.approx(10 * (4.5 / 9) / 4.5)
    assert stage["in_flight"] == pytest.approx(1.0)
    assert stage["req_s"] == 0  # it ends with the window and not inside it


def test_summarise_counts_errors_by_kind_and_does_not_time_them():
    """A fast refusal does not make the percentiles better."""
    samples = [sample(1.0), sample(2.0, ttft_s=0.0, error="http_429"), sample(3.0, error="timeout")]
    stage = summarise(ran(samples), Slo(ttft_s=1.0))
    assert stage["errors"] == {"http_429": 1, "timeout": 1}
    assert stage["completed"] == 1
    assert stage["latency"]["ttft_s"]["count"] == 1
    assert stage["goodput"]["share"] == pytest.approx(1 / 3)


def test_summarise_goodput_is_what_met_the_slo():
    """Requests per second that were good, over the counted window."""
    samples = [sample(i, ttft_s=0.1 if i < 6 else 0.9) for i in range(8)]
    goodput = summarise(ran(samples, duration_s=8.0), Slo(ttft_s=0.5))["goodput"]
    assert goodput == {"good": 6, "share": 0.75, "req_s": 0.75}


def test_summarise_blames_no_interruption_on_the_server():
    """What was in flight when the user stopped is neither counted nor an error."""
    samples = [sample(1.0), sample(2.0, error="unfinished", first_s=None)]
    stage = summarise(ran(samples, duration_s=60.0, stopped_s=4.0), None)
    assert (stage["requests"], stage["errors"], stage["duration_s"]) == (1, {}, 4.0)


def test_summarise_does_not_mark_an_idle_client():
    """Ten percent of a core and a millisecond of lag are fine."""
    client = summarise(ran([sample(1.0)]), None)["client"]
    assert (client["bottleneck"], client["reasons"]) == (False, [])


@pytest.mark.parametrize(
    ("strain", "late_s", "word"),
    [((0.95, 0.001), 0.0, "95%"), ((0.1, 0.3), 0.0, "300 ms"), ((0.1, 0.0), 0.2, "200 ms")],
)
def test_summarise_marks_a_busy_or_late_client(strain, late_s, word):
    """CPU, a late event loop and late requests each spoil the numbers, and it is said why."""
    late = [sample(1.0, sent_s=1.0 + late_s)]
    client = summarise(ran(late, strain=strain), None)["client"]
    assert client["bottleneck"]
    assert word in " ".join(client["reasons"])


def test_summarise_of_nothing_measured():
    """No request, no number, no division by zero."""
    stage = summarise(ran([]), Slo(ttft_s=1.0))
    assert stage["requests"] == 0
    assert set(stage["latency"].values()) == {None}
    assert stage["goodput"]["share"] is None


def test_summarise_seconds_add_up():
    """The tokens of each second are those of the requests."""
    samples = [sample(i / 2, ttft_s=0.2, gaps=[0.05] * 9) for i in range(16)]
    seconds = summarise(ran(samples), None)["seconds"]
    assert sum(seconds["output_tokens"]) == pytest.approx(160, rel=1e-4)
    assert sum(seconds["completed"]) == 16
    assert len(seconds["in_flight"]) == 10


def test_slo_limits_have_units():
    """Milliseconds and seconds, any of the four."""
    slo = Slo.parse("ttft=500ms, itl=60ms,e2e=10s,tpot=0.05s")
    assert slo == Slo(0.5, 0.06, 0.05, 10)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=1", "tbt=5ms", "ttft=-1s", "ttft=5ms;itl=1s"])
def test_slo_refuses_nonsense(text):
    """A limit without a unit would be off by a thousand."""
    with pytest.raises(ConfigError, match="ttft=500ms"):
        Slo.parse(text)


@pytest.mark.parametrize(
    ("limits", "met"),
    [
        ("ttft=101ms", True),
        ("ttft=99ms", False),
        ("itl=11ms", True),
        ("itl=9ms", False),
        ("tpot=9ms", False),
        ("e2e=191ms", True),
        ("e2e=189ms", False),
        ("ttft=1s,e2e=189ms", False),
    ],
)
def test_slo_needs_every_limit_to_be_met(limits, met):
    """A request is good when it is within all of them."""
    assert Slo.parse(limits).met(sample(0.0)) is met


def test_slo_is_never_met_by_an_error():
    """However fast it was."""
    assert not Slo().met(sample(0.0, error="http_429"))


def test_slo_forgives_one_long_gap_in_a_hundred():
    """The itl is about 95 % of a request's own gaps; six long ones are too many."""
    slo = Slo(itl_s=0.02)
    assert slo.met(sample(0.0, gaps=[0.01] * 99 + [0.5]))
    assert not slo.met(sample(0.0, gaps=[0.01] * 94 + [0.5] * 6))
