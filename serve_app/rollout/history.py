"""What a rollout can go back to, application by application, by the rollout history.

Several people may share a cluster, each with a file of their own, so going back is a matter of
one rollout's applications and never of all. A config holds no secret (`config.refuse_secrets`).
An application's newest version is the one that serves, as long as nobody went past this command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from serve_app.config import config_hash, parse_args
from serve_app.gate_config import GATE_IMPORT_PATH, parse_gated
from serve_app.rollout.deploy import Result
from serve_app.rollout.diff import by_name
from serve_app.rollout.scope import Commits, Scope, pinned
from serve_app.serve_config import IMPORT_PATH
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import Entry, What, whoami


@dataclass(frozen=True, slots=True)
class Rollout:
    """What a rollout is about.

    Args:
        scope: what is applied.
        former: the config that it goes back to if it fails; None if there is nothing.
        commits: of models and adapters, by application, as the gate resolved them.
        back: the version that an application goes back to, by name, where a rollback asked for it.
    """

    scope: Scope
    former: dict[str, Any] | None
    commits: Mapping[str, Commits]
    back: Mapping[str, Entry] = field(default_factory=dict)


def read() -> dict[str, list[Entry]]:
    """Return the versions that served well of each application that has any, oldest first.

    Raises:
        RayError: the cluster does not answer; so do all functions here.
    """
    names = rollout_history.applications()
    found = {name: rollout_history.versions(rollout_history.entries(name)) for name in names}
    return {name: versions for name, versions in found.items() if versions}


def record(result: Result, rollout: Rollout, serving: Mapping[str, dict[str, Any]]) -> None:
    """Record how a rollout ended, for each of its applications.

    Args:
        result: how it ended.
        rollout: what it was about.
        serving: every application's config by its name, as Serve reports it now.
    """
    known = read()
    count = 1 + max((e.rollout for versions in known.values() for e in versions), default=0)
    goal, former = by_name(rollout.scope.goal), by_name(rollout.former or {"applications": []})
    for name in sorted(rollout.scope.names):
        commits = dict(rollout.commits.get(name, {}))
        entry = Entry(
            application=name,
            what=What(result.status),
            why=result.reason or _reason(rollout, name),
            who=whoami(),
            commit=commits.pop("", None),
            config_hash=_hash(goal[name]) if name in goal else None,
            duration_s=result.duration_s,
        )
        if entry.what is What.DONE:
            config = serving.get(name)
            entry = replace(
                entry,
                rollout=count,
                config=former.get(name) if config is None else config,
                config_commit=entry.commit,
                adapter_commits=commits,
                removed=config is None,
                returns_to=rollout.back[name].number if name in rollout.back else None,
            )
        elif entry.what is What.ROLLED_BACK and name in serving:
            newest = known[name][-1] if name in known else None
            entry = _restated(entry, newest, former.get(name), serving[name])
        rollout_history.record(entry)


def former(name: str, app: Mapping[str, Any] | None) -> Entry | None:
    """Return an application's newest good version that is not the one that serves.

    Args:
        name: of the application.
        app: its config that serves; None if it does not.
    """
    found = reversed(read().get(name, []))
    return next((version for version in found if version.config != app), None)


def commits_of(name: str, app: Mapping[str, Any]) -> Commits:
    """Return the commits that a good version of an application served; empty if it is none."""
    own = [version.config_commits for version in read().get(name, []) if version.config == app]
    return own[-1] if own else {}


def last_rollout(serving: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the applications that going back is about.

    Args:
        serving: every application's config by its name.

    Returns:
        Those that serve something else than what is remembered as good, because a rollout failed
        or somebody went past this command; if there are none, those that the last rollout set.
    """
    known = read()
    newest = {name: versions[-1] for name, versions in known.items()}
    if off := [n for n, e in newest.items() if serving.get(n) != (None if e.removed else e.config)]:
        return off
    last = max((version.rollout for version in newest.values()), default=0)
    return [name for name, version in newest.items() if version.rollout == last]


def _restated(
    entry: Entry, newest: Entry | None, back: dict[str, Any] | None, serving: dict[str, Any]
) -> Entry:
    """Let the newest version stand as it serves after a failed rollout went back to it.

    What is gone back to is nudged and may be pinned; without this it would look like something
    that nobody remembers, and the next way back would lead to the same version again.

    Args:
        entry: of the failed rollout.
        newest: the newest good version.
        back: the config that was gone back to, before it was nudged.
        serving: the same as it serves now.
    """
    if newest is None or newest.config is None or newest.removed:
        return entry
    if back not in (newest.config, pinned(newest.config, newest.config_commits)):
        return entry
    return replace(
        entry,
        config=serving,
        config_commit=newest.config_commit,
        adapter_commits=newest.adapter_commits,
        rollout=newest.rollout,
        returns_to=newest.number,
    )


def _reason(rollout: Rollout, name: str) -> str:
    if name in rollout.back:
        return f"gone back to the version of entry {rollout.back[name].number}"
    if name in rollout.scope.removed:
        return "removed by name; its requests have ended"
    return "it runs and answered"


def _hash(app: Mapping[str, Any]) -> str:
    """Return the hash of ours by its `args:` with the defaults, as the gate of a build has it."""
    if app.get("import_path") == GATE_IMPORT_PATH:
        return config_hash(parse_gated(app.get("args") or {}))
    if app.get("import_path") != IMPORT_PATH:
        return config_hash(app)
    return config_hash(parse_args(app.get("args") or {}))
