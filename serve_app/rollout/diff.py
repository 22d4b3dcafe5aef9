"""What differs between what serves and a new config, and what Serve does about it.

Serve 2.60 builds an application anew for a change of its code, environment or `args:`, and then
replaces all of its replicas; a deployment's actor options replace that deployment's without a
build; bounds, limits and health checks are set in place.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from serve_app.redaction import scrub

SHOWN = 12  # lines of one application
WIDTH = 60  # characters of one value
BUILT = frozenset({"import_path", "runtime_env", "args", "autoscaling_policy"})
IN_PLACE = frozenset(
    {
        "num_replicas",
        "autoscaling_config",
        "max_ongoing_requests",
        "max_queued_requests",
        "user_config",
        "health_check_period_s",
        "health_check_timeout_s",
    }
)
REPLACED = frozenset({"ray_actor_options"})
VERSION = frozenset({"request_router_config", "deployment_actors"})  # of the code, as Serve counts
NEW_BUILD = "a new build with the gate, then all its replicas are replaced, new ones first"
UNKNOWN = "replicas may be replaced"
UNSET = object()


def changes(
    before: Mapping[str, Any] | None, goal: Mapping[str, Any], names: Collection[str] | None = None
) -> Iterator[str]:
    """Return what a config would do, application by application.

    Args:
        before: what Serve is set to run; None if nothing.
        goal: the new config.
        names: the applications that the rollout is about; None for all.
    """
    old = by_name(before or {"applications": []})
    new = by_name(goal)
    for name, app in new.items():
        if names is not None and name not in names:
            continue
        if name not in old:
            yield f"{name}: new"
        # By key, as Serve itself compares: one that is new and null changes nothing.
        elif not differing(old[name], app):  # null is the same as not set
            yield f"{name}: unchanged, nothing restarts"
        else:
            keys = sorted(differing(old[name], app))
            yield f"{name}: changes {', '.join(keys)}; {_effect(old[name], app)}"
            # By name, else a deployment that is new in front would look like all of them changed.
            leaves = [f"{name}: {line}" for line in _leaves("", _keyed(old[name]), _keyed(app))]
            yield from leaves[:SHOWN]
            if more := leaves[SHOWN:]:
                yield f"{name}: and {len(more)} more"
    yield from (f"{name}: removed, its requests end" for name in old if name not in new)


def by_name(goal: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a config's applications by their names."""
    return {app.get("name", "default"): app for app in goal["applications"]}


def _effect(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    keys = differing(old, new)
    if keys & BUILT:
        return NEW_BUILD
    if keys == {"route_prefix"}:
        return "nothing restarts"
    return _effect_of_overrides(old, new) if keys == {"deployments"} else UNKNOWN


def _effect_of_overrides(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, after = _deployments(old), _deployments(new)
    fields = {
        name: differing(before.get(name, {}), after.get(name, {}))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    }
    if any(
        changed & VERSION or _policy_differs(before.get(name, {}), after.get(name, {}))
        for name, changed in fields.items()
    ):
        return NEW_BUILD
    if all(changed <= IN_PLACE for changed in fields.values()):
        return "set in place, nothing restarts"
    if all(changed <= IN_PLACE | REPLACED for changed in fields.values()):
        hit = ", ".join(sorted(name for name, changed in fields.items() if changed & REPLACED))
        return f"no build: replicas of {hit} are replaced, and each proves its own access"
    return UNKNOWN


def _policy_differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    was, will = old.get("autoscaling_config"), new.get("autoscaling_config")
    return bool(was) != bool(will) or bool(was and will and was.get("policy") != will.get("policy"))


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """Return the keys that differ; one that is null is the same as one that is not set."""
    return {key for key in {*old, *new} if old.get(key) != new.get(key)}


def _deployments(app: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {each["name"]: dict(each) for each in app.get("deployments") or ()}
    return {name: {k: v for k, v in each.items() if k != "name"} for name, each in found.items()}


def _keyed(app: Mapping[str, Any]) -> dict[str, Any]:
    """Return an application whose deployments are found by name and not by place."""
    return {**app, "deployments": _deployments(app)} if "deployments" in app else dict(app)


def _leaves(path: str, old: Any, new: Any) -> Iterator[str]:
    trees = [tree for tree in (old, new) if isinstance(tree, Mapping)]
    if trees and all(tree in (UNSET, None) or isinstance(tree, Mapping) for tree in (old, new)):
        for key in dict.fromkeys(key for tree in trees for key in tree):
            was, will = (
                tree.get(key, UNSET) if isinstance(tree, Mapping) else UNSET for tree in (old, new)
            )
            yield from _leaves(f"{path}.{key}" if path else str(key), was, will)
    elif old != new and ".env_vars." in f".{path}.":
        yield f"{path}: changed"  # its value may be anything, a secret too
    elif old != new:
        yield f"{path}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    if value is UNSET:
        return "default"
    # A new file holds no token; what a plain `serve deploy` put there was never looked at.
    text = json.dumps(scrub(value), ensure_ascii=False)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
