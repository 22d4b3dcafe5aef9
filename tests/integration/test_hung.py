"""A replica that is stopped in mid-stream, and an ingress whose loop is blocked."""

import os
import signal
import threading
import time
from contextlib import suppress

import openai
import pytest

from scripts.local_hub import Behaviour, LocalHub, Repo
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import QUESTION, REPO, SERVING, Service

pytestmark = pytest.mark.cluster

STREAMS = 16
STALL_TIMEOUT_S = 6.0


@pytest.fixture(scope="module")
def service(demo_model_dir):
    with LocalHub([Repo.from_dir(REPO, demo_model_dir, gated="manual")]) as hub:
        tokens = {name: hub.issue_token(Behaviour.granted, account=name) for name in ("a", "b")}
        nodes = [LogicalNode(name, token, SERVING, num_gpus=0) for name, token in tokens.items()]
        # An unhealthy replica is ended at once, as the manifests and the quickstart have it.
        env = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}
        with cluster_of(*nodes, env=env) as running:
            service = Service(hub, running, tokens)
            # Serve takes three failed checks for its end; 15 s each would only be waited for here.
            checks = {"health_check_period_s": 1.0, "health_check_timeout_s": 5.0}
            app = service.config(overrides=checks)
            app["args"]["api"] = {"stall_timeout_s": STALL_TIMEOUT_S}
            service.put_app(app)
            status = service.wait("RUNNING", "DEPLOY_FAILED")
            assert status.status == "RUNNING", status.message
            yield service


def pids(deployment):
    """Return the processes of a deployment's replicas that run."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    details = ray.get(controller.get_serve_instance_details.remote())
    replicas = details["applications"]["llm"]["deployments"][deployment]["replicas"]
    return {replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}


class Streams:
    """Long streams, each with the time and the kind of its end."""

    def __init__(self, service):
        self.ends = []
        self.begun = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._read, args=(service,)) for _ in range(STREAMS)
        ]
        for thread in self._threads:
            thread.start()
        for _ in range(STREAMS):
            assert self.begun.acquire(timeout=120)

    def _read(self, service):
        end = "cut"
        try:
            with service.client() as client:
                stream = client.completions.create(
                    model="smol",
                    prompt="Count: 1 2 3",
                    max_tokens=400,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                for number, chunk in enumerate(stream):
                    if not number:
                        self.begun.release()
                    end = chunk.choices[0].finish_reason or end
        except openai.APIError as error:
            end = error.code or type(error).__name__
        self.ends.append((time.monotonic(), end))

    def join(self):
        """Wait for all of them; returns how each ended."""
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        return [end for _, end in self.ends]


def test_replica_stopped_ends_every_stream(service):
    """An error within the limit for its own, none for the other's; another replica comes."""
    streams = Streams(service)
    before = pids("LLMServer")
    stopped = min(before)
    os.kill(stopped, signal.SIGSTOP)
    since = time.monotonic()
    try:
        with service.client() as client:
            for _ in range(4):
                client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=2)
        ends = streams.join()
        assert ends.count("engine_dead") + ends.count("length") == STREAMS
        assert 1 <= ends.count("engine_dead") < STREAMS
        # The others run for a while of their own.
        dead = [when for when, end in streams.ends if end == "engine_dead"]
        assert max(dead) - since < 2.5 * STALL_TIMEOUT_S
        deadline = time.monotonic() + 120
        while not (len(now := pids("LLMServer")) == 2 and stopped not in now):
            assert time.monotonic() < deadline, now
            time.sleep(0.5)
    finally:
        with suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    with service.client() as client:
        answer = client.chat.completions.create(model="smol", messages=QUESTION, temperature=0)
    assert "Paris" in answer.choices[0].message.content
