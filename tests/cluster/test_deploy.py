"""`serve-app deploy`: what is red never reaches Serve, what fails goes back, nobody notices."""

import json
import shutil

import pytest
import yaml

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.__main__ import main
from tests.cluster.conftest import LogicalNode, cluster_of
from tests.cluster.service import REPO, SERVING, Service

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
        nodes = [LogicalNode(name, token, SERVING, num_gpus=0) for name, token in tokens.items()]
        with cluster_of(*nodes, head_cpus=1) as running:
            yield Service(hub, running, tokens)


@pytest.fixture
def deploy(service, tmp_path, capsys):
    """Write a config and deploy it as a person does; returns exit code, last line, progress."""

    def run(*options, repo_id=REPO, **config):
        app = service.config(**config)
        app["args"]["model"]["repo_id"] = repo_id
        path = tmp_path / "app.yaml"
        http = {"host": "127.0.0.1", "port": service.port}
        path.write_text(yaml.safe_dump({"http_options": http, "applications": [app]}))
        code = main(["deploy", str(path), "--timeout", "3m", *options])
        shown = capsys.readouterr()
        return code, shown.out.strip().splitlines()[-1], shown.err

    return run


def test_good_blocked_and_failing_rollouts_lose_no_request(service, deploy):
    """Four deploys under load: the version that served answers every request of each."""
    code, _, progress = deploy("--dry-run", replicas=1)
    assert code == 0
    assert "llm: new" in progress

    code, end, progress = deploy(replicas=1)
    assert (code, end.split(",")[0]) == (0, "done: every application runs and answered")
    assert "llm: RUNNING" in progress

    with service.under_load() as answered:
        code, end, progress = deploy("--json", replicas=1, access={"timeout_s": 4})
        assert code == 0
        assert json.loads(end)["status"] == "done"
        assert "llm: changes args" in progress
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
