"""What Ray Serve does in a rollout and `serve-app deploy` works around.

Each test fails when a later Ray does it otherwise: then the workaround that it names can go.
What a failed build does to autoscaling is in `test_scaling.py`.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import ray
from ray.serve._private import constants
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from serve_app.rollout.deploy import deploy
from serve_app.rollout.serve_client import Instance
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import meanwhile
from tests.ports import free_port

pytestmark = pytest.mark.cluster
NEVER = "/nonexistent/go"
ALWAYS = "/"
APP = "versions"


class Versions:
    """A Serve instance with one application, whose versions say their names."""

    def __init__(self):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.serve = Instance(self.goal("none"))

    def goal(self, name, *, build_when=ALWAYS, start_when=ALWAYS, **options):
        """Return a config of one version."""
        args = {"name": name, "build_when": build_when, "start_when": start_when}
        app = {
            "name": APP,
            "import_path": "tests.integration.waiting_apps:build",
            "args": {**args, "options": options},
        }
        http = {"host": "127.0.0.1", "port": self.port}
        return {"proxy_location": "HeadOnly", "http_options": http, "applications": [app]}

    def put(self, name, **how):
        """Set a version as the goal, and return."""
        self.serve.apply(self.goal(name, **how))

    def run(self, name, **how):
        """Set a version as the goal and wait until it answers."""
        self.put(name, **how)
        self.until(lambda: self.says() == name)

    def state(self):
        """Return the application's status and message."""
        state = self.serve.states()[APP]
        return state.status, state.message

    def says(self, timeout_s=2):
        """Return the version that answers; None if none does in time."""
        try:
            return httpx.get(self.url, timeout=timeout_s).text
        except httpx.TimeoutException:
            return None

    def until(self, reached, timeout_s=30):
        """Wait for something."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {self.state()}"
            time.sleep(0.1)

    @contextmanager
    def asked(self):
        """Ask all the time; yields the answers so far."""
        answers = []
        with meanwhile(lambda: answers.append(self.says(timeout_s=10)), every_s=0.05):
            yield answers


def actors():
    """Return how many replicas of a version there are, starting ones too."""
    names = ray.util.list_named_actors(all_namespaces=True)
    return len([actor for actor in names if "#Version#" in actor["name"]])


@pytest.fixture(scope="module")
def versions():
    with cluster_of(LogicalNode("worker", num_gpus=0)) as running:
        yield running, Versions()


def test_serve_stops_the_old_version_first_unless_configured_otherwise(versions, tmp_path):
    """Why our deployments set `max_surge_percent`: its default leaves nobody to answer."""
    _, serving = versions
    serving.run("one")
    go = tmp_path / "go"
    serving.put("two", start_when=str(go))
    serving.until(lambda: serving.says() is None)
    go.touch()
    serving.until(lambda: serving.says() == "two")

    go.unlink()
    with serving.asked() as answers:
        serving.put("three", start_when=str(go), max_surge_percent=100)
        serving.until(lambda: actors() == 2)
        time.sleep(2)
        assert set(answers) == {"two"}
        go.touch()
        serving.until(lambda: "three" in answers)
    assert set(answers) == {"two", "three"}


def test_serve_lets_a_build_take_forever(versions):
    """Why `deploy` has a time limit of its own: Serve has none, and is DEPLOYING ever after."""
    _, serving = versions
    serving.run("old")
    assert [name for name in dir(constants) if "BUILD" in name and "TIMEOUT" in name] == []
    fields = {*ServeApplicationSchema.model_fields, *ServeDeploySchema.model_fields}
    assert [name for name in fields if "timeout" in name] == []
    with serving.asked() as answers:
        serving.put("stuck", build_when=NEVER)
        time.sleep(5)
        assert serving.state() == ("DEPLOYING", "")
        former = serving.goal("old")
        again = serving.goal("stuck again", build_when=NEVER)
        result = deploy(serving.serve, again, timeout_s=4, former=former)
    assert (result.status, result.exit_code) == ("rolled_back", 5)
    assert result.reason == f"not running within 4 s: {APP}"
    assert set(answers) == {"old"}
    assert serving.state() == ("RUNNING", "")


def test_serve_run_a_second_time_stops_at_ctrl_c_what_the_first_one_serves(versions):
    """Why one deploys to a running Serve with `serve-app deploy`: its Ctrl-C stops nothing.

    The last test here: Serve is gone after it.
    """
    cluster, serving = versions
    serving.run("first")
    second = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("serve")),
            "run",
            *("--name", "second", "--route-prefix", "/second"),
            "tests.integration.waiting_apps:build",
            *("name=second", f"build_when={ALWAYS}", f"start_when={ALWAYS}"),
        ],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        serving.until(lambda: httpx.get(f"{serving.url}second").text == "second", timeout_s=60)
        assert serving.says() == "first"
    finally:
        second.send_signal(signal.SIGINT)
        second.wait(timeout=60)
    with pytest.raises(httpx.ConnectError):
        serving.says()
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(constants.SERVE_CONTROLLER_NAME, namespace=constants.SERVE_NAMESPACE)
