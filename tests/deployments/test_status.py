"""What one ingress learns of the whole application."""

import asyncio

import pytest
from ray.exceptions import GetTimeoutError, RayError

from serve_app.api.status_page import KeyUse, Load, View
from serve_app.deployments import status
from serve_app.deployments.status import Fleet, load_of, publish_license, publish_window
from serve_app.errors import RequestCancelled
from serve_app.telemetry.cold_start import Phase

NODES = [{"NodeID": "1" * 56, "NodeName": "gpu-1"}, {"NodeID": "2" * 56, "NodeName": ""}]


def replica(name, state, node_id=None):
    return {"replica_id": name, "state": state, "node_id": node_id}


@pytest.fixture
def serve(monkeypatch, kv_store):
    """An instance with two replicas that run or start, and one that has no node yet."""
    found = [
        replica("a", "RUNNING", "1" * 56),
        replica("b", "STARTING", "2" * 56),
        replica("c", "STARTING"),
    ]
    known = {"llm": {"LLMServer": found, "Ingress": [replica("me", "RUNNING")]}}
    phases = {"b": Phase("download", 1.0, 3, 10)}
    monkeypatch.setattr(status, "replicas", lambda name, timeout_s: known[name])
    monkeypatch.setattr(status.cold_start, "running", lambda name, since: phases)
    monkeypatch.setattr(status, "all_nodes", lambda: NODES)
    return kv_store.held


async def nothing():
    return ""


def fleet(application="llm", metrics=nothing, **options):
    return Fleet(application, metrics, **options)


async def test_fleet_has_each_replicas_node_state_and_phase(serve):
    """By the names that a person knows; a node without one by the beginning of its id."""
    found = {each["name"]: each for each in (await fleet().look()).replicas}
    assert [found[name]["state"] for name in "abc"] == ["RUNNING", "STARTING", "STARTING"]
    assert [found[name]["node"] for name in "abc"] == ["gpu-1", "2" * 12, ""]
    reported = [found["b"][name] for name in ("phase", "done_bytes", "total_bytes")]
    assert reported == ["download", 3, 10]
    assert (found["a"]["phase"], found["a"]["total_bytes"]) == (None, None)


async def test_fleet_has_the_license_that_a_replica_found_last(serve):
    """Of this application; none is an answer too."""
    text = {"title": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "sha256": "ab" * 32, "commit": "c"}
    publish_license("llm", text)
    publish_license("other", None)
    assert (await fleet().look()).license == text
    publish_license("llm", None)
    assert (await fleet().look()).license is None


async def test_fleet_has_the_window_that_a_replica_found_last(serve):
    """Of this application; it stays known while the service sleeps."""
    assert (await fleet().look()).max_context_tokens is None
    publish_window("llm", 8192)
    publish_window("other", 1)
    assert (await fleet().look()).max_context_tokens == 8192


@pytest.mark.parametrize("error", [GetTimeoutError(), ValueError("no controller")])
async def test_fleet_is_none_for_what_is_not_known(serve, monkeypatch, error):
    """A controller that does not answer, or is not there, fails no page."""

    def fail(name, timeout_s):
        raise error

    monkeypatch.setattr(status, "replicas", fail)
    assert await fleet().look() == View(None)


async def test_fleet_does_not_know_an_application_that_is_gone(serve):
    """Deleted while its page is open."""
    assert await fleet("other").look() == View(None)


async def test_fleet_is_asked_once_for_many_who_look(serve, monkeypatch):
    """However many pages are open."""
    asked = []
    monkeypatch.setattr(status, "_view_of", lambda name: asked.append(name) or View([]))
    watched = fleet()
    assert await asyncio.gather(*(watched.look() for _ in range(20))) == [View([])] * 20
    assert asked == ["llm"]


PAGE = """\
# HELP ray_serve_app_requests_total Requests by how they ended.
# TYPE ray_serve_app_requests_total counter
ray_serve_app_requests_total{application="llm",path="CHAT",status="200",outcome="stop"} 5.0
ray_serve_app_requests_total{application="llm",path="CHAT",status="200",outcome="length",n="b"} 2.0
ray_serve_app_requests_total{application="llm",path="CHAT",status="500",outcome="engine_error"} 1.0
ray_serve_app_requests_total{application="llm",path="CHAT",status="429",outcome="overloaded"} 3.0
ray_serve_app_requests_total{application="llm",path="CHAT",status="499",outcome="GONE"} 9.0
ray_serve_app_requests_total{application="llm",path="/v1/models",status="200",outcome="ok"} 40.0
ray_serve_app_requests_total{application="llm",path="unmatched",status="404",outcome="x"} 70.0
ray_serve_app_requests_total{application="other",path="CHAT",status="200",outcome="stop"} 600.0
ray_serve_app_generation_tokens_total{application="llm",replica="i1"} 100.0
ray_serve_app_generation_tokens_total{application="llm",replica="i2"} 20.0
ray_serve_app_num_requests_running{application="llm",replica="a"} 3.0
ray_serve_app_num_requests_running{application="llm",replica="b"} 4.0
ray_serve_app_num_requests_waiting{application="llm",replica="a"} 6.0
ray_serve_deployment_queued_queries{application="llm",deployment="LLMServer",handle="h"} 2.0
ray_serve_deployment_queued_queries{application="llm",deployment="Ingress",handle="h"} 50.0
ray_serve_app_num_requests_waiting_for_nothing{application="llm"} 1000.0
ray_serve_app_key_requests_total{application="llm",key="a",limited="no",replica="i1"} 5.0
ray_serve_app_key_requests_total{application="llm",key="a",limited="no",replica="i2"} 4.0
ray_serve_app_key_requests_total{application="llm",key="a",limited="yes",replica="i2"} 2.0
ray_serve_app_key_requests_total{application="other",key="b",limited="no"} 7.0
ray_serve_app_key_prompt_tokens_total{application="llm",key="a"} 300.0
ray_serve_app_key_generation_tokens_total{application="llm",key="a"} 50.0
""".replace("CHAT", "/v1/chat/completions").replace("GONE", RequestCancelled.code)


def test_load_of_adds_up_all_replicas_of_the_application():
    """What waits in Serve's line counts; what clients ended themselves is neither end."""
    assert load_of(PAGE, "llm") == Load(
        waiting=8,
        running=7,
        finished=7,
        failed=4,
        generation_tokens=120,
        keys={"a": KeyUse(requests=11, limited=2, prompt_tokens=300, completion_tokens=50)},
    )
    assert load_of(PAGE, "other").finished == 600
    assert load_of("", "llm") == Load(0, 0, 0, 0, 0)


def test_load_of_knows_an_application_of_any_name():
    """Prometheus' text escapes some characters of a label."""
    page = PAGE.replace('"llm"', r'"a\\b\"c"')
    assert load_of(page, 'a\\b"c').finished == 7


async def test_rate_is_of_the_last_half_minute(monkeypatch):
    """None at first; a replica that ended with its count makes it no less than nothing."""
    now, tokens = [0.0], [100]

    async def metrics():
        return f'ray_serve_app_generation_tokens_total{{application="llm"}} {tokens[0]}\n'

    monkeypatch.setattr(status, "LOAD_FRESH_S", 0.0)
    watched = fleet(metrics=metrics, clock=lambda: now[0])

    async def rate(at, count):
        now[0], tokens[0] = at, count
        return (await watched.load()).tokens_per_s

    assert await rate(0.0, 100) is None
    assert await rate(10.0, 150) == 5.0
    assert await rate(20.0, 150) == 2.5
    assert await rate(30.0, 20) == 1.7
    assert await rate(39.0, 20) == 0.0
    assert await rate(49.0, 120) == 3.4
    assert await rate(200.0, 500) is None, "nobody looked for longer than that"


async def test_fleet_has_no_load_when_the_cluster_does_not_answer():
    """And fails no page."""

    async def lost():
        raise RayError("gone")

    assert await fleet(metrics=lost).load() is None
