"""Token files on nodes where no process of ours runs."""

import pytest

from serve_app.access.file_watch import TOKEN, Change, Look
from serve_app.cluster.nodes import Lost, Node
from serve_app.config import AccessConfig
from serve_app.deployments import node_files
from serve_app.deployments.node_files import NodeFiles

CHANGE = Change(TOKEN, "/token", "2", "alice")


class Tasks:
    """Looks that end when the test says so."""

    def __init__(self):
        self.known = {}
        self.ended = {}
        self.cancelled = []
        self.present = ["a", "b"]

    def nodes(self):
        return [Node(name, name) for name in self.present]

    def start(self, node, access, known, limit_s):
        ref = (node.node_id, len(self.known))
        self.known[ref] = known
        return ref

    def wait(self, refs, timeout_s):
        return [ref for ref in refs if ref in self.ended]

    def result(self, ref):
        if isinstance(self.ended[ref], Lost):
            raise self.ended[ref]
        return self.ended[ref]

    def cancel(self, ref):
        self.cancelled.append(ref)

    def running(self, node_id):
        return max((ref for ref in self.known if ref[0] == node_id), key=lambda ref: ref[1])


@pytest.fixture
def watched():
    tasks, seen = Tasks(), []
    files = NodeFiles(
        lambda: frozenset("abc"),
        lambda *change: seen.append(change),
        lambda _place: tasks,
    )
    files.place(AccessConfig(), ["anywhere"])
    assert files.changed() == frozenset()
    for node_id in "ab":
        tasks.ended[tasks.running(node_id)] = Look({TOKEN: "1"})
    assert files.changed() == {"a", "b"}  # since they were asked last, their files may be others
    assert files.changed() == frozenset()
    return files, tasks, seen


def test_node_files_changed_names_the_node_and_goes_on_from_what_it_saw(watched):
    """The next look knows what the last one found, so no change falls between two."""
    files, tasks, seen = watched
    tasks.ended[tasks.running("a")] = Look({TOKEN: "2"}, (CHANGE,))
    assert files.changed() == {"a"}
    assert seen == [("a", CHANGE)]
    assert tasks.known[tasks.running("a")] == {TOKEN: "2"}
    assert files.changed() == frozenset()
    assert len(tasks.known) == 5


def test_node_files_changed_tries_a_lost_node_again_after_a_pause(watched, monkeypatch):
    """Not every second: its environment may lack this package."""
    files, tasks, seen = watched
    tasks.ended[tasks.running("b")] = Lost("its worker died")
    assert files.changed() == frozenset()
    assert len(tasks.known) == 4
    later = node_files.time.monotonic() + node_files.LOST_S + 1
    monkeypatch.setattr(node_files.time, "monotonic", lambda: later)
    files.changed()
    assert len(tasks.known) == 5
    assert seen == []


def test_node_files_changed_looks_at_nodes_that_join(watched):
    """If a replica is there: a look would keep an idle node from being taken away."""
    files, tasks, _ = watched
    tasks.present += ["c", "idle"]
    files.changed()
    assert {node for node, _ in tasks.known} == {"a", "b", "c"}


def test_node_files_stop_ends_the_looks(watched):
    """Tasks hold processes on the nodes."""
    files, tasks, _ = watched
    files.stop()
    assert {node for node, _ in tasks.cancelled} == {"a", "b"}
