"""What `deploy --canary` is asked to do: its steps, how they are judged, and what they are of."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.access.verdict import Verdict
from serve_app.cli.check import parse_duration
from serve_app.cli.deploy import NOTHING
from serve_app.config import config_hash
from serve_app.deployments.canary import Canary
from serve_app.errors import ConfigError
from serve_app.rollout.canary import Rules, Step, canary_of, parse_shadow, parse_steps
from serve_app.rollout.diff import by_name, changes, differing
from serve_app.rollout.judge import parse_slo
from serve_app.rollout.plan import needs
from serve_app.rollout.scope import Commits
from serve_app.serve_config import CANARY_IMPORT_PATH, ServedApp
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import Entry, What, whoami


@dataclass(frozen=True, slots=True)
class Release:
    """A release in steps, as the command line has it.

    Args:
        steps: in order; a share of 1 is the rollout itself.
        rules: how each is judged.
        replicas: of the canary.
        sticky: see `Canary`.
        command: the command up to its steps, for people.
    """

    steps: tuple[Step, ...]
    rules: Rules
    replicas: int
    sticky: str
    command: str

    @property
    def tried(self) -> tuple[Step, ...]:
        """Return the steps with a canary."""
        return tuple(step for step in self.steps if step.share < 1)


@dataclass(frozen=True, slots=True)
class Subject:
    """What a release is about: an application, its new version, and that one's canary."""

    name: str
    app: dict[str, Any]
    served: ServedApp
    canary: dict[str, Any]

    @property
    def tried(self) -> str:
        """Return the canary's name."""
        return str(self.canary["name"])

    def ways(self, command: str) -> str:
        """Say how to go on with a canary, and how to go back."""
        return f"go on with `{command}`, go back with `serve-app rollback {self.name}`"

    def record(self, what: What, why: str, commits: Commits, duration_s: float = 0.0) -> None:
        """Append to the history of the application."""
        rollout_history.record(
            Entry(
                application=self.name,
                what=what,
                why=why,
                who=whoami(),
                commit=commits.get(""),
                config_hash=config_hash(self.served.config),
                duration_s=duration_s,
            )
        )


def release_of(options: argparse.Namespace) -> Release | None:
    """Return what the options say of a release in steps; None for a rollout at once.

    Raises:
        ConfigError: they do not go together, or cannot be read.
    """
    given = {name: getattr(options, name) for name in ("hold", "slo", "sticky")}
    if not options.canary and not options.shadow:
        if wrong := [name for name, value in given.items() if value]:
            raise ConfigError(f"--{wrong[0]} goes with --canary or --shadow")
        return None
    if options.remove:
        raise ConfigError(
            "--remove does not go with --canary: take it away by a rollout of its own"
        )
    if min(options.canary_replicas, options.min_requests) < 1:
        raise ConfigError("--canary-replicas and --min-requests are at least 1")
    copied = (parse_shadow(options.shadow),) if options.shadow else ()
    rules = Rules(
        limits=parse_slo(options.slo or ""),
        hold_s=_seconds(options.hold or "10m", "--hold"),
        least=options.min_requests,
        patience_s=_seconds(options.timeout, "--timeout"),
    )
    return Release(
        steps=(*copied, *(parse_steps(options.canary) if options.canary else ())),
        rules=rules,
        replicas=options.canary_replicas,
        sticky=options.sticky or "",
        command=f"serve-app deploy {options.config}",
    )


def subject_of(
    file: dict[str, Any],
    apps: Sequence[ServedApp],
    goal: dict[str, Any] | None,
    release: Release,
) -> Subject:
    """Return what a release is about.

    Raises:
        ConfigError: the file has another application than one of ours, or that does not serve, or
            is the same as what serves.
    """
    if len(file["applications"]) != 1 or len(apps) != 1 or apps[0].gated is not None:
        raise ConfigError("--canary takes a file with one application, which this package builds")
    (app,), (served,) = file["applications"], apps
    name = served.name
    now = by_name(goal or NOTHING)
    if name not in now:
        raise ConfigError(f"{name} does not serve yet: deploy it without --canary")
    if not differing(now[name], app):
        raise ConfigError(f"{name} serves this very config")
    canary = canary_of(app, release.replicas)
    tried = now.get(str(canary["name"]))
    if tried is not None and tried.get("import_path") != CANARY_IMPORT_PATH:
        raise ConfigError(f"{canary['name']} is an application that is no canary; rename it")
    return Subject(name, app, served, canary)


def plan(
    subject: Subject,
    goal: dict[str, Any] | None,
    verdicts: Mapping[str, Verdict],
    release: Release,
    known: Canary | None,
) -> Iterator[str]:
    """Yield what a release would do, line by line."""
    name = subject.name
    before = {"applications": [by_name(goal or NOTHING)[name]]}
    yield from changes(before, {"applications": [subject.app]})
    if known is not None:
        words = Step(known.share, known.shadow).words
        yield f"{subject.tried}: is there, {words} of the requests of {name}"
    elif release.tried:
        replicas = f"{release.replicas} replica{'s' if release.replicas > 1 else ''}"
        yield f"{subject.tried}: new, {replicas} beside {name}"
        config = subject.served.config
        scale = {"min_replicas": release.replicas, "max_replicas": release.replicas}
        replica = config.replica.model_copy(update=scale)
        served = replace(
            subject.served,
            name=subject.tried,
            config=config.model_copy(update={"replica": replica}),
        )
        yield from needs(served, verdicts[name])
    rules = release.rules
    limits = ", ".join(limit.name for limit in rules.limits)
    for step in release.tried:
        yield f"{name}: {step.words} for {rules.hold_s:.0f} s, with {limits}"
    if len(release.tried) < len(release.steps):
        yield f"{name}: then the new version is rolled out, and {subject.tried} goes"


def options_of(steps: Sequence[Step]) -> str:
    """Return the options that go on with these steps."""
    shadows = [f"--shadow {100 * step.shadow:.4g}" for step in steps if step.shadow]
    shares = ",".join(f"{100 * step.share:.4g}" for step in steps if step.share)
    return " ".join([*shadows, *([f"--canary {shares}"] if shares else [])])


def _seconds(text: str, option: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
