"""Going back when the branch has moved to a commit that is nonsense."""

import pytest
import yaml

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.cli.main import main
from serve_app.cluster.controller import instance_details
from tests.integration.conftest import ONE_TRY, LogicalNode, cluster_of
from tests.integration.service import REPO, SERVING, Service
from tests.models import make_model

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("hub") / "model")
    return Repo.from_dir(REPO, model, gated="manual")


@pytest.fixture(scope="module")
def service(repo, tmp_path_factory):
    """Two nodes with room for a replica each, one for the version that comes."""
    with LocalHub([repo]) as hub:
        env = {"HF_HOME": str(tmp_path_factory.mktemp("home"))}
        tokens = {name: hub.issue_token(Behaviour.granted, account=name) for name in ("a", "b")}
        nodes = [
            LogicalNode(name, token, SERVING, num_gpus=0, env=env) for name, token in tokens.items()
        ]
        with cluster_of(*nodes, head_cpus=1, env=ONE_TRY) as running:
            yield Service(hub, running, tokens)


@pytest.fixture
def run(service, tmp_path, capsys):
    """Run a command as a person does; returns exit code and all that it says."""

    def act(command, **config):
        given = []
        if command == "deploy":
            path = tmp_path / "app.yaml"
            http = {"host": "127.0.0.1", "port": service.port}
            app = service.config(replicas=1, **config)
            path.write_text(yaml.safe_dump({"http_options": http, "applications": [app]}))
            given = [str(path)]
        code = main([command, *given, "--timeout", "4m"])
        return code, "".join(capsys.readouterr())

    return act


def serving():
    """Return the args of what Serve is set to run, and the state that it says."""
    app = instance_details(10)["applications"]["llm"]
    return app["deployed_app_config"]["args"], str(getattr(app["status"], "value", app["status"]))


def test_rollback_passes_over_a_nonsense_commit(service, repo, run):
    """The way back leads to the commit that served, by itself and by hand; no request is lost."""
    good = repo.sha
    assert run("deploy")[0] == 0
    files = {path: file.open().read() for path, file in repo.files(good).items()}
    repo.push(files | {"tokenizer.json": b"{}"})
    nonsense = repo.sha
    with service.under_load() as answered:
        code, output = run("deploy", access={"timeout_s": 4})
        assert (code, "rolled back" in output) == (5, True), output
        args, status = serving()
        assert (args["model"]["revision"], status) == (good, "RUNNING")
        assert "timeout_s" not in args["access"]

        code, output = run("rollback")  # what serves is the only good version there is
        assert (code, "no earlier config of llm" in output) == (2, True), output

        repo.push(files | {"README.md": b"corrected"})
        assert repo.sha not in (good, nonsense)
        code, output = run("deploy", access={"timeout_s": 4})
        assert code == 0, output
        assert "revision" not in serving()[0]["model"]
        repo.push(files | {"tokenizer.json": b"{}"})

        code, output = run("rollback")
        assert code == 0, output
        args, status = serving()
        assert (args["model"]["revision"], status) == (good, "RUNNING")
    assert set(answered) == {200}
    assert len(answered) > 10
