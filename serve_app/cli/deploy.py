"""The commands `deploy` and `rollback` after the gate: connect, show the plan, roll out."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from serve_app.access.verdict import Verdict
from serve_app.cluster.connection import joined
from serve_app.config import config_hash
from serve_app.deployments import canary as store
from serve_app.errors import ConfigError
from serve_app.rollout import history
from serve_app.rollout.canary import without
from serve_app.rollout.deploy import FAILED, deploy, nudged, report
from serve_app.rollout.diff import by_name, changes
from serve_app.rollout.history import Rollout
from serve_app.rollout.lock import rollout_lock
from serve_app.rollout.plan import needs
from serve_app.rollout.scope import Commits, Scope, pinned, restored, scope_of
from serve_app.rollout.serve_client import Instance
from serve_app.serve_config import ServedApp
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import Entry, whoami

NOTHING: dict[str, Any] = {"applications": []}


@dataclass(frozen=True, slots=True)
class Options:
    """How a rollout is watched and printed.

    Args:
        timeout_s: limit of the rollout, and of going back, in seconds.
        as_json: print one JSON object at the end.
        dry_run: show the plan alone.
        remove: names of applications to take away.
        ended: name of a canary that goes with the rollout; it is not looked after.
    """

    timeout_s: float
    as_json: bool = False
    dry_run: bool = False
    remove: tuple[str, ...] = ()
    ended: str | None = None


@dataclass(frozen=True, slots=True)
class Return:
    """What going back would do.

    Args:
        versions: the former one of each application that goes back; each has a config.
        moved: those whose branch means another commit by now than the one that served.
    """

    versions: tuple[Entry, ...]
    moved: frozenset[str] = frozenset()

    @property
    def apps(self) -> dict[str, dict[str, Any]]:
        """Return these applications by name, each as it loads the commit that it served."""
        return {
            version.application: pinned(
                version.config, version.config_commits if version.application in self.moved else {}
            )
            for version in self.versions
            if version.config is not None
        }

    def at_commits(self, verdicts: Mapping[str, Verdict]) -> Return:
        """Return the same with those pinned whose branch has moved, by what the gate resolved."""
        known = {v.application: v.config_commits for v in self.versions if v.config_commit}
        now = {name: verdict.commits for name, verdict in verdicts.items()}
        moved = {name for name, commits in known.items() if now.get(name, commits) != commits}
        return replace(self, moved=frozenset(moved))

    @property
    def applications(self) -> dict[str, Any]:
        """Return a config of these applications alone, for the gate."""
        return {"applications": list(self.apps.values())}


def run(
    file: dict[str, Any],
    apps: Sequence[ServedApp],
    verdicts: Mapping[str, Verdict],
    options: Options,
) -> int:
    """Show what a config does on the connected cluster, and roll it out.

    Applications that serve and are not in the file stay as they are.

    Args:
        file: the config file's content.
        apps: our applications in it.
        verdicts: what the gate said of each, all granted.
        options: how.

    Returns:
        The exit code: 0 the new version serves, 5 it does not.

    Raises:
        ConfigError: another rollout is under way, the file and what serves do not go together,
            or a name of `options.remove` is not there.
    """
    serving = Instance(file)
    goal = without(serving.goal(), options.ended)
    scope = scope_of(file, goal, options.remove)
    refuse_tried(scope.names)
    for line in changes(goal, scope.goal, scope.set_names):
        _say(line)
    for name in scope.others:
        _say(f"{name}: not in the file, stays as it is; --remove {name} takes it away")
    for app in (app for app in apps if app.gated is None):
        for line in needs(app, verdicts[app.name]):
            _say(line)
    if options.dry_run:
        return 0
    with rollout_lock(wait_s=options.timeout_s if options.ended else 0.0):
        before = without(serving.goal(), options.ended)
        scope = scope_of(file, before, options.remove)  # again: somebody else may have been faster
        refuse_tried(scope.names)
        commits = {name: verdict.commits for name, verdict in verdicts.items()}
        good = _good(before, scope, _failing(serving, scope.names), commits)
        return _roll(serving, Rollout(scope, good, commits), options)


def refuse_tried(names: Set[str]) -> None:
    """Refuse to change an application past its canary.

    Raises:
        ConfigError: one of these has a canary, or is one.
    """
    for name in store.under_way():
        if names & {name, f"{name}{store.SUFFIX}"}:
            raise ConfigError(
                f"{name} has a canary: go on with `serve-app deploy CONFIG --canary STEPS`, or go "
                f"back with `serve-app rollback {name}`"
            )


def _good(
    before: dict[str, Any] | None,
    scope: Scope,
    failing: Collection[str],
    commits: Mapping[str, Commits],
) -> dict[str, Any] | None:
    """Return what to go back to: what serves, or what did before it failed."""
    good: dict[str, dict[str, Any] | None] = {}
    goal = by_name(scope.goal)
    for name, app in by_name(before or NOTHING).items():
        if name in failing:
            version = history.former(name, app)
            if version and version.config:
                good[name] = pinned(version.config, version.config_commits)
        elif name in commits and _source(app) == _source(goal[name]):
            # The same branch: if it has moved, the same config would load the new commit. While it
            # has not, its replicas run, and another revision would replace them.
            served = history.commits_of(name, app)
            good |= {name: pinned(app, served)} if served != commits[name] else {}
    return restored(before, good) if good else before


def _source(app: Mapping[str, Any]) -> tuple[Any, ...]:
    args = app.get("args") or {}
    args = args.get("gate") or args  # of somebody else's application behind the gate
    model = args.get("model") or {}
    endpoint = (args.get("access") or {}).get("endpoint")
    return model.get("repo_id"), model.get("revision", "main"), endpoint


def _failing(serving: Instance, names: Collection[str]) -> set[str]:
    states = serving.states()
    return {name for name in names if name in states and states[name].status in FAILED}


def blocked(code: int, apps: Sequence[ServedApp], verdicts: Mapping[str, Verdict]) -> int:
    """Record a rollout that ended at the gate, on the connected cluster.

    Args:
        code: the gate's exit code.
        apps: that were to be rolled out.
        verdicts: by the name of the application.

    Returns:
        The exit code.
    """
    for app in apps:
        verdict = verdicts.get(app.name)
        if verdict and not verdict.approved:
            hashed = config_hash(app.gated or app.config)
            rollout_history.record_gate([app.name], verdict, hashed, who=whoami())
    return code


def former(name: str | None) -> Return:
    """Return what served well on the connected cluster before the last rollout.

    Args:
        name: of the one application to go back with; None for all that the last rollout set.

    Raises:
        ConfigError: none is remembered.
    """
    known = sorted(history.read())
    # Without a memory Serve is not even asked, which would start it.
    now = by_name(Instance(NOTHING).goal() or NOTHING) if known else {}
    names = [name] if name is not None else history.last_rollout(now)
    found = [history.former(each, now.get(each)) for each in names]
    versions = tuple(version for version in found if version is not None)
    if not versions:
        of = f" of {', '.join(names)}" if names else ""
        others = ", ".join(each for each in known if each not in names)
        raise ConfigError(
            f"no earlier config{of} that served is remembered; deploy one instead"
            + (f", or go back with `serve-app rollback APP` for one of: {others}" if others else "")
        )
    return Return(versions)


def roll_back(good: Return, options: Options) -> int:
    """Go back on the connected cluster.

    Args:
        good: what `former` returned, after the gate: what was readable once need not be today.
        options: how.

    Returns:
        As `run`; where the former version does not serve, what served well goes on. What did
        not is left as it failed.

    Raises:
        ConfigError: another rollout is under way.
    """
    for version in good.versions:
        since = datetime.fromtimestamp(version.at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        _say(f"{version.application}: going back to the config that served since {since}")
    serving = Instance(good.applications)
    back = {version.application: version for version in good.versions}
    names = frozenset(back)
    with rollout_lock():
        before = serving.goal()
        goal = restored(before, dict(good.apps))
        scope = Scope(nudged(goal, names), names)
        for line in changes(before, goal, names):
            _say(line)
        for name in scope.others:
            _say(f"{name}: stays as it is")
        well = None if _failing(serving, names) else before
        commits = {name: version.config_commits for name, version in back.items()}
        return _roll(serving, Rollout(scope, well, commits, back), options)


def _roll(serving: Instance, rollout: Rollout, options: Options) -> int:
    scope = rollout.scope
    result = deploy(
        serving,
        scope.goal,
        timeout_s=options.timeout_s,
        former=rollout.former,
        names=scope.names,
    )
    history.record(result, rollout, by_name(serving.goal() or NOTHING))
    return report(result, as_json=options.as_json)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster for as long as a command takes; Ctrl-C only stops watching.

    Args:
        address: of the Ray cluster; None takes RAY_ADDRESS, or what `ray start` recorded.

    Raises:
        ConfigError: no cluster runs there.
    """
    with joined(address):
        try:
            yield
        except KeyboardInterrupt:
            print("no longer watching; what was applied goes on", file=sys.stderr)
            raise
