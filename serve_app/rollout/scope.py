"""Which applications a rollout is about: those of its file; all others stay as they are.

Serve removes every application that a config does not name. On a cluster that several people
share this would end somebody else's traffic, so what is applied is the file together with all
that serves beside it, and an application goes only where its name is given.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from serve_app.errors import ConfigError
from serve_app.gate_config import GATE_IMPORT_PATH
from serve_app.rollout.diff import by_name
from serve_app.serve_config import IMPORT_PATH

ROUTE = "/"  # of an application that names none
# Of a model, under "", and of its adapters by their names; None where it is not known.
Commits: TypeAlias = Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Scope:
    """What is applied, and what of it is looked after.

    Args:
        goal: the config for Serve, with the applications of others.
        set_names: applications of the file: waited for, asked, and gone back with.
        removed: applications that go.
    """

    goal: dict[str, Any]
    set_names: frozenset[str]
    removed: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """All that the rollout changes."""
        return self.set_names | self.removed

    @property
    def others(self) -> list[str]:
        """Applications that serve beside it and stay as they are."""
        return [name for name in by_name(self.goal) if name not in self.set_names]


def scope_of(
    file: Mapping[str, Any], serving: Mapping[str, Any] | None, remove: Collection[str] = ()
) -> Scope:
    """Put the applications of a file among those that serve.

    Args:
        file: the config file's content.
        serving: Serve's present goal; None if nothing.
        remove: names of applications to take away.

    Raises:
        ConfigError: a name of `remove` is not there or in the file too, or two applications
            would have the same route.
    """
    ours, others = by_name(file), by_name(serving or {"applications": []})
    for name in remove:
        if name in ours:
            raise ConfigError(f"--remove {name}: the file has this application; take it out there")
        if name not in others:
            known = ", ".join(sorted(others)) or "none"
            raise ConfigError(
                f"--remove {name}: no such application serves; those that do: {known}"
            )
    kept = [app for name, app in others.items() if name not in {*ours, *remove}]
    goal = {key: value for key, value in file.items() if key != "logging_config"}
    goal["applications"] = [*kept, *(_with_logging(app, file) for app in ours.values())]
    _require_own_routes(goal, ours)
    return Scope(goal, frozenset(ours), frozenset(remove))


def restored(
    serving: Mapping[str, Any] | None, apps: Mapping[str, dict[str, Any] | None]
) -> dict[str, Any]:
    """Return what serves with some applications set to a former config.

    Args:
        serving: Serve's present goal; None if nothing.
        apps: by name; None takes one away.

    Raises:
        ConfigError: another application has one's route by now.
    """
    # Of today and not of then: what others have rolled out meanwhile stays.
    now = {**by_name(serving or {"applications": []}), **apps}
    goal = {"applications": [app for app in now.values() if app is not None]}
    _require_own_routes(goal, apps.keys())
    return goal


def pinned(app: dict[str, Any], commits: Commits) -> dict[str, Any]:
    """Return an application that loads these very commits, whatever its branches mean by now.

    Args:
        app: as a Serve config has it.
        commits: of the model, under "", and of its adapters by their names, as far as known.
    """
    args = app.get("args") or {}
    if app.get("import_path") == GATE_IMPORT_PATH:
        return {**app, "args": {**args, "gate": _at(args.get("gate") or {}, commits)}}
    return {**app, "args": _at(args, commits)} if app.get("import_path") == IMPORT_PATH else app


def _at(part: dict[str, Any], commits: Commits) -> dict[str, Any]:
    model = dict(part.get("model") or {})
    if model.get("repo_id") is not None and commits.get(""):
        model["revision"] = commits[""]
    if model.get("adapters"):
        model["adapters"] = [
            {**each, "revision": commits[each["name"]]} if commits.get(each["name"]) else each
            for each in model["adapters"]
        ]
    return {**part, "model": model} if model else part


def _with_logging(app: dict[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """Give an application the file's logging, which Serve would give to those of others too."""
    general = file.get("logging_config")
    return (
        app if general is None or app.get("logging_config") else app | {"logging_config": general}
    )


def _require_own_routes(goal: Mapping[str, Any], ours: Collection[str]) -> None:
    taken: dict[str, str] = {}
    for name, app in by_name(goal).items():
        route = app.get("route_prefix", ROUTE)
        # Serve refuses two on one route as well, but after it has begun to remove the old one.
        other = taken.setdefault(route, name) if route is not None else name
        if other != name:
            where = "in the file too" if other in ours else "which serves"
            raise ConfigError(
                f"{name} and {other}, {where}, have the same route_prefix {route}; give {name} "
                f"another one"
                + ("" if other in ours else f", or take the other away: --remove {other}")
            )
