"""Limits of a good request."""

import pytest

from serve_app.errors import ConfigError
from serve_app.loadtest.slo import Slo
from tests.loadtest.scripted import sample


def test_limits_have_units():
    """Milliseconds and seconds, any of the four."""
    slo = Slo.parse("ttft=500ms, itl=60ms,e2e=10s,tpot=0.05s")
    assert slo == Slo(0.5, 0.06, 0.05, 10)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=1", "tbt=5ms", "ttft=-1s", "ttft=5ms;itl=1s"])
def test_nonsense_is_refused(text):
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
def test_every_limit_counts(limits, met):
    """A request is good when it is within all of them."""
    assert Slo.parse(limits).met(sample(0.0)) is met


def test_an_error_is_never_good():
    """However fast it was."""
    assert not Slo().met(sample(0.0, error="http_429"))


def test_one_long_gap_in_a_hundred_is_forgiven():
    """The itl is about 95 % of a request's own gaps; six long ones are too many."""
    slo = Slo(itl_s=0.02)
    assert slo.met(sample(0.0, gaps=[0.01] * 99 + [0.5]))
    assert not slo.met(sample(0.0, gaps=[0.01] * 94 + [0.5] * 6))
