"""`serve-app deploy` on a cluster that others use: their applications stay as they are."""

import threading
import time

import httpx
import pytest
import yaml

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.cli.main import main
from tests.integration.conftest import ONE_TRY, LogicalNode, cluster_of
from tests.integration.service import REPO, SERVING, Service
from tests.models import make_model

pytestmark = pytest.mark.cluster
BROKEN = "acme/broken"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A tiny model, one whose weights are cut, and an application of others that runs."""
    model = make_model(tmp_path_factory.mktemp("hub") / "model")
    files = {str(path.relative_to(model)): path.read_bytes() for path in model.iterdir()}
    weights = files["model.safetensors"]
    cut = files | {"model.safetensors": weights[: len(weights) // 2]}
    repos = [Repo.from_dir(REPO, model, gated="manual"), Repo(BROKEN, cut, gated="manual")]
    with LocalHub(repos) as hub:
        env = {"HF_HOME": str(tmp_path_factory.mktemp("home"))}
        tokens = {name: hub.issue_token(Behaviour.granted, account=name) for name in ("a", "b")}
        nodes = [
            LogicalNode(name, token, SERVING, num_gpus=0, env=env) for name, token in tokens.items()
        ]
        # One node's place is the new version's.
        with cluster_of(*nodes, head_cpus=1, env=ONE_TRY) as running:
            service = Service(hub, running, tokens)
            now = tmp_path_factory.mktemp("waits") / "now"
            now.touch()
            service.put_app(
                {
                    "name": "theirs",
                    "route_prefix": "/theirs",
                    "import_path": "tests.integration.waiting_apps:build",
                    "args": {"name": "v1", "build_when": str(now), "start_when": str(now)},
                }
            )
            status = wait_for_theirs()
            assert status == "RUNNING"
            yield service


def wait_for_theirs():
    from ray import serve

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        app = serve.status().applications.get("theirs")
        if app and app.status in ("RUNNING", "DEPLOY_FAILED"):
            return app.status
        time.sleep(0.2)
    return None


@pytest.fixture
def run(service, tmp_path, capsys):
    """Run a command as a person does; returns exit code and all that it says."""

    def act(command, *options, repo_id=REPO, name="llm", **config):
        given = []
        if command == "deploy":
            app = service.config(replicas=1, selector=SERVING, **config)
            app["args"]["model"]["repo_id"] = repo_id
            app["name"] = name
            path = tmp_path / "app.yaml"
            http = {"host": "127.0.0.1", "port": service.port}
            path.write_text(yaml.safe_dump({"http_options": http, "applications": [app]}))
            given = [str(path)]
        code = main([command, *given, "--timeout", "3m", *options])
        return code, "".join(capsys.readouterr())

    return act


@pytest.fixture
def theirs(service):
    """Asks the application of others all the time; yields what was answered."""
    answered, over = set(), threading.Event()

    def ask():
        with httpx.Client(timeout=30) as client:
            while not over.wait(0.02):
                answer = client.get(f"{service.url}/theirs")
                answered.add((answer.status_code, answer.text))

    thread = threading.Thread(target=ask)
    thread.start()
    yield answered
    over.set()
    thread.join()


def actors_of_theirs():
    import ray

    return {
        each["name"]
        for each in ray.util.list_named_actors(all_namespaces=True)
        if "theirs#" in each["name"]
    }


def test_deploy_leaves_the_applications_of_others_alone(service, run, theirs):
    """A first, a second, a failing one and the way back: the same actor of theirs answers all."""
    before = actors_of_theirs()
    assert before
    code, output = run("deploy")
    assert code == 0, output
    assert "llm: new" in output
    assert "theirs: not in the file, stays as it is; --remove theirs takes it away" in output
    code, output = run("deploy", access={"timeout_s": 4})
    assert (code, "llm: changes args" in output) == (0, True), output
    code, output = run("deploy", repo_id=BROKEN)
    assert (code, "rolled back" in output) == (5, True), output
    code, output = run("rollback")
    assert (code, "theirs: stays as it is" in output) == (0, True), output
    assert "llm: args.access.timeout_s: 4 -> default" in output
    assert actors_of_theirs() == before
    assert theirs == {(200, "v1")}


def test_deploy_removes_an_application_by_its_name_and_rollback_restores_it(service, run):
    """Nothing else is changed by it, and a name that is not there changes nothing at all."""
    code, output = run("deploy", "--remove", "thiers")
    assert code == 2
    assert "--remove thiers: no such application serves; those that do: llm, theirs" in output
    assert httpx.get(f"{service.url}/theirs").text == "v1"

    code, output = run("deploy", "--remove", "theirs", "--dry-run")
    assert (code, "theirs: removed, its requests end" in output) == (0, True), output
    assert httpx.get(f"{service.url}/theirs").text == "v1"

    code, output = run("deploy", "--remove", "theirs")
    assert code == 0, output
    assert "llm: unchanged, nothing restarts" in output
    assert httpx.get(f"{service.url}/theirs").status_code == 404

    code, output = run("rollback")
    assert code == 0, output
    assert "theirs: going back to the config that served since" in output
    assert httpx.get(f"{service.url}/theirs").text == "v1"
    code, output = run("rollback", "unknown")
    assert (code, "no earlier config of unknown that served" in output) == (2, True)


def test_deploy_touches_nothing_when_a_route_is_taken(service, run):
    """Such as one whose application was renamed; the sentence says how to mean it."""
    builds = service.builds()
    code, output = run("deploy", name="second")
    assert code == 2
    assert "second and llm, which serves, have the same route_prefix /" in output
    assert "--remove llm" in output
    assert service.builds() == builds
    assert service.wait("RUNNING").status == "RUNNING"
