"""Connecting and asking all nodes, without a cluster; tests/integration has one."""

import pytest

from serve_app.cluster import connection, tasks
from serve_app.cluster.connection import connected
from serve_app.cluster.nodes import Demand, Lost, Node
from serve_app.cluster.placement import Placement
from serve_app.cluster.tasks import NodeTasks

DEMANDS = (Demand({"CPU": 1}),)
APP_ENV = {"working_dir": "./here", "env_vars": {"A": "1"}}


@pytest.fixture
def ray_calls(monkeypatch):
    """Record what is asked of Ray; nothing is started."""
    calls = []
    monkeypatch.setattr(tasks.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(tasks.ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(tasks.ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(connection, "find_cluster", lambda address: address)
    return calls


def test_connected_job_carries_the_applications_environment_and_tasks_the_rest(ray_calls):
    """Only a job may upload a local directory; what a deployment overrides is asked for again."""
    merged = APP_ENV | {"env_vars": {"A": "1", "B": "2"}}
    with connected(Placement(DEMANDS, merged), APP_ENV, "host:1") as placement:
        assert placement == Placement(DEMANDS, {"env_vars": {"A": "1", "B": "2"}})
    assert [call if call == "shutdown" else call["runtime_env"] for call in ray_calls] == [
        APP_ENV,
        "shutdown",
    ]


def test_connected_ends_with_an_error_too(ray_calls):
    """A process does not stay in somebody's cluster."""
    with pytest.raises(KeyError), connected(Placement(DEMANDS), {}, "host:1"):
        raise KeyError
    assert ray_calls[-1] == "shutdown"


def test_connected_leaves_a_process_that_is_connected(ray_calls, monkeypatch):
    """Its own job cannot change; tasks ask for everything."""
    monkeypatch.setattr(tasks.ray, "is_initialized", lambda: True)
    placed = Placement(DEMANDS, APP_ENV)
    with connected(placed, APP_ENV, None) as placement:
        assert placement == placed
    assert ray_calls == []


def test_connected_without_an_address_has_no_cluster(ray_calls):
    """None, not this machine by accident."""
    with connected(Placement(DEMANDS), {}, None) as placement:
        assert placement is None
    assert ray_calls == []


class Simulated(NodeTasks):
    """Nodes that answer with a word, are lost, or stay silent (None)."""

    def __init__(self, answers):
        super().__init__(None, str, Placement(DEMANDS))
        self.answers = answers
        self.cancelled = []

    def nodes(self):
        return [Node(f"id-{name}", name) for name in self.answers]

    def start(self, node, *arguments):
        assert arguments == ("question",)
        return node.name

    def wait(self, refs, timeout_s):
        return [ref for ref in refs if self.answers[ref] is not None]

    def result(self, ref):
        if isinstance(self.answers[ref], Lost):
            raise self.answers[ref]
        return self.answers[ref]

    def cancel(self, ref):
        self.cancelled.append(ref)


def test_ask_all_nodes_and_each_answers_for_itself():
    """The silent one is cancelled, the lost one reported, the others' answers are there."""
    tasks = Simulated({"a": "yes", "b": None, "c": Lost("died")})
    answers = tasks.ask_all("question", timeout_s=2)
    assert {node.name: str(answer) for node, answer in answers} == {
        "a": "yes",
        "b": "no answer within 2 s",
        "c": "died",
    }
    assert tasks.cancelled == ["b"]
    assert Simulated({}).ask_all("question", timeout_s=1) == []
