"""Asks every node and gathers the answers under one deadline. Knows nothing of Ray.

One node goes first: it resolves the revision, reads the index and, for a refused token, asks
whose it is. The others get its commit and its file, so they need fewer requests. A node
that is silent, or lost, costs its own answer and nobody else's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from serve_app.access.remedies import remedy
from serve_app.access.verdict import NodeVerdict, Outcome
from serve_app.cluster.nodes import Lost, Node

Ref = TypeVar("Ref")

SLICE_S = 0.5  # of waiting, between looks at the clock and at nodes that have joined
SCOUT_SHARE = 0.25  # of the deadline; after that the others no longer wait for the first
STAGGER_S = 0.005  # between the starts of two nodes' probes
STAGGER_MAX_S = 2.0


class Probes(Protocol[Ref]):
    """What runs probes on nodes."""

    def nodes(self) -> list[Node]:
        """Return the nodes that may host a replica now."""
        ...

    def launch(
        self, node: Node, *, commit: str | None, hint: NodeVerdict | None, delay_s: float
    ) -> Ref:
        """Start a probe on a node and return at once."""
        ...

    def wait(self, refs: list[Ref], timeout_s: float) -> list[Ref]:
        """Return those that have ended, after the timeout at the latest."""
        ...

    def result(self, ref: Ref) -> NodeVerdict:
        """Return the answer of a probe that has ended; raises `Lost`."""
        ...

    def cancel(self, ref: Ref) -> None:
        """Stop a probe that nobody waits for any more."""
        ...


class Collection(Generic[Ref]):
    """One round over all nodes.

    Args:
        probes: runs them.
        deadline_s: limit of the whole round.
    """

    def __init__(self, probes: Probes[Ref], *, deadline_s: float) -> None:
        self._probes = probes
        self._deadline_s = deadline_s
        self._began = time.monotonic()
        self._pending: dict[Ref, Node] = {}
        self._verdicts: dict[str, NodeVerdict] = {}
        self._known: dict[str, Node] = {}
        self._scout: NodeVerdict | None = None
        self._repeated: set[str] = set()
        self.hub_requests = 0

    @property
    def commit(self) -> str | None:
        """The commit that all nodes have to read."""
        return self._scout.commit if self._scout else None

    def run(self) -> list[NodeVerdict]:
        """Ask every node, also those that join meanwhile; returns them sorted by name."""
        nodes = self._probes.nodes()
        # The scout: what it learns saves every other node three requests, and the Hub's quota.
        self._start(nodes[:1])
        # A scout that is silent must not cost the others their answers.
        while self._pending and self._left_s() > self._deadline_s * (1 - SCOUT_SHARE):
            self._take()
        self._start(nodes[1:])
        while self._left_s() > 0:
            self._take()
            # A node that joins during the gate may get a replica as well.
            self._start(node for node in self._probes.nodes() if node.node_id not in self._known)
            self._repeat_stale()
            if not self._pending:
                break
        # What is pending now is a row of its own: a node without an answer is not left out.
        self._give_up()
        order = sorted(self._known.values(), key=lambda node: (node.name, node.node_id))
        return [self._verdicts[node.node_id] for node in order]

    def _left_s(self) -> float:
        return self._began + self._deadline_s - time.monotonic()

    def _start(self, nodes: Iterable[Node]) -> None:
        for index, node in enumerate(nodes):
            self._known[node.node_id] = node
            self._launch(node, delay_s=min(index * STAGGER_S, STAGGER_MAX_S))

    def _launch(self, node: Node, *, delay_s: float = 0.0) -> None:
        ref = self._probes.launch(node, commit=self.commit, hint=self._scout, delay_s=delay_s)
        self._pending[ref] = node

    def _take(self) -> None:
        """Take the answers that are there, after one slice of waiting at the most."""
        if self._pending:
            timeout_s = max(0.0, min(SLICE_S, self._left_s()))
            for ref in self._probes.wait(list(self._pending), timeout_s):
                self._settle(ref)

    def _settle(self, ref: Ref) -> None:
        node = self._pending.pop(ref)
        try:
            verdict = self._probes.result(ref)
        except Lost as lost:
            verdict = failed(node, str(lost))
        verdict = replace(verdict, node_id=node.node_id, node_name=node.name)
        self.hub_requests += verdict.hub_requests
        self._verdicts[node.node_id] = verdict
        # A scout that was refused knows no commit; the first node that learns one takes its place.
        if self._scout is None or (self.commit is None and verdict.commit is not None):
            self._scout = verdict

    def _repeat_stale(self) -> None:
        """Ask nodes again, once, that read another commit because the branch moved meanwhile."""
        for node_id, verdict in self._verdicts.items():
            # Once: a node that insists shows its commit in the table, and two commits are no yes.
            stale = verdict.outcome is Outcome.GRANTED and verdict.commit != self.commit
            if stale and node_id not in self._repeated:
                self._repeated.add(node_id)
                self._launch(self._known[node_id])

    def _give_up(self) -> None:
        for ref, node in self._pending.items():
            self._probes.cancel(ref)
            message = f"no answer within {self._deadline_s:g} s (access.deadline_s)"
            self._verdicts[node.node_id] = failed(node, message)


def failed(node: Node, message: str) -> NodeVerdict:
    """Return the verdict of a node that did not answer."""
    sentence, url = remedy(Outcome.PROBE_FAILED)
    return NodeVerdict(
        node_id=node.node_id,
        node_name=node.name,
        outcome=Outcome.PROBE_FAILED,
        remedy=sentence,
        hub_message=message,
        url=url,
    )
