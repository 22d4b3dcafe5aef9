"""What the status page is told of the replicas."""

import asyncio

import pytest
from ray.exceptions import GetTimeoutError

from serve_app import replicas
from serve_app.ledger import Phase
from serve_app.replicas import Replicas, read_replicas

NODES = [{"NodeID": "1" * 56, "NodeName": "gpu-1"}, {"NodeID": "2" * 56, "NodeName": ""}]


def replica(name, state, node_id=None):
    return {"replica_id": name, "state": state, "node_id": node_id}


@pytest.fixture
def serve(monkeypatch):
    """An instance with two replicas that run or start, and one that has no node yet."""
    found = [
        replica("a", "RUNNING", "1" * 56),
        replica("b", "STARTING", "2" * 56),
        replica("c", "STARTING"),
    ]
    details = {"applications": {"llm": {"deployments": {"LLMServer": {"replicas": found}}}}}
    phases = {"b": Phase("download", 1.0, 3, 10)}
    monkeypatch.setattr(replicas, "instance_details", lambda timeout_s: details)
    monkeypatch.setattr(replicas.ledger, "running", lambda name, since: phases)
    monkeypatch.setattr(replicas, "all_nodes", lambda: NODES)


def test_each_replica_has_its_node_state_and_phase(serve):
    """By the names that a person knows; a node without one by the beginning of its id."""
    found = {each["name"]: each for each in read_replicas("llm")}
    assert {name: each["state"] for name, each in found.items()} == {
        "a": "RUNNING",
        "b": "STARTING",
        "c": "STARTING",
    }
    assert [found[name]["node"] for name in "abc"] == ["gpu-1", "2" * 12, ""]
    assert (found["b"]["phase"], found["b"]["done_bytes"], found["b"]["total_bytes"]) == (
        "download",
        3,
        10,
    )
    assert (found["a"]["phase"], found["a"]["total_bytes"]) == (None, None)


@pytest.mark.parametrize("error", [GetTimeoutError(), ValueError("no controller")])
def test_what_is_not_known_is_none(serve, monkeypatch, error):
    """A controller that does not answer, or is not there, fails no page."""

    def fail(timeout_s):
        raise error

    monkeypatch.setattr(replicas, "instance_details", fail)
    assert read_replicas("llm") is None


def test_an_application_that_is_gone_is_not_known(serve):
    """Deleted while its page is open."""
    assert read_replicas("other") is None


async def test_many_who_look_ask_once_a_second():
    """At the same time and one after the other."""
    asked, now = [], [0.0]
    ask = Replicas("llm", lambda name: asked.append(name) or [], lambda: now[0])
    assert await asyncio.gather(*(ask() for _ in range(20))) == [[]] * 20
    now[0] += 0.9
    await ask()
    assert asked == ["llm"]
    now[0] += 0.2
    await ask()
    assert asked == ["llm", "llm"]
