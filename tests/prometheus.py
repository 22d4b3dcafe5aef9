"""A real Prometheus for tests, and the question which panels of the dashboard stay empty."""

import contextlib
import json
import math
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from tests.ports import free_port

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "configs" / "grafana" / "serve-app.json"
RULES = ROOT / "configs" / "prometheus" / "rules.yaml"
SCRAPE_S = 1
SCRAPES = 6  # in Grafana's $__rate_interval, which has four and more
START_TIMEOUT_S = 30


@contextlib.contextmanager
def prometheus(url, state):
    """Run a Prometheus that scrapes a service and judges its alerts; yields its address.

    Args:
        url: of the service.
        state: an empty directory for its files.
    """
    pace = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    job = {"job_name": "serve-app", "static_configs": [{"targets": [urlsplit(url).netloc]}]}
    config = {"global": pace, "rule_files": [str(RULES)], "scrape_configs": [job]}
    (state / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={state / 'prometheus.yaml'}",
        f"--storage.tsdb.path={state / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (state / "prometheus.log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        await_ready(f"http://{address}", child)
        yield f"http://{address}"
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            child.kill()


def await_ready(address, child):
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and child.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{address}/-/ready", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"{address} was not ready within {START_TIMEOUT_S} s")


def rule_groups(address):
    """Return the groups of rules with the health of each rule, as Prometheus describes them."""
    return ask(address, "rules", {})["groups"]


def without_data(address, begun):
    """Evaluate every expression of the dashboard; return the panels and alerts without data.

    Args:
        address: of the Prometheus.
        begun: Unix seconds; what was seen before does not count.

    Raises:
        urllib.error.HTTPError: an expression that Prometheus refuses.
    """
    empty = {
        panel["title"]: target["expr"]
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel.get("targets", ())
        if not numbers(address, target["expr"], begun)
    }
    unhealthy = {
        rule["name"]: rule["health"]
        for group in rule_groups(address)
        for rule in group["rules"]
        if rule["health"] != "ok"
    }
    return empty | unhealthy


def numbers(address, expression, begun):
    """Return the numbers of all series since then; NaN, the quotient of nothing, is none."""
    query = expression.replace("$__rate_interval", f"{SCRAPE_S * SCRAPES}s")
    wanted = {"query": query, "start": begun, "end": time.time(), "step": SCRAPE_S}
    series = ask(address, "query_range", wanted)["result"]
    values = [float(value) for found in series for _, value in found["values"]]
    return [value for value in values if not math.isnan(value)]


def ask(address, path, parameters):
    url = f"{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["data"]
