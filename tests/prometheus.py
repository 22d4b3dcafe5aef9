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
SCRAPE_S = 5
SCRAPES = 6  # in Grafana's $__rate_interval, which has four and more
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
        address = stack.enter_context(prometheus(url, state))
        _load(url, options.seconds)
        # The last half alone: what was seen only once, at the start, is gone when it is needed.
        empty = without_data(address, time.time() - options.seconds / 2)
    if empty:
        print(f"error: no data for {', '.join(empty)}", file=sys.stderr)
    return int(bool(empty))


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
def prometheus(url: str, state: Path, scrape_s: int = SCRAPE_S) -> Iterator[str]:
    """Run a Prometheus that scrapes a service and judges its alerts; yields its address.

    Args:
        url: of the service.
        state: an empty directory for its files.
        scrape_s: seconds between two scrapes.
    """
    target = {"targets": [urlsplit(url).netloc]}
    pace = {"scrape_interval": f"{scrape_s}s", "evaluation_interval": f"{scrape_s}s"}
    job = {"job_name": "serve-app", "static_configs": [target]}
    config = {"global": pace, "rule_files": [str(RULES)], "scrape_configs": [job]}
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


def without_data(address: str, begun: float, scrape_s: int = SCRAPE_S) -> list[str]:
    """Put every expression of the dashboard; return the panels and alerts that show nothing.

    Args:
        address: of the Prometheus.
        begun: Unix seconds; what was seen before does not count.
        scrape_s: seconds between its scrapes.

    Raises:
        urllib.error.HTTPError: an expression that it does not take.
    """
    empty = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", f"{scrape_s * SCRAPES}s")
            values = _values(address, query, begun, scrape_s)
            shown = f"highest {max(values):.4g}" if values else "NO DATA"
            if not values:
                empty.append(panel["title"])
            print(f"{panel['title']:32} {target.get('legendFormat', ''):14} {shown}")
    for rule in _ask(address, "rules", {})["groups"][0]["rules"]:
        print(f"alert {rule['name']:26} {rule['health']}, {rule['state']}")
        if rule["health"] != "ok":
            empty.append(rule["name"])
    return list(dict.fromkeys(empty))


def _values(address: str, query: str, begun: float, step_s: int) -> list[float]:
    """Return the numbers of all series since then; NaN, the quotient of nothing, is none."""
    asked = {"query": query, "start": begun, "end": time.time(), "step": step_s}
    series = _ask(address, "query_range", asked)["result"]
    values = [float(value) for found in series for _, value in found["values"]]
    return [value for value in values if not math.isnan(value)]


def _ask(address: str, path: str, asked: dict[str, Any]) -> Any:
    url = f"{address}/api/v1/{path}?{urllib.parse.urlencode(asked)}"
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - loopback
        return json.load(answer)["data"]


if __name__ == "__main__":
    sys.exit(main())
