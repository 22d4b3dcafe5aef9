"""One page out of the pages of all nodes."""

import time

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayError

from serve_app.telemetry import prometheus

NODE_A = """\
# HELP ray_serve_app_seconds Time.
# TYPE ray_serve_app_seconds histogram
ray_serve_app_seconds_bucket{le="1.0",route="a b}"} 2.0
ray_serve_app_seconds_bucket{le="+Inf",route="a b}"} 3.0
ray_serve_app_seconds_count{route="a b}"} 3.0
ray_serve_app_seconds_sum{route="a b}"} 4.5
# HELP ray_node_cpu CPU.
# TYPE ray_node_cpu gauge
ray_node_cpu 0.5
# HELP ray_serve_up Up.
# TYPE ray_serve_up gauge
ray_serve_up 1.0
"""
NODE_B = NODE_A.replace("ray_serve_up 1.0", 'ray_serve_up{node_id="own"} 1.0')


def families(text):
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_merge_makes_one_page_of_two_nodes_that_prometheus_reads():
    """Every header stands once, and each sample names its node."""
    page = prometheus.merge({"a": NODE_A, "b": NODE_B})
    assert page.count("# TYPE ray_serve_app_seconds ") == 1
    found = families(page)
    assert len(found["ray_serve_app_seconds"].samples) == 8
    nodes = {sample.labels["node_id"] for sample in found["ray_serve_app_seconds"].samples}
    assert nodes == {"a", "b"}
    assert {sample.labels["route"] for sample in found["ray_serve_app_seconds"].samples} == {"a b}"}


def test_merge_keeps_a_nodes_name_that_serve_gave():
    """A label that is there is not put a second time."""
    found = families(prometheus.merge({"a": NODE_A, "b": NODE_B}))
    assert [sample.labels for sample in found["ray_serve_up"].samples] == [
        {"node_id": "a"},
        {"node_id": "own"},
    ]


def test_merge_leaves_out_what_is_not_serves():
    """Ray's hundreds of own metrics stay on its own pages."""
    assert "ray_node_cpu" not in prometheus.merge({"a": NODE_A})


async def test_exposition_counts_a_silent_node_and_does_not_wait(monkeypatch):
    """The page says whose metrics are missing; a dead node is not asked."""

    async def page(_request):
        return web.Response(text=NODE_A)

    application = web.Application()
    application.router.add_get("/metrics", page)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    nodes = [
        {"NodeID": name, "Alive": alive, "NodeManagerAddress": host, "MetricsExportPort": at}
        for name, alive, host, at in [
            ("good", True, "127.0.0.1", port),
            ("closed", True, "127.0.0.1", 1),
            ("dead", False, "127.0.0.1", port),
        ]
    ]
    monkeypatch.setattr(prometheus.ray, "nodes", lambda: nodes)
    try:
        found = families(await prometheus.Exposition(set).page())
    finally:
        await runner.cleanup()
    scraped = {s.labels["node_id"]: s.value for s in found["serve_app_node_scraped"].samples}
    assert scraped == {"good": 1, "closed": 0}
    assert found["ray_serve_up"].samples[0].labels == {"node_id": "good"}


REPLICAS = """\
# HELP ray_serve_app_checks_total Checks.
# TYPE ray_serve_app_checks_total counter
ray_serve_app_checks_total{deployment="LLMServer",replica="new",outcome="granted"} 1.0
ray_serve_app_checks_total{deployment="LLMServer",replica="old",outcome="no_token"} 1.0
ray_serve_app_checks_total{replica="old-too",x="replica=\\"new\\""} 1.0
# HELP ray_serve_up Up.
# TYPE ray_serve_up gauge
ray_serve_up 1.0
"""


@pytest.fixture
async def node():
    """A node whose page shows a replica that lives and two that do not."""

    async def page(_request):
        return web.Response(text=REPLICAS)

    application = web.Application()
    application.router.add_get("/metrics", page)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    yield {
        "NodeID": "a",
        "Alive": True,
        "NodeManagerAddress": "127.0.0.1",
        "MetricsExportPort": port,
    }
    await runner.cleanup()


async def shown(page):
    found = families(await page.page())
    assert found["ray_serve_up"].samples  # what is of no replica always is
    return {sample.labels["replica"] for sample in found["ray_serve_app_checks"].samples}


async def test_exposition_drops_a_dead_replicas_counts_after_a_while(node, monkeypatch):
    """Each try of a refused replica is a replica, and Ray's own page keeps all of them."""
    now = 1000.0
    living = {"new"}
    monkeypatch.setattr(prometheus.ray, "nodes", lambda: [node])
    page = prometheus.Exposition(lambda: living, lambda: now)
    assert await shown(page) == {"new", "old", "old-too"}
    now += prometheus.KEPT_S - 1
    living.add("old")  # such as one that started while the list was made
    assert await shown(page) == {"new", "old", "old-too"}
    now += 1
    assert await shown(page) == {"new", "old"}
    living.remove("old")
    now += prometheus.KEPT_S - 1
    assert await shown(page) == {"new", "old"}
    now += prometheus.KEPT_S
    assert await shown(page) == {"new"}


async def test_exposition_keeps_every_count_while_nobody_says_who_lives(node, monkeypatch):
    """A page without half of its series would look like a service that broke down."""

    def silent():
        raise RayError

    monkeypatch.setattr(prometheus.ray, "nodes", lambda: [node])
    ages = iter([0.0, 1e6, 2e6])
    page = prometheus.Exposition(silent, lambda: next(ages))
    for _ in range(2):
        assert await shown(page) == {"new", "old", "old-too"}


def test_merge_of_ten_thousand_dead_replicas_costs_no_time():
    """The page is made while the ingress serves."""
    dead = {f"replica{number}" for number in range(10_000)}
    lines = [f'ray_serve_app_checks_total{{replica="{each}"}} 1.0' for each in sorted(dead)]
    text = "\n".join([*REPLICAS.splitlines()[:2], *lines, *REPLICAS.splitlines()[2:]])
    began = time.monotonic()
    page = prometheus.merge({"a": text}, dead)
    assert time.monotonic() - began < 5
    assert len(families(page)["ray_serve_app_checks"].samples) == 3
