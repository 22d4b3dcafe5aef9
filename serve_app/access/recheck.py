"""The grant while serving: asked again at intervals, shown, never acted upon.

A license can be withdrawn at any time. What serves goes on serving, because its weights are
here; but the next scale-up would fail, so the loss has to be seen before it is needed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import structlog

from serve_app.access.verdict import Outcome, Verdict, log_facts

log = structlog.get_logger()

JITTER = 0.2  # share of the interval that a round may come early; spreads applications


class Watch:
    """Keeps the last verdict of every node.

    Args:
        check: asks every node; blocks for as long as the gate's deadline.
        first: the verdict that let this version roll out.
        interval_s: seconds between two rounds.
        on_verdict: called after each round, and once with the first verdict.
    """

    def __init__(
        self,
        check: Callable[[], Verdict],
        first: Verdict,
        *,
        interval_s: float,
        on_verdict: Callable[[Verdict], None],
    ) -> None:
        self._check = check
        self._interval_s = interval_s
        self._on_verdict = on_verdict
        self._verdict = first
        self._checked_at = time.time()
        on_verdict(first)

    async def run(self) -> None:
        """Go round until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s * random.uniform(1 - JITTER, 1))  # noqa: S311
            before, self._verdict = self._verdict, await asyncio.to_thread(self._check)
            self._checked_at = time.time()
            self._on_verdict(self._verdict)
            report_changes(before, self._verdict)

    def snapshot(self) -> dict[str, Any]:
        """Return the last verdict as `/access` shows it; `checked_at` is in Unix seconds."""
        return self._verdict.to_json() | {"checked_at": round(self._checked_at, 3)}


def report_changes(before: Verdict, after: Verdict) -> None:
    """Log every node whose outcome, or a warning, is another one than in the round before."""
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
