"""What served well before, application by application, in the cluster's memory.

Several people may share a cluster, each with a file of their own, so going back is a matter of
one rollout's applications and never of all. A config holds no secret (`config.refuse_secrets`).
An application's newest version is the one that serves, as long as nobody went past this command.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from serve_app.cluster import kv
from serve_app.rollout.scope import pinned

KEY = "rollout/versions"
OLD_KEY = "rollout/history"  # of versions that kept one config of all applications
KEPT = 10  # versions of one application


@dataclass(frozen=True, slots=True)
class Version:
    """An application's config that ran and answered.

    Args:
        name: of the application.
        app: its config, as Serve reports it; None where it was removed.
        since: Unix seconds; the same for all that one rollout set.
        commit: of the model, as the gate before the rollout resolved it; None if that is unknown.
    """

    name: str
    app: dict[str, Any] | None
    since: float
    commit: str | None = None


def read() -> list[Version]:
    """Return the good versions of all applications, oldest first."""
    value = kv.get(KEY)
    return [Version(**entry) for entry in json.loads(value)] if value else _converted()


def remember(
    serving: Mapping[str, dict[str, Any]],
    names: Iterable[str],
    commits: Mapping[str, str | None] | None = None,
) -> None:
    """Note what a rollout set.

    Args:
        serving: every application's config by its name.
        names: of those that the rollout was about; one that does not serve was removed.
        commits: of the models, by application.
    """
    versions, now = read(), time.time()
    newest = _newest(versions)
    for name in sorted(names):
        app = serving.get(name)
        if (name not in newest and app is not None) or newest.get(name, app) != app:
            versions.append(Version(name, app, now, (commits or {}).get(name)))
    _write(versions)


def go_back(gone_back_to: Iterable[Version], serving: Mapping[str, dict[str, Any]]) -> None:
    """Let what serves now stand for the old versions that were gone back to.

    What came between served worse; without this, going back twice would go to it again.
    """
    old = {version.name: version for version in gone_back_to}
    now = time.time()
    kept, ended = [], set()
    for version in read():
        ended |= {version.name} if old.get(version.name) == version else set()
        if version.name not in ended:
            kept.append(version)
    new = (Version(name, serving.get(name), now, old[name].commit) for name in sorted(old))
    _write([*kept, *new])


def restate(serving: Mapping[str, dict[str, Any]], back: Mapping[str, dict[str, Any]]) -> None:
    """Write the newest versions as they serve after a failed rollout went back to them.

    What is gone back to is nudged and may be pinned; without this it would look like something
    that nobody remembers, and the next way back would lead to the same version again.

    Args:
        serving: every application's config by its name.
        back: the configs that the rollout went back to, before they were nudged.
    """
    versions = read()
    newest = {version.name: index for index, version in enumerate(versions)}
    for name, app in back.items():
        index = newest.get(name)
        if index is None or name not in serving:
            continue
        version = versions[index]
        if version.app is not None and app in (version.app, pinned(version.app, version.commit)):
            versions[index] = replace(version, app=serving[name])
    _write(versions)


def former(name: str, app: Mapping[str, Any] | None) -> Version | None:
    """Return an application's newest good version that is not the one that serves.

    Args:
        name: of the application.
        app: its config that serves; None if it does not.
    """
    found = (version for version in reversed(read()) if version.name == name)
    return next((version for version in found if version.app not in (None, app)), None)


def commit_of(name: str, app: Mapping[str, Any]) -> str | None:
    """Return the commit that a good version of an application served; None if it is none."""
    own = [version for version in read() if (version.name, version.app) == (name, app)]
    return own[-1].commit if own else None


def last_rollout(serving: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the applications that going back is about.

    Args:
        serving: every application's config by its name.

    Returns:
        Those that serve something else than what is remembered as good, because a rollout failed
        or somebody went past this command; if there are none, those that the last rollout set.
    """
    versions = read()
    newest = _newest(versions)
    if off := sorted(name for name, app in newest.items() if serving.get(name) != app):
        return off
    # The last in order: clocks of two machines may differ, or be set back.
    last = versions[-1].since if versions else None
    return sorted(version.name for version in versions if version.since == last)


def _newest(versions: Iterable[Version]) -> dict[str, dict[str, Any] | None]:
    return {version.name: version.app for version in versions}


def _converted() -> list[Version]:
    """Return what an older version of this package remembered."""
    value = kv.get(OLD_KEY)
    versions: list[Version] = []
    for entry in json.loads(value) if value else ():
        newest = _newest(versions)
        apps = {app.get("name", "default"): app for app in entry["goal"]["applications"]}
        changed = [name for name in sorted({*apps, *newest}) if newest.get(name) != apps.get(name)]
        versions += [Version(name, apps.get(name), entry["since"]) for name in changed]
    return versions


def _write(versions: list[Version]) -> None:
    counted: dict[str, int] = defaultdict(int)
    kept: list[Version] = []
    for version in reversed(versions):
        counted[version.name] += 1
        if counted[version.name] <= KEPT:
            kept.append(version)
    value = json.dumps([asdict(version) for version in reversed(kept)])
    kv.put(KEY, value)
