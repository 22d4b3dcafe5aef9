"""Somebody else's application behind the gate by YAML alone, on nodes with tokens of their own."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from scripts.local_hub import Behaviour, LocalHub, Repo
from tests.conftest import TINY_REPO, tiny_files
from tests.integration.conftest import ROOT, LogicalNode, cluster_of
from tests.integration.service import Service

pytestmark = pytest.mark.cluster

BEHAVIOURS = {"a": Behaviour.granted, "b": Behaviour.granted, "c": Behaviour.never_asked, "d": None}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    homes = tmp_path_factory.mktemp("homes")
    with LocalHub([Repo(TINY_REPO, tiny_files())]) as hub:
        tokens = {
            name: hub.issue_token(behaviour) for name, behaviour in BEHAVIOURS.items() if behaviour
        }
        nodes = [
            LogicalNode(name, tokens.get(name), {"is": name}, 0, {"HF_HOME": str(homes / name)})
            for name in BEHAVIOURS
        ]
        with cluster_of(*nodes) as running:
            yield Service(hub, running, tokens)


def app(service, *, first="a", second="b", env=None, revision="${gate.commit}"):
    """Return the application; `first` and `second` are the nodes of its two loaders."""
    options = {
        name: {"label_selector": {"is": f"in({nodes})"}}
        for name, nodes in (("First", first), ("Second", second))
    }
    options["Second"] |= {"runtime_env": {"env_vars": env}} if env else {}
    access = {"endpoint": service.hub.url, "watch_interval_s": 1}
    return {
        "name": "llm",
        "import_path": "serve_app.gate:build",
        "args": {
            "gate": {
                "model": {"repo_id": TINY_REPO},
                "access": access,
                "deployments": ["First", "Second"],
            },
            "app": {
                "import_path": "tests.integration.foreign_apps:two_loaders",
                "args": {"revision": revision, **options},
            },
        },
    }


def rows(text):
    return re.findall(r"^  ([abcd]) +([a-z_]+) +\S+", text, re.MULTILINE)


def roll_out(service, application):
    before = service.builds()
    service.put_app(application)
    return service.wait_for_build(before, "RUNNING", "DEPLOY_FAILED", timeout_s=60)


def command(service, tmp_path, name, *applications, options=()):
    """Run `serve-app NAME` on a file with these applications; returns exit code and output."""
    http = {"host": "127.0.0.1", "port": service.port}
    path = tmp_path / "apps.yaml"
    path.write_text(yaml.safe_dump({"http_options": http, "applications": list(applications)}))
    line = [sys.executable, "-m", "serve_app", name, str(path), *options, "--address"]
    done = subprocess.run(
        [*line, service.cluster.address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_build_asks_each_deployments_own_nodes_and_environment(service, tmp_path):
    """Granted rolls out with the commit in its place; one red row blocks, the old one answers."""
    commit = service.hub.commits()[TINY_REPO]["main"]
    status = roll_out(service, app(service))
    assert status.status == "RUNNING", status.message
    assert httpx.get(service.url).text == f"{commit} {commit}"

    service.hub.clear_log()
    status = roll_out(service, app(service, first="a,b", second="b,c,d"))
    assert status.status == "DEPLOY_FAILED"
    # Both loaders may run on b: their places differ, so it is asked for each.
    assert sorted(rows(status.message)) == [
        ("a", "granted"),
        ("b", "granted"),
        ("b", "granted"),
        ("c", "license_not_accepted"),
        ("d", "no_token"),
    ]
    assert "Traceback" not in status.message
    assert httpx.get(service.url).text == f"{commit} {commit}"

    file = tmp_path / "token"
    file.write_text(service.tokens["a"])
    status = roll_out(service, app(service, second="d", env={"HF_TOKEN_PATH": str(file)}))
    assert status.status == "RUNNING", status.message


def test_check_and_deploy_understand_a_gated_file(service, tmp_path):
    """The same rows without a rollout; deploy goes through the gate and waits until it runs."""
    code, output = command(service, tmp_path, "check", app(service, second="c"))
    assert code == 3, output
    assert rows(output) == [("a", "granted"), ("c", "license_not_accepted")]
    code, output = command(service, tmp_path, "check", app(service, second="a,b"))
    assert code == 0, output
    code, output = command(service, tmp_path, "deploy", app(service, second="c"))
    assert code == 3, output
    code, output = command(service, tmp_path, "deploy", app(service, second="a,b"))
    assert code == 0, output
    code, output = command(service, tmp_path, "deploy", app(service) | {"args": {"gate": {}}})
    assert code == 2
    assert "args.gate.model: Field required" in output


def test_prefetch_fetches_the_weights_before_the_rollout(service, tmp_path):
    """On every node, once from the Hub; the directory goes into the args if it is one for all."""
    commit = service.hub.commits()[TINY_REPO]["main"]
    code, output = command(service, tmp_path, "prefetch", app(service, second="c"))
    assert code == 3, output
    application = app(service, second="b")
    code, output = command(service, tmp_path, "prefetch", application, options=["--json"])
    assert code == 0, output
    nodes = [json.loads(line) for line in output.splitlines() if '"directory"' in line]
    assert len(nodes) == 2
    (size,) = {node["hub_bytes"] + node["peer_bytes"] for node in nodes}
    assert sum(node["hub_bytes"] for node in nodes) == size
    assert all(node["directory"].endswith(f"snapshots/{commit}") for node in nodes)

    # A second time, as a part of the rollout, nothing moves.
    code, output = command(service, tmp_path, "deploy", application, options=["--prefetch"])
    assert code == 0, output
    still = rf"0 bytes fetched, 0 from other nodes, {size:,} were there"
    assert len(re.findall(still, output)) == 2

    status = roll_out(service, app(service, revision="${gate.path}"))
    assert status.status == "DEPLOY_FAILED"
    assert "different directories" in status.message
    status = roll_out(service, app(service, second="a", revision="${gate.path}"))
    assert status.status == "RUNNING", status.message
    path = httpx.get(service.url).text.split()[0]
    assert (Path(path) / "config.json").is_file()


def test_watch_sees_a_lost_grant_and_restarts_nothing(service, tmp_path):
    """The watch is an application of its own; the history has both turns."""
    watching = {
        "name": "grants",
        "import_path": "serve_app.gate:watch",
        "route_prefix": "/grants",
        "args": {"application": "llm"},
    }
    code, output = command(service, tmp_path, "deploy", app(service), watching)
    assert code == 0, output

    def outcomes():
        nodes = httpx.get(f"{service.url}/grants/access", timeout=30).json()["nodes"]
        return {node["node_name"]: node["outcome"] for node in nodes}

    def until(wanted):
        deadline = time.monotonic() + 40
        while outcomes() != wanted and time.monotonic() < deadline:
            time.sleep(0.5)
        assert outcomes() == wanted

    until({"a": "granted", "b": "granted"})
    replicas = httpx.get(service.url).text
    service.hub.set_behaviour(service.tokens["b"], Behaviour.pending)
    until({"a": "granted", "b": "request_pending"})
    assert httpx.get(service.url).text == replicas
    service.hub.set_behaviour(service.tokens["b"], Behaviour.granted)
    until({"a": "granted", "b": "granted"})
    line = [sys.executable, "-m", "serve_app", "history", "--address", service.cluster.address]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert re.search(r"llm .*access_lost .*b", shown.stdout)
    assert re.search(r"llm .*access_regained .*b", shown.stdout)


def test_watch_sees_a_replaced_token_file_within_seconds(service, tmp_path):
    """Beside it no process of ours runs on the nodes; the next round is 15 minutes away."""
    token = tmp_path / "token"
    token.write_text(service.tokens["a"])
    gated = app(service)
    access = {"token_file": str(token), "watch_interval_s": 900}
    gated["args"]["gate"]["access"] |= access
    watching = {
        "name": "tokens",
        "import_path": "serve_app.gate:watch",
        "route_prefix": "/tokens",
        "args": {"application": "llm"},
    }
    code, output = command(service, tmp_path, "deploy", gated, watching)
    assert code == 0, output

    def outcomes():
        nodes = httpx.get(f"{service.url}/tokens/access", timeout=30).json()["nodes"]
        return {node["outcome"] for node in nodes}

    assert outcomes() == {"granted"}
    token.write_text(service.hub.issue_token(Behaviour.expired))
    began = time.monotonic()
    while outcomes() != {"expired_token"} and time.monotonic() - began < 30:
        time.sleep(0.2)
    assert outcomes() == {"expired_token"}
    assert time.monotonic() - began < 15
    line = [sys.executable, "-m", "serve_app", "history", "--address", service.cluster.address]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert re.search(r"llm .*token_changed", shown.stdout)
