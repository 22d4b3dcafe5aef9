"""From a search to a config: how many requests a replica holds, and how many replicas a peak needs.

Three measurements decide: the search (highest rate that holds the SLO), a run at the proposed
rate (its mean number of requests in flight is what the autoscaler is to aim at), and a run
above the limit (its throughput is how fast a full queue drains).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.errors import ConfigError
from serve_app.loadtest.slo import Slo
from serve_app.loadtest.summary import Json

# Share of the limit that a replica is planned for, because Poisson arrivals bunch. The search
# knows the limit to a tenth (`PRECISION`): 1.3 times this lies beyond the rate that broke.
HEADROOM = 0.85
OVERLOAD = 1.3  # of the limit, where the SLO is to break and throughput is at its highest


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
