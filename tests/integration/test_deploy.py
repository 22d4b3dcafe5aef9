"""`serve-app deploy`: what is red never reaches Serve, what fails goes back, nobody notices."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import ray
import yaml
from ray.serve.context import _get_global_client

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.cli.main import main
from serve_app.cluster.controller import replicas
from serve_app.errors import ConfigError
from serve_app.rollout.lock import rollout_lock
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import What, whoami
from tests.integration.conftest import ONE_TRY, LogicalNode, cluster_of
from tests.integration.service import REPO, SERVING, Service

pytestmark = pytest.mark.cluster
BROKEN = "acme/broken"


@pytest.fixture(scope="module")
def service(demo_model_dir, tmp_path_factory):
    """Two nodes, and a second repository whose tokenizer is not one."""
    broken = tmp_path_factory.mktemp("hub") / "broken"
    shutil.copytree(demo_model_dir, broken)
    (broken / "tokenizer.json").write_text("{}")
    repos = [
        Repo.from_dir(REPO, demo_model_dir, gated="manual"),
        Repo.from_dir(BROKEN, broken, gated="manual"),
    ]
    with LocalHub(repos) as hub:
        tokens = {name: hub.issue_token(Behaviour.granted, account=name) for name in ("a", "b")}
        env = {"HF_HOME": str(tmp_path_factory.mktemp("home"))}  # nobody fetched anything there
        nodes = [
            LogicalNode(name, token, SERVING, num_gpus=0, env=env) for name, token in tokens.items()
        ]
        with cluster_of(*nodes, head_cpus=1, env=ONE_TRY) as running:
            yield Service(hub, running, tokens)


@pytest.fixture
def deploy(service, tmp_path, capsys):
    """Write a config and deploy it as a person does; returns exit code, last line, progress."""

    def run(*options, command="deploy", repo_id=REPO, **config):
        app = service.config(**config)
        app["args"]["model"]["repo_id"] = repo_id
        path = tmp_path / "app.yaml"
        http = {"host": "127.0.0.1", "port": service.port}
        path.write_text(yaml.safe_dump({"http_options": http, "applications": [app]}))
        given = [str(path)] if command == "deploy" else []
        code = main([command, *given, "--timeout", "3m", *options])
        shown = capsys.readouterr()
        return code, "".join(shown.out.strip().splitlines()[-1:]), shown.err

    return run


def test_deploy_good_blocked_and_failing_loses_no_request(service, deploy, demo_model_dir):
    """Four deploys under load: the version that served answers every request of each."""
    code, _, progress = deploy("--dry-run", replicas=1)
    assert code == 0
    assert "llm: new" in progress
    weights = sum(file.stat().st_size for file in demo_model_dir.iterdir())
    for name in "ab":
        needed = int(re.search(rf"llm: {name}: ([\d,]+) bytes", progress)[1].replace(",", ""))
        assert 0.9 * weights < needed <= weights
    assert deploy(command="rollback")[0] == 2

    code, end, progress = deploy(replicas=1)
    assert (code, end.split(",")[0]) == (0, "done: every application runs and answered")
    assert "llm: RUNNING" in progress
    assert re.search(r"llm: (\w+): download\n(.*\n)*llm: \1: load\n", progress)

    with service.under_load() as answered:
        code, end, progress = deploy("--json", replicas=1, access={"timeout_s": 4})
        assert code == 0
        assert json.loads(end)["status"] == "done"
        assert "llm: changes args" in progress
        assert "has the weights" in progress
    assert set(answered) == {200}

    with service.under_load() as answered:
        service.hub.set_behaviour(service.tokens["b"], Behaviour.never_asked)
        builds = service.builds()
        code, _, _ = deploy(replicas=1, access={"timeout_s": 3})
        assert code == 3
        assert service.builds() == builds, "Serve was touched"
        service.hub.set_behaviour(service.tokens["b"], Behaviour.granted)
    assert set(answered) == {200}

    with service.under_load() as answered:
        code, end, progress = deploy("--json", repo_id=BROKEN, replicas=1)
        result = json.loads(end)
        assert (code, result["status"]) == (5, "rolled_back")
        assert "tokenizer" in result["reason"]
        assert "going back" in progress
    assert len(answered) > 10
    assert set(answered) == {200}
    assert service.wait("RUNNING").status == "RUNNING"
    assert {state for state, _ in service.replicas()} == {"RUNNING"}


def test_rollout_totals_count_how_each_ended(service):
    """Also of those that left no replica; each gate of a build too, and the commit that serves."""
    totals = rollout_history.totals("llm")
    assert {what: totals[what].count for what in totals if what != What.APPROVED} == {
        What.BLOCKED: 1,
        What.DONE: 2,
        What.ROLLED_BACK: 1,
    }
    assert totals[What.APPROVED].count >= 3
    commit = service.hub.commits()[REPO]["main"]
    expected = [
        r'rollouts_total\{[^}]*result="blocked"[^}]*\} 1\.0',
        r'rollouts_total\{[^}]*result="rolled_back"[^}]*\} 1\.0',
        r'rollout_last_timestamp_seconds\{[^}]*result="done"[^}]*\} 1\.\d+e\+09',
        rf'model_info\{{[^}}]*commit="{commit}"[^}}]*\}} 1\.0',
    ]
    deadline = time.monotonic() + 40  # Ray exports every 10 s
    while missing := [each for each in expected if not re.search(each, service.metrics())]:
        assert time.monotonic() < deadline, missing
        time.sleep(1)


def test_history_shows_who_decided_what_and_why(service, capsys):
    """In order, with the commit and the config of each; the build's gate is an entry of its own."""
    assert main(["history", "llm", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    decided = [entry for entry in found if entry["who"] != "build"]
    assert [entry["what"] for entry in decided] == ["done", "done", "blocked", "rolled_back"]
    assert {entry["who"] for entry in decided} == {whoami()}
    blocked, failed = decided[2:]
    assert blocked["why"].startswith("Access BLOCKED: 1 of 2 nodes cannot read")
    assert "tokenizer" in failed["why"]
    built = [entry for entry in found if entry["who"] == "build"]
    assert {entry["what"] for entry in built} == {"approved"}
    assert built[0]["config_hash"] == decided[0]["config_hash"]
    assert built[0]["commit"] == decided[0]["commit"] == service.hub.commits()[REPO]["main"]
    assert len({entry["config_hash"] for entry in decided}) == 4
    assert [entry["at"] for entry in found] == sorted(entry["at"] for entry in found)
    assert not any(token in json.dumps(found) for token in service.tokens.values())


def test_rollback_goes_to_what_served_before(service, deploy):
    """Under load, to the first of the configs above, and never forward again to the worse one."""
    with service.under_load() as answered:
        code, end, progress = deploy(command="rollback")
        assert (code, end.split(",")[0]) == (0, "done: every application runs and answered")
        assert "going back to the config that served since" in progress
    assert set(answered) == {200}
    assert serving_access() == {"endpoint": service.hub.url}
    code, _, progress = deploy(command="rollback")
    assert (code, "no earlier config" in progress) == (2, True), "went to the worse one again"


def serving_access():
    """Return what the config that serves says of access."""
    applications = ray.get(_get_global_client()._controller.get_serve_instance_details.remote())[
        "applications"
    ]
    return applications["llm"]["deployed_app_config"]["args"]["access"]


def test_deploy_stops_watching_alone_at_ctrl_c(service, tmp_path):
    """What was applied goes on, and what serves meanwhile answers every request."""
    app = service.config(replicas=1, access={"timeout_s": 3.5})
    path = tmp_path / "app.yaml"
    path.write_text(yaml.safe_dump({"applications": [app]}))
    address = ray.get_runtime_context().gcs_address
    with service.under_load() as answered:
        watching = subprocess.Popen(
            [sys.executable, "-m", "serve_app", "deploy", str(path), "--address", address],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert any("llm: DEPLOYING" in line for line in watching.stderr)
        watching.send_signal(signal.SIGINT)
        _, rest = watching.communicate(timeout=30)
        assert watching.returncode == 130
        assert rest.endswith("no longer watching; what was applied goes on\n")
        deadline = time.monotonic() + 60
        while (
            len(replicas("llm", timeout_s=10)["LLMServer"]) == 1
        ):  # the new one has begun to start
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert serving_access() == app["args"]["access"]
    assert set(answered) == {200}


def test_deploy_holds_the_lock_of_one_rollout_at_a_time(service, deploy):
    """The second sees who holds the lock; a holder that is killed holds it no more."""
    with rollout_lock():
        code, _, output = deploy(replicas=1)
    assert code == 2
    assert f"another rollout is under way: {whoami()} (process" in output

    script = (
        "import time\nwith deploy.connected(sys.argv[1]), rollout_lock():\n print(1, flush=True)"
    )
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom serve_app.cli import deploy\n"
            f"from serve_app.rollout.lock import rollout_lock\n{script}\n time.sleep(99)",
            ray.get_runtime_context().gcs_address,
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(ConfigError, match=f"process {holder.pid}"), rollout_lock():
        pass
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with rollout_lock():
                return
        except ConfigError:
            time.sleep(0.2)
    raise AssertionError("a killed rollout still holds the lock")
