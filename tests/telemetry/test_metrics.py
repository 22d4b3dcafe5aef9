"""Gauges that are set once stay on the page, though Ray forgets them."""

import asyncio
from dataclasses import replace

import pytest
from ray.exceptions import RayError
from ray.serve.metrics import Counter, Gauge

from serve_app.access.verdict import NodeVerdict, Outcome, Verdict
from serve_app.api.keys import Key
from serve_app.api.request_record import RequestRecord
from serve_app.engine.stats import EngineStats
from serve_app.telemetry import metrics


@pytest.fixture
def published(monkeypatch):
    """What was set: value and tags, in order."""
    seen = []
    monkeypatch.setattr(Gauge, "set", lambda _self, value, tags=None: seen.append((value, tags)))
    return seen


async def test_access_metrics_publish_a_verdict_until_the_next_one(published, monkeypatch):
    """An alert over a grant that was lost an hour ago still sees it."""
    monkeypatch.setattr(metrics, "REPEAT_S", 0.01)
    access = metrics.AccessMetrics()
    lost = NodeVerdict("id", "a", Outcome.EXPIRED_TOKEN, "fix")
    access.show(Verdict("acme/tiny", "main", None, "https://hub", 0.1, (lost,)))
    first = sorted(published, key=str)
    assert (0.0, {"node": "a", "repo": "acme/tiny", "outcome": "granted"}) in first
    published.clear()
    keeping = asyncio.create_task(access.keep(lambda: {"id"}))
    async with asyncio.timeout(5):
        while len(published) < 2 * len(first):
            await asyncio.sleep(0.01)
    keeping.cancel()
    assert sorted(published[: len(first)], key=str) == first


def verdict_of(*nodes):
    return Verdict("acme/tiny", "main", None, "https://hub", 0.1, nodes)


def node(number, outcome=Outcome.GRANTED, **facts):
    return NodeVerdict(f"id-{number}", f"node-{number}", outcome, "fix", **facts)


def test_access_metrics_have_series_of_their_own_for_adapters(published):
    """One node, two repositories."""
    lost = Verdict("acme/legal", "main", None, "https://hub", 0.1, (node(1, Outcome.NO_TOKEN),))
    whole = replace(verdict_of(node(1)), adapters={"legal": lost})
    metrics.AccessMetrics().show(whole)
    present = {tags["repo"]: tags["outcome"] for value, tags in published if value}
    assert present == {"acme/tiny": "granted", "acme/legal": "no_token"}


def test_access_metrics_show_the_refused_one_of_two_commits(published):
    """Whichever is named first: an alert must not depend on it."""
    one = Verdict("acme/x", "v1", None, "https://hub", 0.1, (node(1),))
    other = Verdict(
        "acme/x", "v2", None, "https://hub", 0.1, (node(1, Outcome.REVISION_NOT_FOUND),)
    )
    for adapters in ({"a": one, "b": other}, {"b": other, "a": one}):
        published.clear()
        metrics.AccessMetrics().show(replace(verdict_of(node(1)), adapters=adapters))
        present = {tags["repo"]: tags["outcome"] for value, tags in published if value}
        assert present["acme/x"] == "revision_not_found"


def series(published):
    """Nodes and outcomes of what was published, once each."""
    return {(tags["node"], tags["outcome"]) for _, tags in published}


def test_access_metrics_leave_no_series_of_nodes_that_come_and_go(published):
    """After a thousand of them, each refused before it left, only the one that is there counts."""
    access = metrics.AccessMetrics()
    for number in range(1000):
        access.show(verdict_of(node(number), node(number + 1, Outcome.NO_TOKEN)))
    published.clear()
    access.show(verdict_of(node(7, Outcome.EXPIRED_TOKEN)))
    assert series(published) == {("node-7", "granted"), ("node-7", "expired_token")}


def test_access_metrics_show_what_a_node_that_stays_had_before(published):
    """Else the series of an outcome that has passed would end at 1."""
    access = metrics.AccessMetrics()
    access.show(verdict_of(node(1, Outcome.NO_TOKEN)))
    published.clear()
    access.show(verdict_of(node(1)))
    assert {(value, tags["outcome"]) for value, tags in published} == {
        (1.0, "granted"),
        (0.0, "no_token"),
    }


async def test_access_metrics_forget_a_node_that_left_before_the_next_verdict(
    published, monkeypatch
):
    """Its last outcome may have been a refusal, and the next round may be a quarter hour away."""
    monkeypatch.setattr(metrics, "REPEAT_S", 0.01)
    alive = {"id-1", "id-2"}
    access = metrics.AccessMetrics()
    access.show(verdict_of(node(1), node(2, Outcome.PROBE_FAILED)))
    keeping = asyncio.create_task(access.keep(lambda: alive))
    async with asyncio.timeout(5):
        alive.remove("id-2")
        while published and "node-2" in {tags["node"] for _, tags in published[-3:]}:
            await asyncio.sleep(0.01)
        published.clear()
        while len(published) < 3:
            await asyncio.sleep(0.01)
    keeping.cancel()
    assert series(published) == {("node-1", "granted")}


async def test_access_metrics_forget_nothing_while_the_cluster_does_not_answer(
    published, monkeypatch
):
    """A head that restarts must not resolve an alert."""
    monkeypatch.setattr(metrics, "REPEAT_S", 0.01)

    def silent():
        raise RayError

    access = metrics.AccessMetrics()
    access.show(verdict_of(node(1, Outcome.NO_TOKEN)))
    published.clear()
    keeping = asyncio.create_task(access.keep(silent))
    async with asyncio.timeout(5):
        while len(published) < 4:
            await asyncio.sleep(0.01)
    assert not keeping.done()
    keeping.cancel()
    assert series(published) == {("node-1", "granted"), ("node-1", "no_token")}


def test_access_metrics_of_no_node(published):
    """While all nodes are scaled away, and where none was asked yet, nobody is woken."""
    nobody = NodeVerdict("", "(no node)", Outcome.PROBE_FAILED, "fix")
    access = metrics.AccessMetrics()
    access.show(verdict_of(nobody, node(1, deferred=True)))
    assert published == []


def test_server_metrics_publish_a_start_with_every_sample(published):
    """The cold start is on the page for as long as its replica runs."""
    server = metrics.ServerMetrics()
    server.started({"load_s": 2.0}, {})
    for _ in range(3):
        server.sample(EngineStats(0, 0, 0, 1, 0, 0, 0, 0))
    assert published.count((2.0, {"phase": "load"})) == 4


def test_ingress_metrics_count_by_the_keys_label(monkeypatch):
    """Whoever has no label of its own is counted with the others; without a key nothing is."""
    seen = []
    monkeypatch.setattr(
        Counter, "inc", lambda self, value=1, tags=None: seen.append((value, tags or {}))
    )
    ingress = metrics.IngressMetrics()
    plain = RequestRecord(
        request_id="r",
        path="/v1/completions",
        status=200,
        finish_reason="stop",
        error_code=None,
        prompt_tokens=7,
        completion_tokens=3,
        ttft_s=None,
        duration_s=0.1,
        stream=False,
        model="m",
    )
    ingress.observe(plain)
    assert not [tags for _, tags in seen if "key" in tags]
    ingress.observe(replace(plain, key=Key("a", label="a")))
    refused = {"prompt_tokens": 0, "completion_tokens": 0, "error_code": "key_limit_exceeded"}
    ingress.observe(replace(plain, key=Key("b"), **refused))
    assert [(value, tags) for value, tags in seen if "key" in tags] == [
        (1, {"key": "a", "limited": "no"}),
        (7, {"key": "a"}),
        (3, {"key": "a"}),
        (1, {"key": "other", "limited": "yes"}),
    ]
