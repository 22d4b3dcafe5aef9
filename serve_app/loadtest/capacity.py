"""What replicas hold: the highest rate within the SLO, and the config that follows from it.

Three measurements decide: the search (highest rate that holds the SLO), a run at the proposed
rate (its mean number of requests in flight is what the autoscaler is to aim at), and a run
above the limit (its throughput is how fast a full queue drains).

The search doubles until a rate breaks the SLO (or halves until one holds), then halves the
bracket on a log scale. It looks for a rate of arrivals and not for a number of clients: clients
who wait for their answers slow down with the server, and a closed loop holds any SLO by asking
less.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.errors import ConfigError
from serve_app.loadtest.summary import Json, Slo

PRECISION = 1.1  # the bracket's width at the end
STEPS = 10  # doublings or halvings before it gives up
# Share of the limit that a replica is planned for, because Poisson arrivals bunch. The search
# knows the limit to a tenth (`PRECISION`): 1.3 times this lies beyond the rate that broke.
HEADROOM = 0.85
OVERLOAD = 1.3  # of the limit, where the SLO is to break and throughput is at its highest


@dataclass(frozen=True, slots=True)
class Found:
    """The end of a search.

    Args:
        holds: highest rate that held, requests per second; None if none did.
        breaks: lowest rate that did not; None if every one held.
    """

    holds: float | None
    breaks: float | None


def holds(stage: Json, *, attainment: float) -> bool:
    """Return whether enough of a stage's requests were good."""
    share = stage["goodput"]["share"]
    return share is not None and share >= attainment


def search(holds_at: Callable[[float], bool | None], *, first: float) -> Found:
    """Find the highest rate.

    Args:
        holds_at: measures a rate; None ends the search.
        first: where to begin, requests per second.
    """
    found = _bracket(holds_at, first)
    while found.holds and found.breaks and found.breaks / found.holds > PRECISION:
        middle = math.sqrt(found.holds * found.breaks)
        held = holds_at(middle)
        if held is None:
            return found
        found = Found(middle, found.breaks) if held else Found(found.holds, middle)
    return found


def _bracket(holds_at: Callable[[float], bool | None], first: float) -> Found:
    found, rate = Found(None, None), first
    for _ in range(STEPS):
        held = holds_at(rate)
        if held is None:
            break
        found = Found(rate, found.breaks) if held else Found(found.holds, rate)
        if found.holds and found.breaks:
            break
        rate = rate * 2 if held else rate / 2
    return found


@dataclass(frozen=True, slots=True)
class Served:
    """A running service.

    Args:
        url: its root.
        name: of its application.
        replicas: that it has.
        document: its Serve config, if that is known.
    """

    url: str
    name: str = "llm"
    replicas: int = 1
    document: dict[str, Any] | None = None


def served(target: str) -> Served:
    """Read a Serve config, or take a URL as it is (with one replica).

    Raises:
        ConfigError: the config is not valid, or the number of its replicas may change.
    """
    if target.startswith(("http://", "https://")):
        return Served(target)
    from serve_app import serve_config  # noqa: PLC0415 - imports Ray; a URL needs none

    path = Path(target)
    app = serve_config.read(path)[0]
    replica = app.config.replica
    if replica.min_replicas != replica.max_replicas:
        raise ConfigError(
            "this config scales between replicas, so what one holds is not known; "
            "measure with min_replicas = max_replicas"
        )
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    http = document.get("http_options") or {}
    prefix = next(
        entry.get("route_prefix") or "/"
        for entry in document["applications"]
        if entry.get("name", "default") == app.name
    )
    host = str(http.get("host", "127.0.0.1")).replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    url = f"http://{host}:{http.get('port', 8000)}{prefix}".rstrip("/")
    return Served(url, app.name, replica.min_replicas, document)


@dataclass(frozen=True, slots=True)
class Demand:
    """What the service has to hold.

    Args:
        peak: requests per second at the most.
        low: requests per second in quiet hours.
        replicas: how many there were during the measurement.
    """

    peak: float
    low: float
    replicas: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found with the replicas that there were.

    Args:
        limit: highest rate that held the SLO, requests per second.
        proposed: the stage at `HEADROOM` times the limit.
        overload: the stage at `OVERLOAD` times the limit.
    """

    limit: float
    proposed: Json
    overload: Json


def recommend(measured: Measured, demand: Demand, slo: Slo) -> dict[str, dict[str, Any]]:
    """Return the parts of `args:` that follow from the measurement.

    The longest queue is one whose last request still meets the limit of ttft: it waits for
    those before it, at the rate at which a replica finishes them.
    """
    per_replica = measured.limit * HEADROOM / demand.replicas
    low = max(1, math.ceil(demand.low / per_replica))
    replica = {
        "target_ongoing_requests": max(
            1.0, round(measured.proposed["in_flight"] / demand.replicas, 1)
        ),
        "min_replicas": low,
        "max_replicas": max(low, math.ceil(demand.peak / per_replica)),
    }
    ttft = measured.proposed["latency"]["ttft_s"]
    if slo.ttft_s is None or ttft is None:
        return {"replica": replica}
    drained = measured.overload["req_s"] / demand.replicas
    queue = math.floor(drained * max(0.0, slo.ttft_s - ttft["p50"]))
    return {"replica": replica, "api": {"max_queued_requests": max(1, queue)}}


def patch(name: str, parts: dict[str, dict[str, Any]], evidence: Path, said: str) -> str:
    """Render the recommendation as a YAML to merge into a Serve config.

    Args:
        name: of the application.
        parts: of its `args:`.
        evidence: the report, already written.
        said: what was measured, in lines.
    """
    digest = hashlib.sha256(evidence.read_bytes()).hexdigest()
    comment = "".join(f"# {line}\n" for line in said.splitlines())
    body = yaml.safe_dump({"applications": [{"name": name, "args": parts}]}, sort_keys=False)
    return f"{comment}# Evidence: {evidence.name}, sha256 {digest}\n{body}"


def merge(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return a Serve config with a patch in it; applications meet by their name.

    Raises:
        ConfigError: the patch names an application that the config has not.
    """
    applications = [dict(application) for application in config["applications"]]
    for part in change["applications"]:
        homes = [a for a in applications if a.get("name", "default") == part["name"]]
        if not homes:
            raise ConfigError(f"the config has no application named {part['name']}")
        args = dict(homes[0].get("args") or {})
        for section, values in part["args"].items():
            args[section] = {**(args.get(section) or {}), **values}
        homes[0]["args"] = args
    return {**config, "applications": applications}
