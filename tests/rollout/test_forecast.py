"""How long a start will take, by the earlier ones."""

import pytest

from serve_app.rollout.forecast import before, forecast
from serve_app.telemetry.cold_start import Span, Start


def start(at=0.0, *, download=1.0, load=2.0, size=0, application="llm", between=0.5):
    """Return one whose libraries take 3 s beside the download."""
    spans = (
        Span("check", at, 0.5),
        Span("download", at + 0.5, download),
        Span("libraries", at + 0.5, 3.0),
        Span("load", at + 0.5 + max(download, 3.0), load),
        Span("first_token", at + 900.0, 0.1),
    )
    ready_s = 0.5 + max(download, 3.0) + load + between
    return Start(application, "r", "n", spans, ready_s, {"hub": size, "cache": 7})


def test_a_warm_start_takes_the_median_of_each_phase():
    """Which overlap counts once; a start that fetched says nothing of a warm download."""
    earlier = [start(load=2.0), start(load=4.0), start(load=9.0), start(download=60.0, size=600)]
    found = forecast(earlier, fetch_bytes=0)
    assert found.starts == 4
    assert found.phases == {"check": 0.5, "download": 1.0, "libraries": 3.0, "load": 3.0}
    assert found.ready_s == pytest.approx(0.5 + 3.0 + 3.0 + 0.5)


def test_what_must_be_fetched_takes_its_bytes_by_the_rate_of_those_that_fetched():
    """Ten bytes a second, so 2,000 bytes take 200 s, whatever they took for others."""
    earlier = [start(download=60.0, size=600), start(download=30.0, size=300), start()]
    found = forecast(earlier, fetch_bytes=2000)
    assert found.phases["download"] == 200.0
    assert found.ready_s == pytest.approx(0.5 + 200.0 + 2.0 + 0.5)


def test_what_nobody_did_is_not_foretold():
    """No start at all, or bytes to fetch and nobody fetched; without them it is."""
    assert forecast([], fetch_bytes=0) is None
    assert forecast([start()], fetch_bytes=1) is None
    assert forecast([start(download=60.0, size=600)], fetch_bytes=0).phases["download"] == 0.0


def test_a_forecast_meets_what_is_like_the_past():
    """The formula gives back the only start there was."""
    for one in (start(), start(download=60.0, size=600)):
        size = one.weights_bytes["hub"]
        assert forecast([one], fetch_bytes=size).ready_s == pytest.approx(one.ready_s)


def test_no_hindsight():
    """Starts that were over count, and those of this application alone."""
    first, second, beside, other = (
        start(0.0),
        start(100.0),
        start(101.0),
        start(50.0, application="x"),
    )
    starts = [first, other, second, beside]
    assert before(first, starts) == []
    assert before(second, starts) == [first]
    assert before(beside, starts) == [first]
