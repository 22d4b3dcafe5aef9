"""The `prefetch` command: after the gate, the weights onto every node where a replica may run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from serve_app.access.verdict import Verdict
from serve_app.cluster.application import connected_places
from serve_app.errors import ConfigError
from serve_app.serve_config import ServedApp
from serve_app.weights.prefetch import Prefetched, lacking, line, prefetch

NOT_FETCHED = 5


def run(
    apps: Sequence[ServedApp],
    verdicts: Mapping[str, Verdict],
    *,
    address: str | None,
    timeout_s: float,
    as_json: bool,
) -> int:
    """Fetch every application's weights and show what became of each node.

    Args:
        apps: applications whose access was proven.
        verdicts: what the gate said of each, by name.
        address: of the Ray cluster; None takes RAY_ADDRESS, or what `ray start` recorded.
        timeout_s: limit for each application, in seconds.
        as_json: print one JSON object for each node.

    Returns:
        The exit code: 0 every node has the weights, 5 one does not.
    """
    code = 0
    for app in apps:
        commit = verdicts[app.name].commit
        if commit is None:
            print(f"{app.name}: a local directory, nothing to fetch", file=sys.stderr)
            continue
        with connected_places(app, address) as places:
            if places is None:
                raise ConfigError("no Ray cluster is running here; name one with --address")
            results = prefetch(
                app.config.model, app.config.access, commit, places, timeout_s=timeout_s
            )
        for result in results:
            print(_json(app, commit, result) if as_json else f"{app.name}: {line(result)}")
        code = NOT_FETCHED if lacking(results) or not results else code
    return code


def _json(app: ServedApp, commit: str, result: Prefetched) -> str:
    return json.dumps({"application": app.name, "commit": commit, **asdict(result)})
