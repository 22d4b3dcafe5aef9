"""The cluster's memory of how rollouts ended."""

import time

import pytest
from ray.exceptions import RayError
from ray.serve.metrics import Counter, Gauge

from serve_app.telemetry import rollout_counts
from serve_app.telemetry.metrics import RolloutMetrics
from serve_app.telemetry.rollout_counts import Result


@pytest.fixture
def kept(kv_store):
    """What the cluster keeps."""
    return kv_store.held


def test_each_result_of_each_application_counts_by_itself(kept):
    """With the time and the length of the last one; one key each, however many there were."""
    for seconds in (1.0, 2.0, 3.0):
        rollout_counts.note("llm", Result.BLOCKED, duration_s=seconds)
    rollout_counts.note("llm", Result.DONE, duration_s=30.0)
    rollout_counts.note("other", Result.FAILED, duration_s=5.0)
    told = rollout_counts.told("llm")
    assert {result: ends.count for result, ends in told.items()} == {"blocked": 3, "done": 1}
    assert told[Result.BLOCKED].duration_s == 3.0
    assert abs(told[Result.BLOCKED].at - time.time()) < 60
    assert len(kept) == 3
    assert rollout_counts.told("nobody") == {}


@pytest.mark.parametrize("behind_s", [0.0, 300.0, 1e8])
def test_the_later_end_has_the_later_date_whatever_a_clock_says(kept, monkeypatch, behind_s):
    """A build and a command count on machines of their own; an alert compares the dates."""
    monkeypatch.setattr(time, "time", lambda: 1e9)
    rollout_counts.note("llm", Result.BLOCKED, duration_s=1.0)
    monkeypatch.setattr(time, "time", lambda: 1e9 - behind_s)
    rollout_counts.note("llm", Result.DONE, duration_s=1.0)
    rollout_counts.note("llm", Result.BLOCKED, duration_s=1.0)
    rollout_counts.note("other", Result.DONE, duration_s=1.0)
    told = rollout_counts.told("llm")
    assert told[Result.BLOCKED].at > told[Result.DONE].at > 1e9
    assert told[Result.BLOCKED].at < 1e9 + 1
    assert rollout_counts.told("other")[Result.DONE].at == 1e9 - behind_s


def test_two_who_count_at_once_are_two(kept, monkeypatch):
    """The number that somebody else took in between is not taken again."""
    rollout_counts.note("llm", Result.DONE, duration_s=1.0)
    monkeypatch.setattr(
        rollout_counts, "_numbers", lambda prefix: []
    )  # as seen before the first counted
    rollout_counts.note("llm", Result.DONE, duration_s=2.0)
    monkeypatch.undo()
    assert sorted(kept) == ["rollouts/llm/done/1", "rollouts/llm/done/2"]


def test_a_cluster_that_does_not_answer_costs_the_count_alone(kv_store):
    """A rollout does not fail by being counted."""
    kv_store.is_lost = True
    rollout_counts.note("llm", Result.DONE, duration_s=1.0)
    with pytest.raises(RayError):
        rollout_counts.told("llm")


def test_the_counter_grows_by_what_is_new(monkeypatch):
    """A new ingress begins with all that was counted before; the gauges are set each time."""
    added, was_set = [], []
    monkeypatch.setattr(Counter, "inc", lambda _self, value, tags: added.append((value, tags)))
    monkeypatch.setattr(Gauge, "set", lambda _self, value, tags: was_set.append((value, tags)))
    shown = RolloutMetrics()
    for count in (3, 3, 5):
        shown.show("blocked", count=count, at=100.0, duration_s=2.0)
    assert added == [(3, {"result": "blocked"}), (2, {"result": "blocked"})]
    assert was_set == [(100.0, {"result": "blocked"}), (2.0, {"result": "blocked"})] * 3
