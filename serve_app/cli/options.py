"""The options of every command; imports nothing heavy, for `--help`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from serve_app import __version__
from serve_app.loadtest.options import Commands, Run, add_capacity, add_loadtest


def parser_of(runs: Mapping[str, Run]) -> argparse.ArgumentParser:
    """Return the parser of the whole command line.

    Args:
        runs: by the name of each command what runs it; returns the exit code.
    """
    parser = argparse.ArgumentParser(
        prog="serve-app", description="Gated open-weights models on Ray Serve."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="prove the access of every node, without a rollout")
    check.add_argument("config", type=Path, metavar="CONFIG", help="the Serve YAML")
    check.add_argument("--address", help="address of the Ray cluster (default: the running one)")
    check.add_argument("--this-node", action="store_true", help="check this machine alone")
    check.add_argument("--json", action="store_true", help="print one JSON object per application")
    check.add_argument("--junit", type=Path, metavar="FILE", help="also write JUnit XML")
    check.add_argument(
        "--wait", metavar="DURATION", default="0", help="go on while a request is pending (1h, 30m)"
    )
    check.add_argument("--repo-id", help="check this repository for other people's applications")
    check.add_argument("--revision", help="with --repo-id: branch, tag or commit (main)")
    check.set_defaults(command=runs["check"])

    _add_rollouts(commands, runs)

    _add_reports(commands, runs)
    add_loadtest(commands, runs["loadtest"])
    add_capacity(commands, runs["capacity"])

    validate = commands.add_parser("validate", help="check a config file, without a cluster")
    validate.add_argument("config", type=Path, metavar="CONFIG", help="the Serve YAML")
    validate.set_defaults(command=runs["validate"])

    schema = commands.add_parser("schema", help="print the JSON schema of `args:`")
    schema.set_defaults(command=runs["schema"])
    return parser


def _add_rollouts(commands: Commands, runs: Mapping[str, Run]) -> None:
    deploy = commands.add_parser("deploy", help="gate, apply, watch, ask; back if it fails")
    deploy.add_argument("config", type=Path, metavar="CONFIG", help="the Serve YAML")
    deploy.add_argument("--dry-run", action="store_true", help="stop after the gate and the plan")
    deploy.add_argument(
        "--prefetch",
        action="store_true",
        help="the weights onto every node before Serve is touched",
    )
    deploy.set_defaults(command=runs["deploy"])
    deploy.add_argument(
        "--remove",
        metavar="NAME",
        action="append",
        default=[],
        help="take an application away that serves and is not in the file; others stay",
    )
    _add_canary(deploy)
    prefetch = commands.add_parser("prefetch", help="after the gate, the weights onto every node")
    prefetch.add_argument("config", type=Path, metavar="CONFIG", help="the Serve YAML")
    prefetch.add_argument("--this-node", action="store_true", help="this machine alone, no Ray")
    prefetch.add_argument(
        "--wait", metavar="DURATION", default="0", help="with --this-node: while one is pending"
    )
    prefetch.add_argument(
        "--link",
        type=Path,
        metavar="PATH",
        help="with --this-node: make PATH a link to the model, PATH.NAME to each adapter",
    )
    prefetch.set_defaults(command=runs["prefetch"])
    rollback = commands.add_parser("rollback", help="go back to the config that served before")
    rollback.add_argument(
        "application", nargs="?", metavar="APP", help="this one (default: the last rollout's)"
    )
    rollback.set_defaults(command=runs["rollback"], dry_run=False, remove=[])
    for parser in (deploy, prefetch, rollback):
        parser.add_argument(
            "--address", help="address of the Ray cluster (default: the running one)"
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
        parser.add_argument(
            "--timeout", metavar="DURATION", default="30m", help="until it runs (30m; Ray has none)"
        )


def _add_canary(deploy: argparse.ArgumentParser) -> None:
    steps = deploy.add_argument_group(
        "a release in steps", "a new version beside the one that serves, judged by its own metrics"
    )
    steps.add_argument(
        "--canary", metavar="PERCENTS", help="its share of the requests, step by step: 5,25,100"
    )
    steps.add_argument(
        "--shadow", metavar="PERCENT", help="first, copies of so many requests, answered to nobody"
    )
    steps.add_argument("--hold", metavar="DURATION", help="how long a step lasts (10m)")
    steps.add_argument(
        "--slo",
        metavar="LIMITS",
        help="ttft_p95=1s,error_rate=0.5%% (and always: no worse than the version that serves)",
    )
    steps.add_argument(
        "--min-requests",
        metavar="N",
        type=int,
        default=50,
        help="of each version in a step; it waits up to --timeout more for them (50)",
    )
    steps.add_argument(
        "--canary-replicas", metavar="N", type=int, default=1, help="replicas of the canary (1)"
    )
    steps.add_argument(
        "--sticky",
        choices=("conversation", "client"),
        help="what stays with one version (default: each request for itself)",
    )


def _add_reports(commands: Commands, runs: Mapping[str, Run]) -> None:
    history = commands.add_parser("history", help="what gates, deploys and rollbacks decided")
    history.add_argument("application", nargs="?", metavar="APP", help="this one (default: all)")
    history.add_argument("--address", help="address of the Ray cluster (default: the running one)")
    history.add_argument("--json", action="store_true", help="print one JSON object per entry")
    history.set_defaults(command=runs["history"])

    receipt = commands.add_parser("receipt", help="what each node proved, its license, since when")
    receipt.add_argument("config", type=Path, metavar="CONFIG", help="the Serve YAML")
    receipt.add_argument("--address", help="address of the Ray cluster (default: the running one)")
    receipt.add_argument("--this-node", action="store_true", help="look at this machine alone")
    receipt.add_argument(
        "--json", action="store_true", help="print one JSON object per application"
    )
    receipt.add_argument(
        "--attest", action="store_true", help="print an in-toto statement for each node"
    )
    receipt.set_defaults(command=runs["receipt"])

    digest = commands.add_parser("digest", help="what to write into `model.digest`")
    what = "CONFIG|DIR|URL|REPO[@REV]"
    digest.add_argument("what", metavar=what, help="the model, or its config")
    digest.set_defaults(command=runs["digest"])

    coldstart = commands.add_parser("coldstart", help="where each replica's start spent its time")
    coldstart.add_argument(
        "--address", help="address of the Ray cluster (default: the running one)"
    )
    coldstart.add_argument("--json", action="store_true", help="print one JSON object per start")
    coldstart.set_defaults(command=runs["coldstart"])
