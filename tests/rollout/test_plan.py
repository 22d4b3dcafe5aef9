"""What the plan says of the time that a start takes, and what it never says."""

import pytest
from ray.exceptions import RayError

from serve_app.cli import deploy
from serve_app.rollout import plan
from serve_app.serve_config import IMPORT_PATH
from serve_app.telemetry.cold_start import Span, Start


def start(*, download=1.0, size=0, application="llm"):
    """Return one whose libraries take 3 s beside the download, and its loading 6 s after it."""
    begins = max(download, 3.0)
    spans = (
        Span("download", 0.0, download),
        Span("libraries", 0.0, 3.0),
        Span("load", begins, 6.0),
    )
    return Start(application, "r", "n", spans, begins + 6.0, {"hub": size})


@pytest.fixture
def starts(monkeypatch):
    """What the cluster remembers."""
    known = []
    monkeypatch.setattr(plan.cold_start, "recent", lambda: known)
    return known


def test_without_an_earlier_start_of_the_application_no_time_is_named(starts):
    """Another application's say nothing of this one."""
    starts.append(start(application="other"))
    assert list(plan.forecasts("llm", 900)) == ["llm: no earlier start to judge the time by"]


def test_where_the_weights_are_one_forecast_is_enough(starts):
    """With nothing to fetch on any node; what overlaps counts once."""
    starts += [start(), start(download=5.0)]
    assert list(plan.forecasts("llm", 0)) == [
        "llm: a replica was ready after 10 s (median of 2 starts, 9 to 11 s)",
        "llm: forecast where the weights are: 9 s",
    ]


def test_the_node_with_most_to_fetch_has_a_forecast_of_its_own(starts):
    """By the rate of those that fetched: ten bytes a second."""
    starts += [start(), start(download=60.0, size=600)]
    assert list(plan.forecasts("llm", 2000))[1:] == [
        "llm: forecast where the weights are: 9 s",
        "llm: forecast where 2,000 bytes are to be fetched: 206 s",
    ]


def test_bytes_that_hide_behind_the_libraries_cost_nothing(starts):
    """Ten bytes a second: 20 bytes are here before the libraries are."""
    starts.append(start(download=60.0, size=600))
    *_, last = plan.forecasts("llm", 20)
    assert last == "llm: forecast where 20 bytes are to be fetched: 9 s"


def test_bytes_that_nobody_fetched_before_have_no_forecast(starts):
    """The warm one stays."""
    starts.append(start())
    assert list(plan.forecasts("llm", 2000))[1:] == [
        "llm: forecast where the weights are: 9 s",
        "llm: forecast where 2,000 bytes are to be fetched: none, no replica fetched before",
    ]


def test_a_store_that_does_not_answer_fails_no_plan(monkeypatch):
    """The time is a help; the rollout goes on without."""

    def lost():
        raise RayError("gone")

    monkeypatch.setattr(plan.cold_start, "recent", lost)
    assert list(plan.forecasts("llm", 0)) == ["llm: no earlier start to judge the time by"]


def test_a_token_that_serves_already_is_not_printed(monkeypatch, capsys):
    """A file with one is refused; what came by `serve deploy` was never looked at."""
    token = "hf_" + "a" * 34
    app = {"name": "llm", "import_path": IMPORT_PATH, "args": {}}
    held = app | {"args": {"access": {"token": f"{'x' * 50}\n{token}"}}}

    class Serving:
        def __init__(self, goal):
            pass

        @staticmethod
        def goal():
            return {"applications": [held]}

    monkeypatch.setattr(deploy, "Instance", Serving)
    options = deploy.Options(timeout_s=1.0, dry_run=True)
    assert deploy.run({"applications": [app]}, (), {}, options) == 0
    told = capsys.readouterr().err
    assert "llm: args.access.token:" in told
    assert token[:10] not in told
