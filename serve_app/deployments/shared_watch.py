"""One watch over the grants for all ingresses of a version: one of them keeps it, all show it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from ray.exceptions import RayError

from serve_app.access.file_watch import Announced
from serve_app.access.recheck import AtOnce, Watch
from serve_app.access.verdict import Verdict
from serve_app.cluster import kv
from serve_app.cluster.liveness import Liveness
from serve_app.cluster.placement import living_nodes
from serve_app.config import AppConfig, config_hash
from serve_app.deployments.files import recheck, recheck_nodes
from serve_app.deployments.jobs import keep_running
from serve_app.telemetry.metrics import AccessMetrics

LEASE = "watch/"
VERDICT = "verdict/"
LOOK_S = 1.0
LEASE_S = 10.0  # without a renewal, after which another process takes it


class Lease:
    """Held by one of the processes that ask for it, for as long as it renews it.

    No clocks are compared: a lease has run out for whoever saw no renewal for `LEASE_S`. For a
    moment two may hold it, which costs a second round of checks.

    Args:
        key: in the cluster's key-value store.
        holder: a name that no other process has.
        clock: monotonic seconds.
    """

    def __init__(self, key: str, holder: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.held = False
        self._key = key
        self._holder = holder
        self._renewals = 0
        self._others = Liveness(LEASE_S, clock)

    def hold(self) -> bool:
        """Take the lease if it is free, renew it if it is held here; return whether it is.

        While the store does not answer nothing changes.
        """
        with suppress(RayError):
            self.held = self._hold()
        return self.held

    def release(self) -> None:
        """Let another one have it at once."""
        with suppress(RayError):
            if self._holder_of(kv.get(self._key)) == self._holder:
                kv.delete(self._key)
        self.held = False

    def _hold(self) -> bool:
        found = kv.get(self._key)
        is_taken = bool(self._others.alive({self._key: found} if found is not None else {}))
        if is_taken and self._holder_of(found) != self._holder:
            return False
        self._renewals += 1
        kv.put(self._key, json.dumps([self._holder, self._renewals]))
        return self._holder_of(kv.get(self._key)) == self._holder  # the last of two has it

    @staticmethod
    def _holder_of(value: bytes | None) -> str | None:
        return str(json.loads(value)[0]) if value else None


class SharedWatch:
    """Keeps the last verdict over the grants of a version, together with its other ingresses.

    Args:
        application: Serve's name of it.
        config: the whole tree.
        verdict: what the gate said of this version, with the commit that is served.
        holder: a name that no other ingress has.
    """

    def __init__(
        self, application: str, config: AppConfig, verdict: Verdict, *, holder: str
    ) -> None:
        version = f"{application}/{config_hash(config)}/{verdict.commit}"
        self._lease = Lease(f"{LEASE}{version}", holder)
        self._verdict_key = f"{VERDICT}{version}"
        self._metrics = AccessMetrics()
        self._followed: dict[str, Any] | None = None  # the snapshot of the one that holds the lease
        self._watch = Watch(
            partial(recheck, application, config, verdict.commit),
            verdict,
            interval_s=config.access.watch_interval_s,
            on_verdict=self._show,
            at_once=AtOnce(
                Announced(application).nodes,
                partial(recheck_nodes, application, config, verdict.commit),
            ),
        )

    def snapshot(self) -> dict[str, Any]:
        """Return the last verdict of all ingresses, as `/access` shows it."""
        return self._followed or self._watch.snapshot()

    async def run(self) -> None:
        """Keep the watch, or follow the one that does, until cancelled."""
        keep = partial(self._metrics.keep, living_nodes)
        keeping = asyncio.create_task(keep_running(keep, "nodes"))
        try:
            while True:
                await self._follow()
                await self._keep()
        finally:
            keeping.cancel()

    def release(self) -> None:
        """Let another ingress keep the watch at once, and leave nothing of this one behind."""
        if self._lease.held:
            self._lease.release()
            with suppress(RayError):
                kv.delete(self._verdict_key)

    async def _follow(self) -> None:
        """Show what the holder publishes, until this ingress is the holder."""
        while not await asyncio.to_thread(self._lease.hold):
            with suppress(RayError):
                if found := await asyncio.to_thread(kv.get, self._verdict_key):
                    self._followed = json.loads(found)
            await asyncio.sleep(LOOK_S)

    async def _keep(self) -> None:
        """Watch and publish, until another ingress is the holder."""
        watching = asyncio.create_task(keep_running(self._check, "grants"))
        published: dict[str, Any] | None = None
        try:
            while await asyncio.to_thread(self._lease.hold):
                if self._followed is None and (snapshot := self._watch.snapshot()) != published:
                    with suppress(RayError):
                        await asyncio.to_thread(kv.put, self._verdict_key, json.dumps(snapshot))
                        published = snapshot
                await asyncio.sleep(LOOK_S)
        finally:
            watching.cancel()
        self._metrics.forget()

    async def _check(self) -> None:
        """Ask the nodes, beside what renews the lease: it may take longer than that lasts."""
        if self._followed is not None:  # it has taken over, and what it knows is old
            await self._watch.check()
            self._followed = None
        else:
            self._show(self._watch.verdict)
        await self._watch.run()

    def _show(self, verdict: Verdict) -> None:
        if self._lease.held:
            self._metrics.show(verdict)
