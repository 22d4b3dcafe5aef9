"""A change of a file by which somebody may read, or call: checked at once, and in the history."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ray
import structlog

from serve_app.access.file_watch import KEYS, Change, FileWatch, announce, token_files
from serve_app.access.preflight import preflight
from serve_app.access.verdict import Verdict
from serve_app.cluster.placement import placements_of
from serve_app.config import AppConfig
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import Entry, What

log = structlog.get_logger()

_NAMES = {
    "token": "the token's file",
    "identity": "the identity token's file",
    "keys": "the file of API keys",
}


def watch_files(application: str, config: AppConfig, *, keys: bool = False) -> FileWatch:
    """Watch this node's files, and announce and record each change once for the node.

    Args:
        application: its name in Serve.
        config: names the files.
        keys: the file of API keys too, which the ingresses read.

    Returns:
        The watch, which runs; stop it.
    """
    files = {} if config.model.path is not None else token_files(config.access)
    if keys and config.api.api_keys_file is not None:
        files[KEYS] = Path(config.api.api_keys_file).expanduser()
    watch = FileWatch(files, on_change_of(application, ray.get_runtime_context().get_node_id()))
    watch.start()
    return watch


def on_change_of(application: str, node_id: str) -> Callable[[Change], None]:
    """Return what is to be done with a change on this node."""

    def on_change(change: Change) -> None:
        if not announce(application, node_id, change):
            return
        host = socket.gethostname()
        log.info("access.file_changed", node_id=node_id, kind=change.kind, path=change.path)
        is_gone = change.stamp == "gone"
        rollout_history.record(
            Entry(
                application=application,
                what=What.KEYS_CHANGED if change.kind == KEYS else What.TOKEN_CHANGED,
                why=f"{_NAMES[change.kind]}, {change.path}, {'is gone' if is_gone else 'changed'}",
                # Who wrote it is not known; whose it is, is.
                who=f"{change.owner} on {host}",
            )
        )

    return on_change


def recheck(application: str, config: AppConfig, commit: str | None) -> Verdict:
    """Ask every node again about the commit that is served, whatever the branch means by now.

    Which nodes lost or regained their grant goes into the application's rollout history.
    """
    verdict = preflight(_pinned(config, commit), placements=placements_of(config))
    rollout_history.record_grants(application, verdict)
    return verdict


def recheck_nodes(
    application: str,
    config: AppConfig,
    commit: str | None,
    before: Verdict,
    nodes: frozenset[str],
) -> Verdict:
    """Do `recheck` for some nodes alone.

    Returns:
        The verdict from before, with these nodes' new answers in it.
    """
    found = preflight(_pinned(config, commit), placements=placements_of(config), only=nodes)
    fresh = {node.node_id: node for node in found.nodes}
    whole = tuple(fresh.pop(node.node_id, node) for node in before.nodes)
    verdict = replace(before, nodes=(*whole, *fresh.values()), duration_s=found.duration_s)
    rollout_history.record_grants(application, verdict)
    return verdict


def _pinned(config: AppConfig, commit: str | None) -> AppConfig:
    model = config.model if commit is None else config.model.model_copy(update={"revision": commit})
    return config.model_copy(update={"model": model})
