"""Two cold starts of the application: where the bytes came from, where the time went."""

import json
import re
import subprocess
import sys
import time

import pytest

from scripts.local_hub import LocalHub, Repo
from tests.integration.conftest import ROOT, cluster_of
from tests.integration.homes import make_homes, nodes_at_home
from tests.integration.service import QUESTION, REPO, Service

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def service(demo_model_dir, tmp_path_factory):
    """The application on two nodes with a cache each."""
    homes = make_homes("ab", tmp_path_factory.mktemp("homes"))
    with (
        LocalHub([Repo.from_dir(REPO, demo_model_dir, gated="manual")]) as hub,
        cluster_of(*nodes_at_home(hub, homes)) as running,
    ):
        service = Service(hub, running, {})
        service.deploy(replicas=2)
        deadline = time.monotonic() + 30
        while len(service.logged("replica.started", "LLMServer")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield service


def test_weights_fetched_by_one_node_are_shared(service):
    """Each node has all, the Hub sent it once; both answer with it."""
    sent = [entry for entry in service.hub.log if entry.origin != "hub" and entry.bytes_sent > 9]
    assert len(sent) == 1
    started = service.logged("replica.started", "LLMServer")
    assert len(started) == 2
    (size,) = {line["hub"] + line["peer"] for line in started}
    assert sum(line["hub"] for line in started) == size > 250e6
    with service.client() as client:
        for _ in range(8):
            answer = client.chat.completions.create(
                model="smol", messages=QUESTION, max_tokens=8, temperature=0
            )
            assert "Paris" in answer.choices[0].message.content


def test_coldstart_shows_every_start(service):
    """`coldstart --json` has each replica's phases, which cover the time until it was ready."""
    starts = [json.loads(line) for line in run_coldstart(service, "--json").splitlines()]
    assert {start["node"] for start in starts} == {"a", "b"}
    for start in starts:
        phases = {span["phase"]: span for span in start["spans"]}
        wanted = {"imports", "check", "download", "libraries", "weights", "assemble", "warm_up"}
        assert wanted <= set(phases)
        beside = ("libraries", "first_token")
        covered = sum(span["duration_s"] for name, span in phases.items() if name not in beside)
        # Between two phases the process may have to wait for a core.
        slack_s = 0.5 + 0.05 * start["ready_s"]
        assert -0.5 < start["ready_s"] - covered < slack_s + phases["libraries"]["duration_s"]
        assert phases["libraries"]["at_s"] < phases["download"]["at_s"] + 0.5
    answered = [start for start in starts if start["spans"][-1]["phase"] == "first_token"]
    assert answered
    assert all(start["spans"][-1]["at_s"] > start["ready_s"] for start in answered)
    assert re.search(r" hub 2\d\d,\d{3},\d{3} ", run_coldstart(service))


def run_coldstart(service, *options):
    """Run the command as a person does, from outside the cluster."""
    command = [sys.executable, "-m", "serve_app", "coldstart", "--address", service.cluster.address]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metrics_count_the_hubs_bytes(service):
    """Prometheus has the bytes by source and the seconds by phase; Ray pushes them every 10 s."""
    deadline = time.monotonic() + 40
    while not all(f'source="{name}"' in service.metrics() for name in ("hub", "peer")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    lines = service.metrics().splitlines()
    moved = [line for line in lines if line.startswith("ray_serve_app_weights_bytes_total{")]
    by_source = {
        source: sum(float(line.split()[-1]) for line in moved if f'source="{source}"' in line)
        for source in ("hub", "peer", "cache")
    }
    assert by_source["hub"] == by_source["peer"] > 250e6
    assert by_source["cache"] == 0
    phases = [line for line in lines if line.startswith("ray_serve_app_cold_start_seconds{")]
    assert any('phase="download"' in line for line in phases)
