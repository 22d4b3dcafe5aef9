"""The `prefetch` command: after the gate, the weights onto every node where a replica may run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from socket import gethostname

from serve_app.access.verdict import Verdict
from serve_app.cluster.application import connected_places
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.serve_config import ServedApp
from serve_app.weights.prefetch import Prefetched, fetch_here, lacking, line, prefetch

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
        wanted = app.config.model.at_commits(verdicts[app.name].commits)
        if not wanted:
            print(f"{app.name}: a local directory, nothing to fetch", file=sys.stderr)
            continue
        with connected_places(app, address) as places:
            if places is None:
                raise ConfigError("no Ray cluster is running here; name one with --address")
            for model, commit in wanted:
                results = prefetch(model, app.config.access, commit, places, timeout_s=timeout_s)
                for result in results:
                    print(_shown(app, model, commit, result, as_json=as_json))
                code = NOT_FETCHED if lacking(results) or not results else code
    return code


def run_here(
    apps: Sequence[ServedApp],
    verdicts: Mapping[str, Verdict],
    *,
    link: Path | None,
    as_json: bool,
) -> int:
    """Fetch the weights to this machine alone, without Ray, as an init container does.

    Args:
        apps: applications whose access was proven here.
        verdicts: what the gate said of each, by name.
        link: becomes a link to the model's directory, with a suffix to an adapter's; None makes
            none.
        as_json: print one JSON object for each model and adapter.

    Returns:
        The exit code: 0 the weights are here, 5 they are not.
    """
    for app in apps:
        for model, commit in app.config.model.at_commits(verdicts[app.name].commits):
            result = replace(fetch_here(model, app.config.access, commit), node=gethostname())
            print(_shown(app, model, commit, result, as_json=as_json))
            if result.fault:
                return NOT_FETCHED
            if link is not None:
                is_base = model is app.config.model
                place = link if is_base else link.with_name(f"{link.name}.{model.name}")
                _link(place, Path(result.directory))
    return 0


def _link(place: Path, directory: Path) -> None:
    """Make a link, in one step where another one is: whoever reads it finds one of both."""
    new = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        new.symlink_to(directory)
        new.replace(place)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise ConfigError(f"--link {place}: {error.strerror}") from None


def _shown(
    app: ServedApp, model: ModelConfig, commit: str, result: Prefetched, *, as_json: bool
) -> str:
    what = app.name if model is app.config.model else f"{app.name}, {model.name}"
    if as_json:
        return json.dumps({"application": what, "commit": commit, **asdict(result)})
    return f"{what}: {line(result)}"
