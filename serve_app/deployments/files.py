"""A change of a file by which somebody may read, or call: checked at once, and in the history."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ray
import structlog

from serve_app.access.file_watch import (
    GONE,
    IDENTITY,
    KEYS,
    TOKEN,
    Change,
    FileWatch,
    announce,
    token_files,
)
from serve_app.access.identity import Identity, identity_here
from serve_app.access.preflight import preflight
from serve_app.access.verdict import Verdict
from serve_app.cluster.placement import placements_of
from serve_app.config import AccessConfig, AppConfig
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import Entry, What

log = structlog.get_logger()

_NAMES = {
    TOKEN: "the token's file",
    IDENTITY: "the identity token's file",
    KEYS: "the file of API keys",
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
    sends_token = any(part.sends_token for part in config.model.parts)
    files = token_files(config.access) if sends_token else {}
    if keys and config.api.api_keys_file is not None:
        files[KEYS] = Path(config.api.api_keys_file).expanduser()
    node_id = ray.get_runtime_context().get_node_id()
    watch = FileWatch(files, on_change_of(application, node_id, config.access))
    watch.start()
    return watch


def on_change_of(application: str, node_id: str, access: AccessConfig) -> Callable[[Change], None]:
    """Return what is to be done with a change on this node.

    A fresh token of the same identity, which comes every hour, is checked and logged, and no entry
    of the history.
    """
    known = _identity(access)

    def on_change(change: Change) -> None:
        nonlocal known
        before, known = known, _identity(access)
        if not announce(application, node_id, change):
            return
        log.info("access.file_changed", node_id=node_id, kind=change.kind, path=change.path)
        if change.kind != IDENTITY or known is None or known != before:
            record_change(application, change, socket.gethostname())

    return on_change


def record_change(application: str, change: Change, where: str) -> None:
    """Write a change into the application's history.

    Args:
        application: its name in Serve.
        change: what was seen.
        where: name of the node.
    """
    happened = "is gone" if change.stamp == GONE else "changed"
    rollout_history.record(
        Entry(
            application=application,
            what=What.KEYS_CHANGED if change.kind == KEYS else What.TOKEN_CHANGED,
            why=f"{_NAMES[change.kind]}, {change.path}, {happened}",
            # Who wrote it is not known; whose it is, is.
            who=f"{change.owner} on {where}",
        )
    )


def _identity(access: AccessConfig) -> Identity | None:
    return None if access.identity is None else identity_here(access.identity)


def recheck(application: str, config: AppConfig, commit: str | None) -> Verdict:
    """Ask every node again about the commit that is served, whatever the branch means by now.

    Which nodes lost or regained their grant goes into the application's rollout history.
    """
    verdict = preflight(config.at_commit(commit), placements=placements_of(config))
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
    found = preflight(config.at_commit(commit), placements=placements_of(config), only=nodes)
    return merged(application, before, found)


def merged(application: str, before: Verdict, found: Verdict) -> Verdict:
    """Return a verdict with the new answers of some of its nodes, and record what they changed."""
    adapters = {name: _merged(part, found.adapters[name]) for name, part in before.adapters.items()}
    verdict = replace(_merged(before, found), adapters=adapters)
    rollout_history.record_grants(application, verdict)
    return verdict


def _merged(before: Verdict, found: Verdict) -> Verdict:
    """Return a verdict with the new answers of some of its nodes."""
    fresh = {node.node_id: node for node in found.nodes}
    whole = tuple(fresh.pop(node.node_id, node) for node in before.nodes)
    return replace(before, nodes=(*whole, *fresh.values()), duration_s=found.duration_s)
