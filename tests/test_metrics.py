"""Gauges that are set once stay on the page, though Ray forgets them."""

import asyncio

import pytest
from ray.serve.metrics import Gauge

from serve_app import metrics
from serve_app.access.verdict import NodeVerdict, Outcome, Verdict
from serve_app.engine.stats import EngineStats


@pytest.fixture
def published(monkeypatch):
    """What was set: value and tags, in order."""
    seen = []
    monkeypatch.setattr(Gauge, "set", lambda _self, value, tags=None: seen.append((value, tags)))
    return seen


async def test_a_verdict_is_published_until_the_next_one(published, monkeypatch):
    """An alert over a grant that was lost an hour ago still sees it."""
    monkeypatch.setattr(metrics, "REPEAT_S", 0.01)
    access = metrics.AccessMetrics()
    lost = NodeVerdict("id", "a", Outcome.EXPIRED_TOKEN, "mend")
    access.show(Verdict("acme/tiny", "main", None, "https://hub", 0.1, (lost,)))
    first = sorted(published, key=str)
    assert (0.0, {"node": "a", "repo": "acme/tiny", "outcome": "granted"}) in first
    published.clear()
    keeping = asyncio.create_task(access.keep())
    async with asyncio.timeout(5):
        while len(published) < 2 * len(first):
            await asyncio.sleep(0.01)
    keeping.cancel()
    assert sorted(published[: len(first)], key=str) == first


def test_a_start_is_published_with_every_sample(published):
    """The cold start is on the page for as long as its replica runs."""
    server = metrics.ServerMetrics()
    server.started({"load_s": 2.0}, {})
    for _ in range(3):
        server.sample(EngineStats(0, 0, 0, 1, 0, 0, 0, 0))
    assert published.count((2.0, {"phase": "load"})) == 4
