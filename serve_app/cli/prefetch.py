"""The `prefetch` command: after the gate, the weights onto every node where a replica may run."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from socket import gethostname

from serve_app.access.hub.folders import Folder
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
    links: Mapping[str, Path],
    as_json: bool,
) -> int:
    """Fetch the weights to this machine alone, without Ray, as an init container does.

    Args:
        apps: applications whose access was proven here.
        verdicts: what the gate said of each, by name.
        links: from `places_of`, where links are wanted; they are made when everything is here.
        as_json: print one JSON object for each model and adapter.

    Returns:
        The exit code: 0 the weights are here, 5 they are not.
    """
    directories: dict[str, Path] = {}
    for app in apps:
        base = app.config.model
        if base.path is not None:
            print(f"{app.name}: a local directory, nothing to fetch", file=sys.stderr)
            directories[""] = Path(base.path).expanduser()
        for model, commit in base.at_commits(verdicts[app.name].commits):
            result = replace(fetch_here(model, app.config.access, commit), node=gethostname())
            print(_shown(app, model, commit, result, as_json=as_json))
            if result.fault:
                return NOT_FETCHED
            directories["" if model is base else model.name] = Path(result.directory)
    for name, place in links.items():
        _link(place, directories[name])
    return 0


def places_of(model: ModelConfig, link: Path) -> dict[str, Path]:
    """Return where the links go, of the model, under "", and of each adapter by its name.

    Raises:
        ConfigError: a link cannot be there.
    """
    if link.name in ("", ".."):
        raise ConfigError(f"--link {link}: end it with the link's own name")
    places = {"": link}
    for adapter in model.adapters:
        if "/" in adapter.name:
            message = f"the adapter's name {adapter.name!r} has a slash, and PATH.NAME is its link"
            raise ConfigError(f"--link {link}: {message}")
        places[adapter.name] = link.with_name(f"{link.name}.{adapter.name}")
    for place in places.values():
        if fault := _place_fault(place):
            raise ConfigError(f"--link {place}: {fault}")
    return places


def _place_fault(place: Path) -> str | None:
    try:
        if not place.parent.is_dir():
            return f"{place.parent} is no directory"
        if not os.access(place.parent, os.W_OK | os.X_OK):
            return f"{place.parent} cannot be written"
        if stat.S_ISLNK(place.lstat().st_mode):
            return None
    except FileNotFoundError:
        return None
    except OSError as error:  # its name is too long, say
        return error.strerror
    return "what is there is no link, and stays as it is"


def _link(place: Path, directory: Path) -> None:
    """Make a link, in one step where another one is: whoever reads it finds one of both."""
    fault = _place_fault(place)
    try:
        if fault is None:
            with Folder.at(place.parent) as folder:
                folder.link(place.name, str(directory.absolute()))
    except OSError as error:
        fault = error.strerror
    if fault is not None:
        raise ConfigError(f"--link {place}: {fault}")


def _shown(
    app: ServedApp, model: ModelConfig, commit: str, result: Prefetched, *, as_json: bool
) -> str:
    what = app.name if model is app.config.model else f"{app.name}, {model.name}"
    if as_json:
        return json.dumps({"application": what, "commit": commit, **asdict(result)})
    return f"{what}: {line(result)}"
