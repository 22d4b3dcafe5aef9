"""The quickstart: a loopback Hub with a gated model, and `serve run configs/quickstart.yaml`.

Everything it starts is its own and stops with it: the Hub is a thread, Ray an instance of its
own on 127.0.0.1, `serve run` a child. The Hugging Face cache and token of the user are not
touched, and a second quickstart on other ports shares nothing with the first but the demo model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scripts.quickstart_state import Failure, State, hold, write_secret

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
STATE = "~/.cache/serve-app/quickstart"
STOPPING = [signal.SIGINT, signal.SIGTERM]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
    STOPPING.append(signal.SIGHUP)
# Runs a program that Linux kills when we are killed, as Ray does it for its own processes.
ENDS_WITH_US = """\
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
os.execv(sys.argv[1], sys.argv[1:])
"""
START_TIMEOUT_S = 600
BLOCKED_EXIT = 3


def main() -> int:
    """Run the demo and return its exit code."""
    options = _options()
    _stop_by_signal()
    try:
        with contextlib.ExitStack() as stack:
            return _run(options, stack)
    except KeyboardInterrupt:
        say("Stopped everything that was started.")
        return 130
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2


def _stop_by_signal() -> None:
    """Stop in order at Ctrl-C, SIGTERM and a closed terminal, once.

    A shell may have started us with SIGINT ignored; and a second Ctrl-C while everything stops
    would leave something running.
    """

    def stop(_number: int, _frame: object) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in STOPPING:
        signal.signal(number, stop)


def say(text: str) -> None:
    """Print one progress line at once."""
    print(text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--port", type=_port, default=8000, help="port of the API (8000)")
    parser.add_argument(
        "--hub-port", type=_port, default=8090, help="port of the loopback Hub (8090)"
    )
    parser.add_argument(
        "--once", action="store_true", help="ask one question, print the answer, stop"
    )
    parser.add_argument(
        "--deny",
        action="store_true",
        help="use a token without the license: the rollout is blocked",
    )
    options = parser.parse_args()
    if options.port == options.hub_port:
        parser.error("--port and --hub-port have to be two ports")
    return options


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not a port (1 to 65535)")
    return port


def _run(options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    state = stack.enter_context(hold(Path(STATE).expanduser(), port=options.port))
    for flag, port in (("--port", options.port), ("--hub-port", options.hub_port)):
        _require_free(port, flag)
    config_path, config = _config(options, state)
    args = config["applications"][0]["args"]
    hub, token = _start_hub(options, args["model"]["repo_id"], stack)
    write_secret(state.token, token)

    environment = state.environment()
    address = _start_ray(environment, stack)
    say(f"[3/3] serve run {config_path}")
    serve = stack.enter_context(_serve_run(config_path, address, environment, state.log))
    status = _wait(serve, state.log)
    if status.status == "RUNNING":
        return _talk(options, args["model"]["served_name"])
    say(f"\nThe rollout was blocked:\n\n{status.message}\n")
    weights = sum(request.bytes_sent for request in hub.log if request.origin != "hub")
    say(f"The Hub saw {len(hub.log)} requests; {weights} bytes of weights were sent.")
    return BLOCKED_EXIT


def _require_free(port: int, flag: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Failure(f"port {port} is taken; choose another one with {flag}.") from error


def _config(options: argparse.Namespace, state: State) -> tuple[Path, dict[str, Any]]:
    """Return the config as it is, or a copy for other ports in their folder."""
    config = yaml.safe_load(CONFIG.read_text())
    access = config["applications"][0]["args"]["access"]
    endpoint = f"http://127.0.0.1:{options.hub_port}"
    if (config["http_options"]["port"], access["endpoint"]) == (options.port, endpoint):
        is_here = CONFIG.is_relative_to(Path.cwd())
        return CONFIG.relative_to(Path.cwd()) if is_here else CONFIG, config
    config["http_options"]["port"] = options.port
    access |= {"endpoint": endpoint, "token_file": str(state.token)}
    state.config.write_text(yaml.safe_dump(config, sort_keys=False))
    return state.config, config


def _start_hub(
    options: argparse.Namespace, repo_id: str, stack: contextlib.ExitStack
) -> tuple[Any, str]:
    from scripts.local_hub import Behaviour, LocalHub, Repo  # noqa: PLC0415 (after the port check)
    from scripts.local_hub.model import build_demo_model, default_cache_dir  # noqa: PLC0415

    say("[1/3] the demo model, SmolLM2-135M-Instruct in bf16 (made once, then cached)")
    directory = build_demo_model(default_cache_dir(), progress=say)
    repo = Repo.from_dir(repo_id, directory, gated="manual")
    hub = LocalHub([repo], port=options.hub_port)
    stack.enter_context(hub)
    behaviour = Behaviour.never_asked if options.deny else Behaviour.granted
    token = hub.issue_token(behaviour, account="demo", value="hf_" + secrets.token_hex(17))
    say(f"      the Hub is at {hub.url}; {repo_id} is gated there")
    return hub, token


def _start_ray(environment: dict[str, str], stack: contextlib.ExitStack) -> str:
    say("[2/3] a Ray instance of its own")
    os.environ.clear()
    os.environ.update(environment)
    import ray  # noqa: PLC0415 (reads its environment when imported)

    stack.callback(ray.shutdown)  # also of what a Ctrl-C leaves half started
    context: Any = ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 1),
        num_gpus=0,
        include_dashboard=True,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    _stop_by_signal()  # Ray has put its own in place
    return str(context.address_info["gcs_address"])


@contextlib.contextmanager
def _serve_run(
    config: Path, address: str, environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(Path(sys.executable).parent / "serve"), "run", str(config)]
    if sys.platform == "linux":
        command = [sys.executable, "-c", ENDS_WITH_US, *command]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            env={**environment, "RAY_ADDRESS": address},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # our Ctrl-C is not its; it gets its signals in order below
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            child.kill()


def _wait(serve_run: subprocess.Popen[bytes], log: Path) -> Any:
    """Wait until the application runs or is refused; returns its last status."""
    from ray import serve  # noqa: PLC0415 (after Ray's environment is set)

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if serve_run.poll() is not None:
            raise Failure(f"serve run ended by itself:\n{log.read_text(errors='replace')[-2000:]}")
        application = serve.status().applications.get("llm")
        if application and application.status in ("RUNNING", "DEPLOY_FAILED"):
            return application
        time.sleep(0.25)
    raise Failure(f"the application was not ready after {START_TIMEOUT_S} s; see {log}")


def _talk(options: argparse.Namespace, model: str) -> int:
    url = f"http://127.0.0.1:{options.port}/v1/chat/completions"
    question = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 64,
    }
    if options.once:
        say(_ask(url, question))
        return 0
    say(f"\nReady. Ask it something:\n\n  curl {url} \\")
    say(f"    -H 'content-type: application/json' \\\n    -d '{json.dumps(question)}'\n")
    say("Ctrl-C stops everything.")
    while True:
        time.sleep(3600)


def _ask(url: str, question: dict[str, Any]) -> str:
    request = urllib.request.Request(  # noqa: S310 (a fixed loopback URL)
        url, json.dumps(question).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise Failure(f"the API answered {error.code}: {error.read().decode()}") from error
    return str(answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    sys.exit(main())
