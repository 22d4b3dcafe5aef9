"""The grant while serving: asked again at intervals, shown, never acted upon.

A license can be withdrawn at any time. What serves goes on serving, because its weights are
here; but the next scale-up would fail, so the loss has to be seen before it is needed. A node
whose token's file changed is asked at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from serve_app.access.verdict import Outcome, Verdict, log_facts

log = structlog.get_logger()

POLL_S = 1.0  # between two looks at what changed on the nodes
JITTER = 0.2  # share of the interval that a round may come early; spreads applications


@dataclass(frozen=True, slots=True)
class AtOnce:
    """What is checked between two rounds.

    Args:
        changed: returns the ids of the nodes to check now, each once.
        check: asks these nodes alone, and returns the verdict with their new answers in it.
    """

    changed: Callable[[], frozenset[str]]
    check: Callable[[Verdict, frozenset[str]], Verdict]


class Watch:
    """Keeps the last verdict of every node.

    Args:
        check: asks every node; blocks for as long as the gate's deadline.
        first: the verdict that let this version roll out.
        interval_s: seconds between two rounds.
        on_verdict: called after each round, and once with the first verdict.
        at_once: what is checked between two rounds; None checks nothing.
    """

    def __init__(
        self,
        check: Callable[[], Verdict],
        first: Verdict,
        *,
        interval_s: float,
        on_verdict: Callable[[Verdict], None],
        at_once: AtOnce | None = None,
    ) -> None:
        self._check = check
        self._interval_s = interval_s
        self._on_verdict = on_verdict
        self._at_once = at_once
        self._verdict = first
        self._checked_at = time.time()
        on_verdict(first)

    async def run(self) -> None:
        """Go round until cancelled."""
        while True:
            # Early and never late, so that nobody's license is unchecked for longer than was asked.
            pause_s = self._interval_s * random.uniform(1 - JITTER, 1)  # noqa: S311
            await self._check_what_changes(time.monotonic() + pause_s)
            await self.check()

    async def check(self) -> None:
        """Ask every node now."""
        self._take(await asyncio.to_thread(self._check))

    async def _check_what_changes(self, until: float) -> None:
        """Wait for the next round, and check nodes that cannot wait for it."""
        while (left_s := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, POLL_S) if self._at_once else left_s)
            if self._at_once and (nodes := await asyncio.to_thread(self._at_once.changed)):
                self._take(await asyncio.to_thread(self._at_once.check, self._verdict, nodes))

    def _take(self, verdict: Verdict) -> None:
        before, self._verdict = self._verdict, verdict
        self._checked_at = time.time()
        self._on_verdict(verdict)
        report_changes(before, verdict)

    @property
    def verdict(self) -> Verdict:
        """The last verdict."""
        return self._verdict

    def snapshot(self) -> dict[str, Any]:
        """Return the last verdict as `/access` shows it; `checked_at` is in Unix seconds."""
        return self._verdict.to_json() | {"checked_at": round(self._checked_at, 3)}


def report_changes(before: Verdict, after: Verdict) -> None:
    """Log every node whose outcome, or a warning, is another one than in the round before."""
    for one, other in zip(before.parts, after.parts, strict=True):
        _report_changes(one, other)


def _report_changes(before: Verdict, after: Verdict) -> None:
    known = {node.node_id: node.outcome for node in before.nodes}
    warned = {(node.node_id, text) for node in before.nodes for text in node.token.warnings}
    for node in after.nodes:
        for text in node.token.warnings:  # such as that no receipt can be kept: the disk is full
            if (node.node_id, text) not in warned:
                log.warning("access.conflict", node_id=node.node_id, detail=text)
        if known.get(node.node_id) is node.outcome:
            continue
        if node.deferred:
            log.info("access.deferred", repo_id=after.repo_id, **log_facts(node))
            continue
        event = log.info if node.outcome is Outcome.GRANTED else log.error
        name = "access.granted" if node.outcome is Outcome.GRANTED else "access.refused"
        event(name, node_id=node.node_id, repo_id=after.repo_id, **log_facts(node))
