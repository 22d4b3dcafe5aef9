"""What one ingress learns of the whole application."""

import asyncio

import pytest
from ray.exceptions import GetTimeoutError

from serve_app.api.status_page import View
from serve_app.deployments import status
from serve_app.deployments.status import Fleet, publish_window, tell_license
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
    ingresses = [replica("me", "RUNNING"), replica("you", "RUNNING"), replica("new", "STARTING")]
    known = {"llm": {"LLMServer": found, "Ingress": ingresses}}
    phases = {"b": Phase("download", 1.0, 3, 10)}
    monkeypatch.setattr(status, "replicas", lambda name, timeout_s: known[name])
    monkeypatch.setattr(status.cold_start, "running", lambda name, since: phases)
    monkeypatch.setattr(status, "all_nodes", lambda: NODES)
    return kv_store.held


def counts(running):
    rest = {"waiting": 0, "finished": 0, "failed": 0, "generation_tokens": 0, "recent": []}
    return rest | {"running": running}


async def test_each_replica_has_its_node_state_and_phase(serve):
    """By the names that a person knows; a node without one by the beginning of its id."""
    found = {each["name"]: each for each in (await Fleet("llm", "me").look()).replicas}
    assert [found[name]["state"] for name in "abc"] == ["RUNNING", "STARTING", "STARTING"]
    assert [found[name]["node"] for name in "abc"] == ["gpu-1", "2" * 12, ""]
    told = [found["b"][name] for name in ("phase", "done_bytes", "total_bytes")]
    assert told == ["download", 3, 10]
    assert (found["a"]["phase"], found["a"]["total_bytes"]) == (None, None)


async def test_an_ingress_sees_the_living_others_and_not_itself(serve):
    """Who was killed is not counted any more, who has counted nothing yet is not there."""
    for name, running in (("me", 1), ("you", 2), ("killed", 4)):
        Fleet("llm", name).tell(counts(running))
    Fleet("other", "you").tell(counts(8))
    assert (await Fleet("llm", "me").look()).others == (counts(2),)
    assert (await Fleet("llm", "you").look()).others == (counts(1),)
    assert set(serve) == {"board/llm/me", "board/llm/you", "board/other/you"}


async def test_the_license_is_the_one_that_a_replica_found_last(serve):
    """Of this application; none is an answer too."""
    text = {"title": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "sha256": "ab" * 32, "commit": "c"}
    tell_license("llm", text)
    tell_license("other", None)
    assert (await Fleet("llm", "me").look()).license == text
    tell_license("llm", None)
    assert (await Fleet("llm", "me").look()).license is None


async def test_the_window_is_what_a_replica_found_last(serve):
    """Of this application; it stays known while the service sleeps."""
    assert (await Fleet("llm", "me").look()).max_context_tokens is None
    publish_window("llm", 8192)
    publish_window("other", 1)
    assert (await Fleet("llm", "me").look()).max_context_tokens == 8192


@pytest.mark.parametrize("error", [GetTimeoutError(), ValueError("no controller")])
async def test_what_is_not_known_is_none(serve, monkeypatch, error):
    """A controller that does not answer, or is not there, fails no page."""

    def fail(name, timeout_s):
        raise error

    monkeypatch.setattr(status, "replicas", fail)
    assert await Fleet("llm", "me").look() == View(None, ())


async def test_an_application_that_is_gone_is_not_known(serve):
    """Deleted while its page is open."""
    assert await Fleet("other", "me").look() == View(None, ())


async def test_many_who_look_ask_once_a_second(serve, monkeypatch):
    """At the same time and one after the other."""
    asked, now = [], [0.0]
    monkeypatch.setattr(Fleet, "_ask", lambda self: asked.append(1) or View([], ()))
    watched = Fleet("llm", "me", lambda: now[0])
    assert await asyncio.gather(*(watched.look() for _ in range(20))) == [View([], ())] * 20
    now[0] += 0.9
    await watched.look()
    assert len(asked) == 1
    now[0] += 0.2
    await watched.look()
    assert len(asked) == 2
