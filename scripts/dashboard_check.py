"""Does every panel of the dashboard have data under load? Asked of a real Prometheus.

Starts the quickstart (or takes the URL of a running service), lets Prometheus scrape its
`/metrics` with the rules of configs/, drives `serve-app loadtest`, then puts every expression
of the dashboard. Exits with 1 and the names of the panels that stayed empty.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "configs" / "grafana" / "serve-app.json"
RULES = ROOT / "configs" / "prometheus" / "rules.yaml"
RATE_INTERVAL = "30s"  # Grafana's: four scrapes and more
START_TIMEOUT_S = 240


def main() -> int:
    """Run the check and return its exit code."""
    parser = argparse.ArgumentParser(prog="scripts.dashboard_check", description=__doc__)
    parser.add_argument("url", nargs="?", help="of a running service (default: the quickstart)")
    parser.add_argument("--seconds", type=int, default=60, help="of load (60)")
    options = parser.parse_args()
    if not shutil.which("prometheus"):
        parser.error("prometheus is not installed here")
    with contextlib.ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = options.url or stack.enter_context(_quickstart())
        prometheus = stack.enter_context(_prometheus(url, state))
        _load(url, options.seconds)
        # The last half alone: what was seen only once, at the start, is gone when it is needed.
        return _judge(prometheus, time.time() - options.seconds / 2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _quickstart() -> Iterator[str]:
    port = _free_port()
    command = [sys.executable, "-m", "scripts.quickstart_demo", "--port", str(port)]
    child = subprocess.Popen(
        [*command, "--hub-port", str(_free_port())], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        _await(f"http://127.0.0.1:{port}/ready", child)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(child)


@contextlib.contextmanager
def _prometheus(url: str, state: Path) -> Iterator[str]:
    target = {"targets": [urlsplit(url).netloc]}
    job = {"job_name": "serve-app", "scrape_interval": "5s", "static_configs": [target]}
    config = {"rule_files": [str(RULES)], "scrape_configs": [job]}
    (state / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{_free_port()}"
    with (state / "prometheus.log").open("wb") as log:
        child = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={state / 'prometheus.yaml'}",
                f"--storage.tsdb.path={state / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _await(f"http://{address}/-/ready", child)
        yield f"http://{address}"
    finally:
        _stop(child)


def _await(url: str, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and child.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(url, timeout=5) as answer,  # noqa: S310 - loopback
        ):
            if answer.status == 200:
                return
        time.sleep(1)
    raise SystemExit(f"error: {url} was not ready within {START_TIMEOUT_S} s")


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGINT)
    try:
        child.wait(timeout=60)
    except subprocess.TimeoutExpired:
        child.kill()


def _load(url: str, seconds: int) -> None:
    """Ask with two clients and prompts that share words, and once a second for nothing.

    The load's table is printed; what asks for nothing is refused, so that failures are seen.
    """
    shape = ["--prompt-tokens", "64", "--output-tokens", "16", "--concurrency", "2"]
    command = [sys.executable, "-m", "serve_app", "loadtest", url, *shape]
    with subprocess.Popen([*command, "--duration", str(seconds)], cwd=ROOT) as load:
        while load.poll() is None:
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(  # noqa: S310 - loopback
                    f"{url}/v1/completions", data=b"{}", timeout=30
                ).close()
            time.sleep(1)
    if load.returncode:
        raise SystemExit(f"error: the load test ended with {load.returncode}")


def _judge(prometheus: str, begun: float) -> int:
    empty = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            values = _values(prometheus, target["expr"], begun)
            shown = f"highest {max(values):.4g}" if values else "NO DATA"
            if not values:
                empty.append(panel["title"])
            print(f"{panel['title']:32} {target.get('legendFormat', ''):14} {shown}")
    for rule in _ask(prometheus, "rules", {})["groups"][0]["rules"]:
        print(f"alert {rule['name']:26} {rule['health']}, {rule['state']}")
        if rule["health"] != "ok":
            empty.append(rule["name"])
    if empty:
        print(f"error: no data for {', '.join(dict.fromkeys(empty))}", file=sys.stderr)
    return int(bool(empty))


def _values(prometheus: str, expression: str, begun: float) -> list[float]:
    """Return the numbers of all series since then; NaN, the quotient of nothing, is none."""
    query = expression.replace("$__rate_interval", RATE_INTERVAL)
    asked = {"query": query, "start": begun, "end": time.time(), "step": 5}
    series = _ask(prometheus, "query_range", asked)["result"]
    values = [float(value) for found in series for _, value in found["values"]]
    return [value for value in values if not math.isnan(value)]


def _ask(prometheus: str, path: str, asked: dict[str, Any]) -> Any:
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(asked)}"
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - loopback
        return json.load(answer)["data"]


if __name__ == "__main__":
    sys.exit(main())
