"""The command line: `serve-app ...`, the same as `python -m serve_app ...`.

Exit codes: 0 granted or valid, 2 config error, 3 blocked, 4 could not be determined, 5 rolled
back. Imports of Ray and the Hub wait until a command needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from serve_app.cli.options import parser_of
from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from serve_app.access.verdict import Verdict
    from serve_app.cli.canary import Tried
    from serve_app.cli.deploy import Options
    from serve_app.cli.receipt import Audit
    from serve_app.serve_config import ServedApp

T = TypeVar("T")
CONFIG_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parser_of(RUNS).parse_args(argv)
    try:
        code: int = options.command(options)
    except ConfigError as error:
        print(f"config error: {error.message}", file=sys.stderr)
        return CONFIG_ERROR
    except KeyboardInterrupt:
        # What a shell says of a process that ended by SIGINT: 128 + 2.
        return 130
    return code


def _check(options: argparse.Namespace) -> int:
    from serve_app import serve_config
    from serve_app.access.preflight import check_cluster
    from serve_app.cli import check

    wait_s = _duration(options.wait, "--wait")
    _configure_logs("error")
    if options.repo_id:
        apps = serve_config.read_foreign(
            options.config, repo_id=options.repo_id, revision=options.revision or "main"
        )
    elif options.revision:
        raise ConfigError("--revision goes with --repo-id; the config names its own revision")
    else:
        apps = serve_config.read(options.config)
    output = check.Output(as_json=options.json, junit=options.junit)
    gate = _everywhere(options, check_cluster, _check_here)
    return check.run(apps, gate, output, wait_s=wait_s)


def _deploy(options: argparse.Namespace) -> int:
    from serve_app import serve_config
    from serve_app.cli import canary, deploy, release

    how = _rollout_options(options)
    steps = release.release_of(options)
    goal, apps = serve_config.read_whole(options.config)
    code, verdicts = _gate_before_rollout(apps, options)
    # A plan without a grant records nothing: nobody tried to roll out.
    if code and how.dry_run:
        return code
    if options.prefetch and not code and not how.dry_run:
        not_fetched = _fetch_everywhere(apps, verdicts, options)
        if not_fetched:
            return not_fetched
    with deploy.connected(options.address):
        if code:
            return deploy.blocked(code, apps, verdicts)
        if steps is None:
            return deploy.run(goal, apps, verdicts, how)
        ended = canary.run(goal, apps, verdicts, how, steps)
    return ended if isinstance(ended, int) else _finish(ended, goal, options, how)


def _finish(ended: Tried, goal: dict[str, Any], options: argparse.Namespace, how: Options) -> int:
    """Give all requests to what a canary was good with, after the gate: its steps take hours."""
    from serve_app import serve_config
    from serve_app.cli import canary, deploy

    apps = serve_config.served(goal)
    code, verdicts = _gate_before_rollout(apps, options)
    tried = canary.at_commits(goal, verdicts, ended.commits)
    if code == 0 and tried is not goal:  # then that commit is to be proven
        goal, apps = tried, serve_config.served(tried)
        code, verdicts = _gate_before_rollout(apps, options)
    with deploy.connected(options.address):
        if code:
            return deploy.blocked(code, apps, verdicts)
        return canary.finish(goal, apps, verdicts, how, ended)


def _prefetch(options: argparse.Namespace) -> int:
    from serve_app import serve_config

    _configure_logs("error")
    apps = serve_config.read(options.config)
    if options.this_node:
        return _fetch_here(apps, options)
    if options.link is not None or options.wait != "0":
        raise ConfigError("--link and --wait go with --this-node")
    code, verdicts = _gate_before_rollout(apps, options)
    return code or _fetch_everywhere(apps, verdicts, options)


def _fetch_here(apps: Sequence[ServedApp], options: argparse.Namespace) -> int:
    from serve_app.cli import prefetch

    if options.link is not None and len(apps) > 1:
        raise ConfigError("--link takes a file with one application")
    wait_s = _duration(options.wait, "--wait")
    links = {} if options.link is None else prefetch.places_of(apps[0].config.model, options.link)
    code, verdicts = _prove(apps, _check_here, options, wait_s=wait_s)
    return code or prefetch.run_here(apps, verdicts, links=links, as_json=options.json)


def _fetch_everywhere(
    apps: Sequence[ServedApp], verdicts: Mapping[str, Verdict], options: argparse.Namespace
) -> int:
    from serve_app.cli import prefetch

    return prefetch.run(
        apps,
        verdicts,
        address=options.address,
        timeout_s=_duration(options.timeout, "--timeout"),
        as_json=options.json,
    )


def _duration(text: str, option: str) -> float:
    from serve_app.cli import check

    try:
        return check.parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _rollback(options: argparse.Namespace) -> int:
    from serve_app import serve_config
    from serve_app.cli import canary, deploy

    how = _rollout_options(options)
    with deploy.connected(options.address):
        code = canary.take_back(options.application, how)
        if code is not None:
            return code
        good = deploy.former(options.application)
    apps = serve_config.served(good.applications)
    code, verdicts = _gate_before_rollout(apps, options)
    if code == 0 and (good := good.at_commits(verdicts)).moved:  # then that commit is to be proven
        apps = serve_config.served(good.applications)
        code, verdicts = _gate_before_rollout(apps, options)
    # A connection of its own: the gate's probes want jobs of the applications' environments.
    with deploy.connected(options.address):
        if code:
            return deploy.blocked(code, apps, verdicts)
        return deploy.roll_back(good, how)


def _configure_logs(level: Literal["error", "info"]) -> None:
    from serve_app.config import LoggingConfig
    from serve_app.telemetry import logs

    logs.configure_cli(LoggingConfig(level=level))


def _rollout_options(options: argparse.Namespace) -> Options:
    from serve_app.cli.deploy import Options

    timeout_s = _duration(options.timeout, "--timeout")
    # A script gets each entry of the history as a line; a person has read it already.
    _configure_logs("error" if sys.stderr.isatty() else "info")
    return Options(
        timeout_s, as_json=options.json, dry_run=options.dry_run, remove=tuple(options.remove)
    )


def _gate_before_rollout(
    apps: Sequence[ServedApp], options: argparse.Namespace
) -> tuple[int, dict[str, Verdict]]:
    """Prove every application's access; returns the exit code and the verdicts by name."""
    from serve_app.access.preflight import check_cluster

    def gate(app: ServedApp) -> Verdict:
        verdict = check_cluster(app, options.address)
        if verdict is None:
            raise ConfigError("no Ray cluster is running here; name one with --address")
        return verdict

    return _prove(apps, gate, options)


def _check_here(app: ServedApp) -> Verdict:
    from serve_app.access.preflight import check_this_machine

    return check_this_machine(app.config, access_only=app.access_only)


def _prove(
    apps: Sequence[ServedApp],
    gate: Callable[[ServedApp], Verdict],
    options: argparse.Namespace,
    *,
    wait_s: float = 0.0,
) -> tuple[int, dict[str, Verdict]]:
    """Ask the gate about every application; returns the exit code and the verdicts by name."""
    from serve_app.cli import check

    verdicts: dict[str, Verdict] = {}

    def ask(app: ServedApp) -> Verdict:
        verdicts[app.name] = gate(app)
        return verdicts[app.name]

    code = check.run(apps, ask, check.Output(as_json=options.json), wait_s=wait_s)
    return code, verdicts


def _receipt(options: argparse.Namespace) -> int:
    from serve_app import serve_config
    from serve_app.cli import receipt

    _configure_logs("error")

    audit: Audit = _everywhere(
        options, receipt.of_cluster, lambda app: receipt.of_this_machine(app.config)
    )
    apps = serve_config.read(options.config)
    return receipt.run(apps, audit, as_json=options.json, attest=options.attest)


def _history(options: argparse.Namespace) -> int:
    from serve_app.cli import history

    _configure_logs("error")
    return history.run(options.application, options.address, as_json=options.json)


def _digest(options: argparse.Namespace) -> int:
    from serve_app.cli import digest

    _configure_logs("error")
    return digest.run(options.what)


def _coldstart(options: argparse.Namespace) -> int:
    from serve_app.cli import coldstart

    _configure_logs("error")
    return coldstart.run(options.address, as_json=options.json)


def _loadtest(options: argparse.Namespace) -> int:
    from serve_app.loadtest.command import loadtest

    return loadtest(options)


def _capacity(options: argparse.Namespace) -> int:
    from serve_app.loadtest.command import run_capacity

    return run_capacity(options)


def _everywhere(
    options: argparse.Namespace,
    cluster: Callable[[ServedApp, str | None], T | None],
    here: Callable[[ServedApp], T],
) -> Callable[[ServedApp], T]:
    """Ask a cluster where one runs, else this machine, and say so."""

    def ask(app: ServedApp) -> T:
        if options.this_node:
            return here(app)
        found = cluster(app, options.address)
        if found is not None:
            return found
        print("No Ray cluster is running: checking this machine alone.", file=sys.stderr)
        return here(app)

    return ask


def _validate(options: argparse.Namespace) -> int:
    from serve_app import serve_config
    from serve_app.engine.backends import check_vllm_arguments

    apps = serve_config.read(options.config)
    for app in apps:
        if app.config.engine.backend == "vllm" and not check_vllm_arguments(app.config.engine):
            print(f"{app.name}: vLLM is not installed here, engine.vllm's names are not checked")
    print(f"{options.config} is valid: {', '.join(app.name for app in apps)}")
    return 0


def _schema(_options: argparse.Namespace) -> int:
    from serve_app.config import AppConfig

    print(json.dumps(AppConfig.model_json_schema(), indent=2))
    return 0


RUNS: dict[str, Callable[[argparse.Namespace], int]] = {
    "check": _check,
    "deploy": _deploy,
    "prefetch": _prefetch,
    "rollback": _rollback,
    "receipt": _receipt,
    "history": _history,
    "digest": _digest,
    "coldstart": _coldstart,
    "loadtest": _loadtest,
    "capacity": _capacity,
    "validate": _validate,
    "schema": _schema,
}
