"""Gathering the answers of many nodes, simulated; Ray is not needed for it."""

import time
from dataclasses import dataclass, field

import pytest

from serve_app.access import collect
from serve_app.access.collect import Collection
from serve_app.access.verdict import NodeVerdict, Outcome
from serve_app.cluster.nodes import Lost, Node
from tests.access.cases import COMMIT, granted, verdict

OTHER = "d" * 40


@dataclass
class Simulated:
    """Nodes that answer at once with a verdict, raise, or stay silent (None)."""

    answers: dict[str, object]
    joins: dict[int, str] = field(default_factory=dict)  # look at the nodes -> who is new then
    looks: int = 0
    launched: list[tuple[str, str | None, NodeVerdict | None]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)

    def nodes(self):
        self.looks += 1
        late = {name for look, name in self.joins.items() if look > self.looks}
        return [Node(f"id-{name}", name) for name in sorted(self.answers) if name not in late]

    def launch(self, node, *, commit, hint, delay_s):
        assert 0 <= delay_s <= 2
        self.launched.append((node.name, commit, hint))
        return len(self.launched) - 1

    def wait(self, refs, timeout_s):
        done = [ref for ref in refs if self.answers[self.launched[ref][0]] is not None]
        if not done:
            time.sleep(timeout_s)
        return done

    def result(self, ref):
        name, commit, _ = self.launched[ref]
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return answer(commit)
        return answer

    def cancel(self, ref):
        self.cancelled.append(ref)


def run(answers, *, deadline_s=5.0, **facts):
    probes = Simulated(answers, **facts)
    collection = Collection(probes, deadline_s=deadline_s)
    return collection.run(), probes, collection


def outcomes(verdicts):
    return {entry.node_name: entry.outcome.value for entry in verdicts}


def test_collect_pins_the_first_nodes_commit_for_the_others():
    """One resolves the revision; everyone else proves that commit, with its hint."""
    verdicts, probes, collection = run({name: granted(name) for name in "abc"})
    assert [entry.node_name for entry in verdicts] == ["a", "b", "c"]
    assert probes.launched[0] == ("a", None, None)
    assert {commit for _, commit, _ in probes.launched[1:]} == {COMMIT}
    assert all(hint is not None for _, _, hint in probes.launched[1:])
    assert collection.commit == COMMIT


def test_collect_takes_each_nodes_name_from_the_cluster(monkeypatch):
    """Names and ids come from the cluster, not from what the probe believes."""
    answers = {"a": granted("hostname"), "b": verdict("hostname", Outcome.NO_TOKEN)}
    verdicts, _, _ = run(answers)
    assert [(v.node_id, v.node_name) for v in verdicts] == [("id-a", "a"), ("id-b", "b")]
    assert outcomes(verdicts) == {"a": "granted", "b": "no_token"}


def test_collect_loses_only_the_answer_of_a_silent_node():
    """Also if it is the first, which the others wait for: a quarter of the deadline."""
    began = time.monotonic()
    verdicts, probes, _ = run({"a": None, "b": granted("b"), "c": granted("c")}, deadline_s=1.0)
    assert time.monotonic() - began < 1.5
    assert outcomes(verdicts) == {"a": "probe_failed", "b": "granted", "c": "granted"}
    assert "no answer within 1 s" in verdicts[0].hub_message
    assert probes.cancelled == [0]


def test_collect_reports_a_lost_node():
    """With the reason, beside the others' answers."""
    verdicts, _, _ = run({"a": granted("a"), "b": Lost("the node died")})
    assert outcomes(verdicts) == {"a": "granted", "b": "probe_failed"}
    assert verdicts[1].hub_message == "the node died"


@pytest.mark.parametrize("look", [2, 3])
def test_collect_asks_nodes_that_join_too(look):
    """During the check, and also at the moment when everyone else has answered."""
    answers = {name: granted(name) for name in "abcd"}
    verdicts, _, _ = run(answers, joins={look: "d"})
    joined = look == 2
    assert ("d" in outcomes(verdicts)) is joined


def test_collect_does_not_split_the_cluster_when_a_branch_moves():
    """A node that read another commit is asked once more for the pinned one."""
    answers = {
        "a": None,
        "b": lambda commit: granted("b", commit or COMMIT),
        "c": lambda commit: granted("c", commit or OTHER),
    }
    verdicts, probes, collection = run(answers, deadline_s=1.0)
    read = {entry.node_name: entry.commit for entry in verdicts}
    assert read["b"] == read["c"] == collection.commit
    assert len(probes.launched) == 4


def test_collect_leaves_a_node_that_insists_on_another_commit():
    """It is asked again once, not for ever; the verdict over all is a no then."""
    answers = {"a": granted("a"), "b": granted("b", OTHER)}
    verdicts, probes, _ = run(answers)
    assert [entry.commit for entry in verdicts] == [COMMIT, OTHER]
    assert len(probes.launched) == 3


def test_collect_hands_on_what_a_refused_first_node_learned():
    """Its hint saves them the question whose token it is."""
    refused = verdict("a", Outcome.INVALID_TOKEN, commit=None)
    _, probes, _ = run({"a": refused, "b": refused})
    assert probes.launched[1][1:] == (None, probes.launched[1][2])
    assert probes.launched[1][2].outcome is Outcome.INVALID_TOKEN


def test_collect_without_a_node_has_no_verdict():
    """Whoever asked decides what that means."""
    assert run({})[0] == []


def test_collect_adds_up_requests():
    """Repeated probes included."""
    answers = {name: granted(name, hub_requests=3) for name in "abc"}
    assert run(answers)[2].hub_requests == 9


def test_collect_takes_little_time_of_its_own_for_a_thousand_nodes(monkeypatch):
    """Decided in under ten seconds, one probe a node, all answers in place."""
    names = [f"node-{i:04}" for i in range(1000)]
    answers = {name: granted(name, hub_requests=2) for name in names}
    answers["node-0500"] = verdict("x", Outcome.REQUEST_PENDING)
    began = time.monotonic()
    verdicts, probes, collection = run(answers, deadline_s=30)
    assert time.monotonic() - began < 10
    assert len(probes.launched) == len(verdicts) == 1000
    assert [entry.node_name for entry in verdicts if entry.outcome != "granted"] == ["node-0500"]
    assert collection.hub_requests < 2_500  # of a quota of 5 000 file requests in five minutes


def test_collect_spreads_the_starts(monkeypatch):
    """A thousand nodes do not ask in the same instant, nor does the last one wait for long."""
    delays = []
    answers = {f"node-{i:04}": granted("x") for i in range(1000)}
    launch = Simulated.launch

    def noted(self, node, *, commit, hint, delay_s):
        delays.append(delay_s)
        return launch(self, node, commit=commit, hint=hint, delay_s=delay_s)

    monkeypatch.setattr(Simulated, "launch", noted)
    run(answers)
    assert len(set(delays)) > 300
    assert max(delays) == collect.STAGGER_MAX_S
