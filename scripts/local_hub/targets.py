"""From a path to what it asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from scripts.local_hub.behaviours import Route
from scripts.local_hub.wire import Request

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ROUTES = {
    "revision": Route.info,
    "tree": Route.tree,
    "auth-check": Route.auth_check,
    "xet-read-token": Route.xet_token,
    "resolve": Route.resolve,
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a request asks for: `tail` is what follows the route's name in the path."""

    route: Route
    repo_id: str = ""
    tail: tuple[str, ...] = ()


def find_target(request: Request) -> Target:
    """Read a path. Names of repositories have one or two parts."""
    parts = request.segments
    if parts == ["oauth", "token"]:
        return Target(Route.exchange)
    if parts[:2] == ["api", "whoami-v2"]:
        return Target(Route.whoami)
    if parts[:3] == ["api", "resolve-cache", "models"]:
        at = next((i for i, part in enumerate(parts) if _COMMIT.fullmatch(part)), len(parts))
        return Target(Route.resolve, "/".join(parts[3:at]), tuple(parts[at:]))
    is_api = parts[:2] == ["api", "models"]
    rest = parts[2:] if is_api else parts
    for size in (1, 2):
        if len(rest) > size and rest[size] in _ROUTES:
            return Target(_ROUTES[rest[size]], "/".join(rest[:size]), tuple(rest[size + 1 :]))
    if is_api and len(rest) in {1, 2}:
        return Target(Route.info, "/".join(rest))
    return Target(Route.other)
