"""`serve-app deploy --canary`: a new version beside the one that serves, step by step."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from uuid import uuid4

from ray.exceptions import RayError

from serve_app.access.verdict import Verdict
from serve_app.cli import deploy as whole
from serve_app.cli.deploy import NOTHING, Options
from serve_app.cli.release import Release, Subject, options_of, plan, subject_of
from serve_app.cluster.liveness import Liveness
from serve_app.config import AppConfig
from serve_app.deployments import canary as store
from serve_app.deployments.canary import Canary, Report, Seen
from serve_app.deployments.split import LOOK_S
from serve_app.errors import ConfigError
from serve_app.rollout.canary import Judged, Step, run_step, without
from serve_app.rollout.deploy import FAILED, Result, deploy, report
from serve_app.rollout.diff import by_name
from serve_app.rollout.lock import rollout_lock
from serve_app.rollout.scope import Commits, pinned
from serve_app.rollout.serve_client import Instance
from serve_app.serve_config import ServedApp
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import Entry, What, whoami

# Who has waited so long for a canary's first token gets it from the version that serves.
PATIENCE_S = 60.0


class Tried(NamedTuple):
    """What is to be rolled out: the commits that were tried, and by which trial; "" by none."""

    commits: Commits
    trial: str = ""


def run(
    file: dict[str, Any],
    apps: Sequence[ServedApp],
    verdicts: Mapping[str, Verdict],
    options: Options,
    release: Release,
) -> int | Tried:
    """Try a version on the connected cluster, up to the step that gives it all requests.

    Args:
        file: the config file's content.
        apps: our applications in it.
        verdicts: what the gate said of each, all granted.
        options: how the canary is rolled out.
        release: the steps.

    Returns:
        The exit code, where that is the end; else what was tried and is to serve.

    Raises:
        ConfigError: the file has another application than one of ours, that does not serve or is
            the same as what serves, another canary is under way, or another rollout.
    """
    serving = Instance(file)
    goal = serving.goal()
    subject = subject_of(file, apps, goal, release)
    commits: Commits = verdicts[subject.name].commits
    known = store.read(subject.name)
    for line in plan(subject, goal, verdicts, release, known):
        _say(line)
    if options.dry_run:
        return 0
    with rollout_lock(f"canary of {subject.name}"):
        known = store.read(subject.name)  # again: somebody else may have been faster
        now = by_name(serving.goal() or NOTHING).get(subject.tried)
        if known is not None and now not in (None, subject.canary):
            raise ConfigError(
                f"{subject.tried} tries another config than the file has, or with other replicas; "
                f"go back first: serve-app rollback {subject.name}"
            )
        if not release.tried:
            return Tried(known.commits, known.trial) if known else Tried(commits)
        if known is None or not _runs(serving, subject):
            known = _new(subject, release, commits)
            ended = _start(serving, subject, known, options, release)
            if ended is not None:
                return report(ended, as_json=options.as_json)
        known = replace(known, sticky=release.sticky)
        ended = _steps(serving, subject, known, options, release)
        if ended is None:
            return Tried(known.commits, known.trial)
        return report(ended, as_json=options.as_json)


def finish(
    file: dict[str, Any],
    apps: Sequence[ServedApp],
    verdicts: Mapping[str, Verdict],
    options: Options,
    tried: Tried,
) -> int:
    """Roll the version out that was tried, and take its canary away; see `cli.deploy.run`.

    Where somebody else has taken the canary back since its last step, or tries another one, nothing
    is rolled out.
    """
    (app,) = apps
    now = store.read(app.name)
    if tried.trial != (now.trial if now else ""):
        words = f"{app.name}: somebody else has taken the canary back, or tries another one"
        return report(Result("failed", words, 0.0), as_json=options.as_json)
    store.forget(app.name)  # from now on the version that serves answers alone
    time.sleep(2 * LOOK_S)
    return whole.run(file, apps, verdicts, replace(options, ended=f"{app.name}{store.SUFFIX}"))


def at_commits(
    file: dict[str, Any], verdicts: Mapping[str, Verdict], commits: Commits
) -> dict[str, Any]:
    """Return a file whose application loads what was tried, where its branch has moved since."""
    (app,) = file["applications"]
    now = verdicts[app.get("name", "default")].commits
    return file if now == commits else {**file, "applications": [pinned(app, commits)]}


def take_back(name: str | None, options: Options) -> int | None:
    """Take canaries of the connected cluster away.

    Args:
        name: of the application that has one; None for all.
        options: how.

    Returns:
        The exit code; None if there is none.

    Raises:
        ConfigError: another rollout is under way.
    """
    names = [each for each in store.under_way() if name in (None, each)]
    began = time.monotonic()
    for each in names:
        canary = store.read(each)
        if canary is None:
            continue
        serving = Instance(NOTHING)
        _InCluster(serving, each, canary).begin(Step(0.0))
        _take_away(serving, each, canary, options.timeout_s)
        why = f"the canary was taken back at {Step(canary.share, canary.shadow).words}"
        took_s = time.monotonic() - began
        rollout_history.record(
            Entry(application=each, what=What.CANARY, why=why, who=whoami(), duration_s=took_s)
        )
        _say(f"{each}: {why}; the version that served goes on")
    if not names:
        return None
    return report(Result("done", "", time.monotonic() - began), as_json=options.as_json)


def _new(subject: Subject, release: Release, commits: Commits) -> Canary:
    config: AppConfig = subject.served.config
    return Canary(
        application=subject.tried,
        trial=uuid4().hex,
        sticky=release.sticky,
        patience_s=min(config.api.first_token_timeout_s, PATIENCE_S),
        stall_timeout_s=config.api.stall_timeout_s,
        adapters=tuple(adapter.name for adapter in config.model.adapters),
        commits=dict(commits),
    )


def _runs(serving: Instance, subject: Subject) -> bool:
    state = serving.states().get(subject.tried)
    return state is not None and state.status == "RUNNING"


def _start(
    serving: Instance, subject: Subject, canary: Canary, options: Options, release: Release
) -> Result | None:
    """Start a canary that gets nothing yet; returns how that ended if it did not start."""
    name = subject.name
    with rollout_lock():
        before = without(serving.goal(), subject.tried) or NOTHING
        if name not in by_name(before):
            raise ConfigError(f"{name} does not serve any more")
        store.write(name, canary)
        goal = {**before, "applications": [*before["applications"], subject.canary]}
        with _how_to_go_on(subject, f"{release.command} {options_of(release.steps)}"):
            result = deploy(
                serving,
                goal,
                timeout_s=options.timeout_s,
                former=before,
                names={subject.tried},
            )
        if result.status == "done":
            return None
        store.forget(name)
    subject.record(What(result.status), result.reason, canary.commits, result.duration_s)
    return result


def _steps(
    serving: Instance,
    subject: Subject,
    canary: Canary,
    options: Options,
    release: Release,
) -> Result | None:
    """Go through the steps; returns how that ended, None if the version is to get all."""
    began = time.monotonic()
    trial = _InCluster(serving, subject.name, canary)
    for index, step in enumerate(release.tried):
        going_on = f"{release.command} {options_of(release.steps[index:])}"
        _say(f"{subject.name}: {step.words}")
        subject.record(What.CANARY, f"{step.words}: begun", canary.commits)
        with _how_to_go_on(subject, going_on):
            judged = run_step(trial, step, release.rules, _say)
        words = f"{step.words}: {judged.words}"
        _say(f"{subject.name}: {judged.verdict}: {words}")
        bad = judged.verdict == "bad"
        if bad:
            trial.begin(Step(0.0))  # nothing more, at once
        what = What.ROLLED_BACK if bad else What.CANARY
        subject.record(what, f"{judged.verdict}: {words}", canary.commits, judged.duration_s)
        if bad:
            _take_away(serving, subject.name, trial.canary, options.timeout_s)
        if judged.verdict != "good":
            return _ended(subject, judged, words, going_on, time.monotonic() - began)
    if len(release.tried) < len(release.steps):
        return None
    return Result(
        "held",
        f"{subject.tried} stays at {step.words}; {subject.ways(f'{release.command} --canary 100')}",
        time.monotonic() - began,
    )


def _ended(
    subject: Subject, judged: Judged, words: str, going_on: str, duration_s: float
) -> Result:
    if judged.verdict == "few":
        words = f"{words}; {subject.ways(going_on)}"
    status = {"bad": "rolled_back", "few": "undecided"}.get(judged.verdict, "failed")
    return Result(status, words, duration_s)


def _take_away(serving: Instance, name: str, canary: Canary, timeout_s: float) -> None:
    """Remove a canary that gets nothing more; what runs there ends before it goes."""
    time.sleep(2 * LOOK_S)  # until every ingress knows
    with rollout_lock(wait_s=timeout_s):
        serving.apply(without(serving.goal(), canary.application) or NOTHING)
        store.forget(name)


class _InCluster:
    """What a step needs of the connected cluster; see `rollout.canary.Trial`."""

    def __init__(self, serving: Instance, name: str, canary: Canary) -> None:
        self.canary = canary
        self._serving = serving
        self._name = name
        self._last = Report(0, 0, Seen(), Seen())
        self._liveness = Liveness(store.SILENT_S)

    def begin(self, step: Step) -> None:
        """Let every ingress know the shares."""
        now = store.read(self._name)
        count = 1 + max(self.canary.step, now.step if now else 0)
        self.canary = replace(self.canary, step=count, share=step.share, shadow=step.shadow)
        self._last = Report(0, 0, Seen(), Seen())
        store.write(self._name, self.canary)

    def report(self) -> Report | None:
        """Return what was seen since; what was seen last while the cluster does not answer."""
        try:
            if store.read(self._name) != self.canary:
                return None
            self._last = store.report(self._name, self.canary, self._liveness)
        except RayError:
            self._liveness.forget()
        return self._last

    def fault(self) -> str | None:
        """Say why the canary does not run; a controller that restarts is no reason."""
        try:
            states = self._serving.states()
        except ConfigError:
            return None
        state = states.get(self.canary.application)
        if state is None:
            return f"{self.canary.application} does not serve any more"
        if state.status in FAILED:
            return f"{self.canary.application} is {state.status}: {state.message}"
        return None


@contextmanager
def _how_to_go_on(subject: Subject, command: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say(f"{subject.tried} stays as it is; {subject.ways(command)}")
        raise


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
