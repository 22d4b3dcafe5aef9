"""`serve-app deploy` and `rollback` on a cluster that others use: theirs stays as it is.

The branch moves to a commit that is nonsense, an application is removed, a release goes by steps.
"""

import asyncio
import random
import re
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import yaml

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.cli.main import main
from serve_app.cluster.controller import instance_details
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import What
from tests.integration.conftest import ONE_TRY, LogicalNode, cluster_of
from tests.integration.service import REPO, SERVING, Service, meanwhile
from tests.models import make_model

pytestmark = pytest.mark.cluster
DEEP = "acme/deep"
STREAMS_A_SECOND, STREAMS = 20, 40  # to begin, and at a time: a busy machine gets fewer
PROMPT = "The quick brown fox jumps over the lazy dog. Hello, how are you today? " * 4
# Of the relative limits the middle one decides: on two cores any single request may be late.
SLO = "ttft_p50=3x,ttft_p95=20x,tpot_p95=20x,error_rate=2%"
STEPS = ("--canary", "25,100", "--hold", "3s", "--min-requests", "12", "--slo", SLO)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("hub") / "model")
    return Repo.from_dir(REPO, model, gated="manual")


@pytest.fixture(scope="module")
def service(repo, tmp_path_factory):
    """Two nodes with room for a replica each, one for the version that comes; and `theirs` runs."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    deep = make_model(tmp_path_factory.mktemp("hub") / "deep", **sizes)
    with LocalHub([repo, Repo.from_dir(DEEP, deep, gated="manual")]) as hub:
        env = {"HF_HOME": str(tmp_path_factory.mktemp("home"))}
        tokens = {name: hub.issue_token(Behaviour.granted, account=name) for name in ("a", "b")}
        nodes = [
            LogicalNode(name, token, SERVING, num_gpus=0, env=env) for name, token in tokens.items()
        ]
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
            assert wait_for_theirs() == "RUNNING"
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


@contextmanager
def asking_theirs(service):
    """Ask the application of others all the time; yields what was answered."""
    answered = set()
    with httpx.Client(timeout=30) as client:

        def ask():
            answer = client.get(f"{service.url}/theirs")
            answered.add((answer.status_code, answer.text))

        with meanwhile(ask, every_s=0.02):
            yield answered


def actors_of_theirs():
    import ray

    return {
        each["name"]
        for each in ray.util.list_named_actors(all_namespaces=True)
        if "theirs#" in each["name"]
    }


@pytest.fixture
def run(service, tmp_path, capsys):
    """Run a command as a person does; returns exit code and all that it says."""

    def act(command, *given, repo_id=REPO, name="llm", **config):
        if command == "deploy":
            path = tmp_path / "app.yaml"
            http = {"host": "127.0.0.1", "port": service.port}
            app = service.config(replicas=1, **config)
            app["args"]["model"]["repo_id"] = repo_id
            app["name"] = name
            path.write_text(yaml.safe_dump({"http_options": http, "applications": [app]}))
            given = [str(path), *given]
        code = main([command, *given, "--timeout", "4m"])
        return code, "".join(capsys.readouterr())

    return act


def serving():
    """Return the args of what Serve is set to run, and the state that it says."""
    app = instance_details(10)["applications"]["llm"]
    return app["deployed_app_config"]["args"], str(getattr(app["status"], "value", app["status"]))


def test_deploy_removes_an_application_by_its_name_and_rollback_restores_it(service, run):
    """Nothing else is changed by it, and a name that is not there changes nothing at all."""
    code, output = run("deploy")
    assert code == 0, output
    assert "llm: new" in output
    assert "theirs: not in the file, stays as it is; --remove theirs takes it away" in output

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


def test_rollback_passes_over_a_nonsense_commit(service, repo, run):
    """The way back leads to the commit that served, by itself and by hand; no request is lost.

    Nor one to the application of others, whose actor is the same throughout.
    """
    before = actors_of_theirs()
    assert before
    with asking_theirs(service) as theirs:
        go_there_and_back(service, repo, run)
    assert actors_of_theirs() == before
    assert theirs == {(200, "v1")}


def go_there_and_back(service, repo, run):
    good = repo.sha
    files = {path: file.open().read() for path, file in repo.files(good).items()}
    repo.push(files | {"tokenizer.json": b"{}"})
    nonsense = repo.sha
    with service.under_load() as answered:
        code, output = run("deploy", access={"timeout_s": 4})
        assert (code, "rolled back" in output) == (5, True), output
        args, status = serving()
        assert (args["model"]["revision"], status) == (good, "RUNNING")
        assert "timeout_s" not in args["access"]

        code, output = run("rollback", "llm")  # what serves is the only good version there is
        assert (code, "no earlier config of llm" in output) == (2, True), output

        repo.push(files | {"README.md": b"corrected"})
        assert repo.sha not in (good, nonsense)
        code, output = run("deploy", access={"timeout_s": 4})
        assert (code, "llm: changes args" in output) == (0, True), output
        assert "revision" not in serving()[0]["model"]
        repo.push(files | {"tokenizer.json": b"{}"})

        code, output = run("rollback", "llm")
        assert (code, "theirs: stays as it is" in output) == (0, True), output
        assert "llm: args.access.timeout_s: 4 -> default" in output
        args, status = serving()
        assert (args["model"]["revision"], status) == (good, "RUNNING")
    assert set(answered) == {200}
    assert len(answered) > 10
    repo.push(files)  # for those that come next


@contextmanager
def streams(service):
    """Begin so many streams a second as long as not too many run; yields how they ended."""
    ended = []
    over = threading.Event()

    async def ask(client):
        prompt = f"{random.random()} {PROMPT}"  # whose beginning nobody has computed
        body = {"model": "smol", "prompt": prompt, "max_tokens": 4, "stream": True}
        try:
            answer = await client.post("/v1/completions", json=body)
            whole = answer.text.rstrip().endswith("[DONE]") and '"error"' not in answer.text
            ended.append(answer.status_code if whole else answer.text)
        except httpx.HTTPError as error:
            ended.append(repr(error))

    async def begin():
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            asking = set()
            while not over.is_set():
                if len(asking) < STREAMS:
                    asking.add(task := asyncio.create_task(ask(client)))
                    task.add_done_callback(asking.discard)
                await asyncio.sleep(1 / STREAMS_A_SECOND)
            await asyncio.gather(*asking)

    thread = threading.Thread(target=asyncio.run, args=(begin(),))
    thread.start()
    try:
        yield ended
    finally:
        over.set()
        thread.join()


@pytest.mark.chaos  # two minutes
def test_deploy_canary_goes_on_or_back(service, run):
    """A slower canary, one that errs and a good one under 20 streams a second; none is lost."""
    if "llm" not in instance_details(10)["applications"]:
        assert run("deploy")[0] == 0
    before = len(rollout_history.entries("llm"))
    served, _ = serving()
    with streams(service) as ended:
        code, output = run("deploy", *STEPS, repo_id=DEEP)
        assert (code, "llm: bad: 25 %: ttft_p50=3x" in output) == (5, True), output

        code, output = run("deploy", *STEPS, engine={"max_context_tokens": 24})
        assert (code, "25 %: error_rate=2%" in output) == (5, True), output
        assert serving()[0] == served

        code, output = run("deploy", *STEPS, access={"timeout_s": 5})
        assert code == 0, output
        assert serving()[0]["access"]["timeout_s"] == 5
    assert set(ended) == {200}
    assert len(ended) > 300

    found = rollout_history.entries("llm")[before:]
    told = [(entry.what, entry.why.partition(": ")[0]) for entry in found if entry.who != "build"]
    assert told == [
        (What.CANARY, "25 %"),
        (What.ROLLED_BACK, "bad"),
        (What.CANARY, "25 %"),
        (What.ROLLED_BACK, "bad"),
        (What.CANARY, "25 %"),
        (What.CANARY, "good"),
        (What.DONE, "it runs and answered"),
    ]
    page = service.metrics()
    assert re.search(r'canary_requests_total\{[^}]*outcome="error"[^}]*track="canary"', page)
    assert "llm-canary" not in instance_details(10)["applications"]
