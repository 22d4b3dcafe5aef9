"""Going back: when the branch has moved to a commit that is nonsense, and in a release by steps."""

import asyncio
import random
import re
import threading
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
from tests.integration.service import REPO, SERVING, Service
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
    """Two nodes with room for a replica each, one for the version that comes."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    deep = make_model(tmp_path_factory.mktemp("hub") / "deep", **sizes)
    with LocalHub([repo, Repo.from_dir(DEEP, deep, gated="manual")]) as hub:
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

    def act(command, *given, repo_id=REPO, **config):
        if command == "deploy":
            path = tmp_path / "app.yaml"
            http = {"host": "127.0.0.1", "port": service.port}
            app = service.config(replicas=1, **config)
            app["args"]["model"]["repo_id"] = repo_id
            path.write_text(yaml.safe_dump({"http_options": http, "applications": [app]}))
            given = [str(path), *given]
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
