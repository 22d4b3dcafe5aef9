"""`python -m scripts.local_hub`: the loopback Hub as a process of its own."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from scripts.local_hub import Behaviour, LocalHub, Repo, fingerprint
from scripts.local_hub.control import read_or_issue
from scripts.local_hub.model import DemoModelError, build_demo_model, default_cache_dir
from scripts.local_hub.repos import Gated

UNUSABLE_EXIT = 2


class Unusable(Exception):
    """The Hub cannot start; the message names the fix."""


def main() -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit code."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        return _run(_parser().parse_args(), stop)
    except (Unusable, DemoModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE_EXIT


def _run(options: argparse.Namespace, stop: threading.Event) -> int:
    directory = options.model_dir or build_demo_model(default_cache_dir(), progress=_say)
    if not directory.is_dir():
        raise Unusable(f"{directory} is not a directory; --model-dir names one that holds a model")
    gated: Gated = False if options.gated == "no" else options.gated
    repo = Repo.from_dir(options.repo_id, directory, gated=gated)
    hub = LocalHub([repo], port=options.port, cdn_port=options.cdn_port, tls=options.tls)
    try:
        hub.start()
    except OSError as error:
        ports = f"{options.port} (--port) or {options.cdn_port} (--cdn-port)"
        raise Unusable(f"cannot listen on port {ports}: {error.strerror}") from error
    try:
        _serve(hub, options, stop)
    finally:
        hub.stop()
    return 0


def _serve(hub: LocalHub, options: argparse.Namespace, stop: threading.Event) -> None:
    _say(f"hub: {hub.url} (weights: {hub.cdn_url})")
    _say(f"repository: {options.repo_id}, gated: {options.gated}")
    if options.token_file is not None:
        token = read_or_issue(hub, options.token_file)
        hub.issue_token(options.behaviour, options.account, value=token)
        _say(f"token: {fingerprint(token)} in {options.token_file}, {options.behaviour}")
    _say("ready; Ctrl-C stops it")
    stop.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.local_hub", description=__doc__)
    add = parser.add_argument
    add("--port", type=int, default=8090, help="port of the Hub (8090); 0 takes a free one")
    add("--cdn-port", type=int, default=0, help="port that weights come from (a free one)")
    add("--model-dir", type=Path, help="directory to serve (default: the demo model, made once)")
    add("--repo-id", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="its name on the Hub")
    add("--gated", choices=("auto", "manual", "no"), default="manual", help="the gate (manual)")
    add("--token-file", type=Path, help="a token to know; written (0600) if it does not exist")
    add("--account", default="alice", help="the token's user (alice)")
    add(
        "--behaviour",
        type=Behaviour,
        choices=list(Behaviour),
        default=Behaviour.granted,
        help="how the Hub treats the token (granted); PUT /_local/tokens switches it",
    )
    add("--tls", type=Path, nargs=2, metavar=("CERT", "KEY"), help="serve https")
    return parser


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
