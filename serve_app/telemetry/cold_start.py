"""The cold-start ledger: where the seconds went between Serve's decision and the first token.

    schedule ─ interpreter ─ imports ─┬ check ─ download ─┬─ weights ─ tokenizer ─ assemble
                                      └ libraries ────────┘   ─ warm_up ┄ first_token

Each replica keeps one, and puts it into Ray's key-value store for `serve-app coldstart`: names,
times and bytes, never a secret. It must not delay or fail a start, so what cannot be learned is
left out.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from ray.exceptions import RayError

from serve_app.cluster import kv
from serve_app.cluster.controller import instance_details

IMPORTED_AT = time.time()  # of the first of our modules that a replica imports
_SINCE_IMPORT = time.monotonic()
PREFIX = "coldstart/"
PHASES = "phase/"
KEPT = 64  # starts of the whole cluster; older ones are forgotten
LOST_S = 86400.0  # after which a phase is of a replica that never ended its start
CONTROLLER_TIMEOUT_S = 5.0


def now() -> float:
    """Return Unix seconds by this process's clock as it was set when it started.

    A clock that is set while a replica starts moves no phase and makes none negative. Two nodes'
    clocks are still two: `schedule` is from the controller's to this one's.
    """
    return IMPORTED_AT + time.monotonic() - _SINCE_IMPORT


@dataclass(frozen=True, slots=True)
class Span:
    """One phase of a start; phases may overlap.

    Args:
        phase: its name.
        started_at: Unix seconds, by this node's clock.
        duration_s: seconds.
    """

    phase: str
    started_at: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class Phase:
    """What a starting replica is at.

    Args:
        name: of the phase.
        published_at: Unix seconds, by its node's clock.
        done_bytes: of the weights, while they come.
        total_bytes: of the weights, while they come.
    """

    name: str
    published_at: float
    done_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """One start of one replica.

    Args:
        application: Serve's name of the application.
        replica: Serve's id of the replica.
        node: the name that a person knows the node by.
        spans: in order of their beginning.
        ready_s: from the beginning of the first phase to the replica taking requests.
        weights_bytes: of the model, and where they came from: hub, peer or cache.
    """

    application: str
    replica: str
    node: str
    spans: tuple[Span, ...]
    ready_s: float
    weights_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def started_at(self) -> float:
        """Unix seconds of the first phase's beginning."""
        return min(span.started_at for span in self.spans)

    def facts(self) -> dict[str, float]:
        """Return flat keywords for one log line."""
        phases = {f"{span.phase}_s": round(span.duration_s, 3) for span in self.spans}
        return {"ready_s": round(self.ready_s, 3), **phases}


class Ledger:
    """Collects the phases of this replica's start. Safe to use from several threads.

    Args:
        application: Serve's name of the application.
        replica: Serve's id of the replica.
    """

    def __init__(self, application: str, replica: str) -> None:
        self._key = f"{_phases_of(application)}{replica}"
        self._application, self._replica = application, replica
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        begun, created_at = _process_started_at(), now()
        if begun is not None and begun < IMPORTED_AT:
            self._add("interpreter", begun, IMPORTED_AT - begun)
        self._add("imports", IMPORTED_AT, created_at - IMPORTED_AT)

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Time a phase, whether it succeeds or not, and publish that it began."""
        self.publish(phase)
        started_at = now()
        try:
            yield
        finally:
            self._add(phase, started_at, now() - started_at)

    def publish(
        self, phase: str, done_bytes: int | None = None, total_bytes: int | None = None
    ) -> None:
        """Let `running` see a phase and how far it is; never raises for Ray."""
        value = json.dumps(asdict(Phase(phase, now(), done_bytes, total_bytes)))
        with suppress(RayError):
            kv.put(self._key, value)

    def follow(self, phases: dict[str, float], *, started_at: float) -> None:
        """Add phases that were timed elsewhere, one after the other."""
        for phase, seconds in phases.items():
            self._add(phase, started_at, seconds)
            started_at += seconds

    def close(self, node: str, weights_bytes: dict[str, int], *, ready_at: float) -> Start:
        """Return the whole start; asks Serve's controller when it was decided.

        Args:
            node: the name that a person knows the node by.
            weights_bytes: by source.
            ready_at: by `now`, from when on the replica takes requests.
        """
        with suppress(RayError):
            kv.delete(self._key)
        scheduled_at = _scheduled_at(self._application, self._replica)
        with self._lock:
            spans = _since(scheduled_at, self._spans)
        ready_s = ready_at - min(span.started_at for span in spans)
        return Start(self._application, self._replica, node, spans, ready_s, weights_bytes)

    def _add(self, phase: str, started_at: float, duration_s: float) -> None:
        with self._lock:
            self._spans.append(Span(phase, started_at, duration_s))


def with_first_token(start: Start, *, asked_at: float, ttft_s: float) -> Start:
    """Return the start with the first request that it answered; it counts after `ready`."""
    return replace(start, spans=(*start.spans, Span("first_token", asked_at, ttft_s)))


def keep(start: Start) -> None:
    """Put a start where `recent` finds it, and forget the oldest; never raises for Ray."""
    key = f"{PREFIX}{start.started_at:017.6f}/{quote(start.application, safe='')}/{start.replica}"
    with suppress(RayError):
        kv.put(key, json.dumps(asdict(start)))
        for old in [*kv.keys(PREFIX)[:-KEPT], *filter(_is_lost, kv.keys(PHASES))]:
            kv.delete(old)


def recent() -> list[Start]:
    """Return the kept starts of all replicas of the cluster, oldest first."""
    starts = []
    for key in kv.keys(PREFIX):
        value = kv.get(key)
        if value is not None:  # forgotten meanwhile
            raw = json.loads(value)
            starts.append(Start(**raw | {"spans": tuple(Span(**span) for span in raw["spans"])}))
    return starts


def running(application: str, *, since: float) -> dict[str, Phase]:
    """Return what every replica of an application that is starting is at, by its id.

    Args:
        application: Serve's name of it.
        since: Unix seconds; what was published before is of a replica that never ended its start.
    """
    phases = {}
    prefix = _phases_of(application)
    for key in kv.keys(prefix):
        phase = _phase(key)
        if phase and phase.published_at >= since:
            phases[key.removeprefix(prefix)] = phase
    return phases


def _phases_of(application: str) -> str:
    return f"{PHASES}{quote(application, safe='')}/"


def _phase(key: str) -> Phase | None:
    value = kv.get(key)
    return Phase(**json.loads(value)) if value else None  # ended meanwhile


def _is_lost(key: str) -> bool:
    """Return whether a phase is of a replica that was killed before it was ready."""
    phase = _phase(key)
    return phase is not None and phase.published_at < now() - LOST_S


def _since(scheduled_at: float | None, spans: list[Span]) -> tuple[Span, ...]:
    """Put `schedule` first; a worker that Ray had at hand was started for nobody in particular."""
    ordered = sorted(spans, key=lambda span: span.started_at)
    if scheduled_at is None or scheduled_at > IMPORTED_AT:
        return tuple(ordered)
    kept = [span for span in ordered if span.started_at >= scheduled_at]
    waited = Span("schedule", scheduled_at, kept[0].started_at - scheduled_at)
    return (waited, *kept)


def _process_started_at() -> float | None:
    """Return when this process began, in Unix seconds; None where /proc does not say."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    ticks = int(after_name[19])  # field 22, counted after the name: proc_pid_stat(5)
    return now() - uptime_s + ticks / os.sysconf("SC_CLK_TCK")


def _scheduled_at(application: str, replica: str) -> float | None:
    """Ask Serve's controller when it decided to start a replica."""
    try:
        details = instance_details(CONTROLLER_TIMEOUT_S)
        deployments = details["applications"][application]["deployments"].values()
        found = [entry for each in deployments for entry in each["replicas"]]
        started = [entry["start_time_s"] for entry in found if entry["replica_id"] == replica]
    except (ValueError, KeyError, TypeError, RayError):
        return None
    return float(started[0]) if started else None
