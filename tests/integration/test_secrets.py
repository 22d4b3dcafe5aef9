"""No token and no API key is anywhere but where it was put, whatever happens.

One service at level `debug` goes through an ordinary day and a bad one: answers, mistakes of
clients, a load test, a blocked rollout, a replica that fails to load, one that crashes. Then
everything that was printed, written, stored, answered or exported is searched.
"""

import hashlib
import json
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import time
from contextlib import chdir, suppress
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from ray.experimental import internal_kv
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.cli.main import main
from serve_app.cluster.controller import replicas
from tests.access.cases import fake_token
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import QUESTION, REPO, SERVING, Service

pytestmark = pytest.mark.cluster
NAMESPACES = (None, b"serve", b"fun", b"cls", b"job", b"session", b"usage_stats", b"dashboard")


class Secrets:
    """The values, and everything in which they must not be found."""

    def __init__(self, **values):
        self.values = values
        self.places = {}

    def add(self, place, content):
        """Keep what is to be searched."""
        data = content if isinstance(content, bytes) else str(content).encode()
        self.places[place] = self.places.get(place, b"") + data

    def found(self):
        """Return (secret's name, place) for each finding; pickles hold text as it is."""
        return [
            (name, place)
            for place, data in self.places.items()
            for name, value in self.values.items()
            if value.encode() in data
        ]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """An API key, and the file with its hash."""
    key = "key-" + secrets.token_hex(20)
    file = tmp_path_factory.mktemp("keys") / "hashes"
    fields = "name=team rpm=6000 tpm=900000 streams=50 expires=2999-01-01 admin"
    file.write_text(f"{hashlib.sha256(key.encode()).hexdigest()} {fields}")
    return key, file


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def service(demo_model_dir, keys, home, tmp_path_factory):
    """One node whose token is in its environment, keys that are asked for, level debug."""
    with chdir(tmp_path_factory.mktemp("cores")):  # where one of Ray's own processes may leave its
        yield from started(demo_model_dir, keys, home)


def started(demo_model_dir, keys, home):
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))  # what the node would allow
    with LocalHub([Repo.from_dir(REPO, demo_model_dir, gated="manual")]) as hub:
        token = hub.issue_token(Behaviour.granted, account="a")
        env = {"HF_HOME": str(home), "PYTHONFAULTHANDLER": "1"}  # dumps all stacks of a crash
        node = LogicalNode("a", token, SERVING, num_gpus=0, env=env)
        with cluster_of(node, head_cpus=1, dashboard=True) as running:
            service = Service(hub, running, {"a": token})
            service.put_app(config(service, keys[1]))
            status = service.wait("RUNNING", "DEPLOY_FAILED")
            assert status.status == "RUNNING", status.message
            yield service
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


def config(service, keys_file, **changes):
    app = service.config(replicas=1, **changes)
    app["args"]["api"] = {"api_keys_file": str(keys_file)}
    app["args"]["logging"] = {"level": "debug"}
    return app


def test_secrets_are_nowhere(service, keys, home, tmp_path, capfd):
    """The values are read where they were put, and found nowhere else."""
    key, keys_file = keys
    hidden = Secrets(key=key, wrong_key="key-" + secrets.token_hex(20), in_yaml=fake_token())
    hidden.values |= {"node": service.tokens["a"], "half": fake_token(), "rest": fake_token()}
    (ingress,) = (each["pid"] for each in replicas("llm", 10)["Ingress"])
    ask_well_and_badly(service, hidden)
    load_test(service, hidden, tmp_path)
    use_commands(service, hidden, tmp_path, keys_file)
    read_usage(service, key)
    fail_a_rollout_and_a_replica(service, hidden, keys_file, home)
    crash(ingress)  # keys and prompts of clients passed through it
    gather(service, hidden, home)
    ask_rays_own_commands(service, hidden)
    printed = capfd.readouterr()
    hidden.add("stdout", printed.out)
    hidden.add("stderr", printed.err)
    assert len(hidden.places) > 40
    assert REPO.encode() in hidden.places["stored by Ray"]
    everything = b"".join(hidden.places.values())
    assert b"request.finished" in everything
    assert b"key=team" in everything
    assert everything.count(b"Fatal Python error: Segmentation fault") >= 2
    assert service.tokens["a"] not in str(hidden.places.keys())
    assert hidden.found() == []


def ask_well_and_badly(service, hidden):
    """Every path with the key, some with a wrong one, bodies that are none."""
    paths = ("/", "/status", "/metrics", "/access", "/ready", "/version", "/nowhere", "/v1/models")
    paths = (*paths, "/usage")
    bodies = ({"messages": QUESTION, "max_tokens": 2}, {"messages": 3}, {"store": True}, [], "text")
    for name in ("key", "wrong_key"):
        bearer = {"authorization": f"Bearer {hidden.values[name]}"}
        answers = [httpx.get(f"{service.url}{path}", headers=bearer) for path in paths]
        answers += [
            httpx.post(f"{service.url}/v1/chat/completions", json=body, headers=bearer, timeout=60)
            for body in bodies
        ]
        assert {answer.status_code for answer in answers} == (
            {200, 400, 404} if name == "key" else {200, 401}
        )
        for answer in answers:
            hidden.add(f"answer to {name}", answer.content + str(answer.headers).encode())


def read_usage(service, key):
    """Ray exports what the key used, under its name."""
    headers, until = {"authorization": f"Bearer {key}"}, time.monotonic() + 40
    while True:
        (usage,) = httpx.get(f"{service.url}/usage", headers=headers).json()["keys"]
        if usage["completion_tokens"]:
            break
        assert time.monotonic() < until, usage
        time.sleep(1)
    assert usage["name"] == "team"
    assert usage["requests"] > 5
    assert (usage["limited"], usage["limits"]["rpm"]) == (0, 6000)


def load_test(service, hidden, tmp_path):
    """The report and its page name the service, and not the key that they were asked with."""
    file = tmp_path / "key"
    file.write_text(hidden.values["key"])
    report, page = tmp_path / "report.json", tmp_path / "page.html"
    shape = ["--concurrency", "1", "--duration", "3", "--prompt-tokens", "8", "--output-tokens"]
    written = ["4", "--api-key-file", str(file), "--json", str(report), "--html", str(page)]
    assert main(["loadtest", service.url, *shape, *written]) == 0
    assert json.loads(report.read_text())["stages"][0]["completed"] > 0
    hidden.add("report", report.read_bytes())
    hidden.add("page", page.read_bytes())


def use_commands(service, hidden, tmp_path, keys_file):
    """A token in the YAML, and one that is none in a file: refused, and not repeated."""
    path, token_file = tmp_path / "app.yaml", tmp_path / "token"
    token_file.write_text("{half} {rest}".format(**hidden.values))
    for where in ("args", "env_vars", "nowhere"):
        app = config(service, keys_file)
        if where == "args":
            app["args"]["access"]["token"] = hidden.values["in_yaml"]
        elif where == "env_vars":
            app["runtime_env"] = {"env_vars": {"HF_TOKEN": hidden.values["in_yaml"]}}
        else:
            app["args"]["model"][hidden.values["in_yaml"]] = 1
        path.write_text(yaml.safe_dump({"applications": [app]}))
        assert main(["validate", str(path)]) == 2, where
        assert main(["deploy", str(path)]) == 2, where
    app = config(service, keys_file, access={"token_file": str(token_file)})
    path.write_text(yaml.safe_dump({"applications": [app]}))
    assert main(["check", str(path)]) == 3
    assert main(["check", str(path), "--json"]) == 3


def fail_a_rollout_and_a_replica(service, hidden, keys_file, home):
    """A blocked build, a replica that dies of a signal, and its successor that may not start."""
    service.hub.set_behaviour(service.tokens["a"], Behaviour.pending)
    builds = service.builds()
    service.put_app(config(service, keys_file, access={"timeout_s": 4}))
    blocked = service.wait_for_build(builds, "DEPLOY_FAILED", timeout_s=60)
    assert "request_pending" in blocked.message
    hidden.add("blocked rollout", blocked.message)

    crash(replica_process(home))
    deadline = time.monotonic() + 60
    while not service.logged("access.refused", "LLMServer"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    service.hub.set_behaviour(service.tokens["a"], Behaviour.granted)


def crash(pid):
    """End a process by a signal that would write a core file, and make sure that it does not."""
    assert re.search(r"^Max core file size +1 ", Path(f"/proc/{pid}/limits").read_text(), re.M)
    folder = Path(f"/proc/{pid}/cwd").resolve()
    before = set(folder.glob("core*"))
    os.kill(pid, signal.SIGSEGV)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(folder.glob("core*")) == before


def ask_rays_own_commands(service, hidden):
    """What a person, or a support bundle, gets by Serve's and Ray's own commands."""
    at = service.cluster.dashboard
    programs = Path(sys.executable).parent
    kinds = ("actors", "tasks", "workers", "nodes", "jobs", "runtime-envs", "objects")
    commands = [["serve", "status", "-a", at], ["serve", "config", "-a", at]]
    commands += [
        ["ray", "list", kind, "--detail", "--format", "json", "--address", at] for kind in kinds
    ]
    commands += [["ray", "summary", "tasks", "--address", at]]
    for name, *arguments in commands:
        done = subprocess.run(
            [str(programs / name), *arguments], capture_output=True, timeout=120, check=False
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        hidden.add(" ".join([name, *arguments[:2]]), said)
    assert b"request_pending" in hidden.places["serve status -a"]
    assert REPO.encode() in hidden.places["serve config -a"]
    assert b"LLMServer" in hidden.places["ray list actors"]


def replica_process(home):
    """Return the process id of this cluster's replica; Ray gives the process its name."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is somebody else's
            ours = f"HF_HOME={home}\0".encode() in (process / "environ").read_bytes()
            if ours and b"ServeReplica:llm:LLMServer" in (process / "cmdline").read_bytes():
                return int(process.name)
    raise AssertionError("no replica runs")


def gather(service, hidden, home):
    """All that Ray and Serve report, store or wrote, and all files of the node's home."""
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    for question in ("get_app_configs", "get_serve_instance_details"):
        hidden.add(question, ray.get(getattr(controller, question).remote()))
    hidden.add("metrics", service.metrics())
    for namespace in NAMESPACES:
        for name in internal_kv._internal_kv_list(b"", namespace=namespace):
            value = internal_kv._internal_kv_get(name, namespace=namespace)
            hidden.add("stored by Ray", name + (value or b""))
    for root in (service.logs.parent, home):
        for file in root.rglob("*"):
            if file.is_file() and not file.is_symlink() and file.suffix != ".safetensors":
                hidden.add(str(file), file.read_bytes())
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            hidden.add("command lines", process.read_bytes())
