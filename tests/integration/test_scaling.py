"""Replicas follow the load, down to none and back, and nobody loses a request by it."""

import time
from contextlib import contextmanager

import httpx
import pytest
import ray
from ray import serve

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.config import ReplicaConfig
from serve_app.deployments.autoscaling import autoscaling
from serve_app.rollout.deploy import nudged
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import QUESTION, REPO, SERVING, Service, meanwhile
from tests.integration.test_application import kill_one_replica

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),
]
QUICK = {"downscale_to_zero_delay_s": 2, "metrics_interval_s": 1, "look_back_period_s": 3}


@pytest.fixture(scope="module")
def service(demo_model_dir):
    """Two nodes with a place for a replica each."""
    with LocalHub([Repo.from_dir(REPO, demo_model_dir, gated="manual")]) as hub:
        tokens = {name: hub.issue_token(Behaviour.granted, account=name) for name in ("a", "b")}
        nodes = [LogicalNode(name, token, SERVING, num_gpus=0) for name, token in tokens.items()]
        with cluster_of(*nodes, head_cpus=1) as running:
            yield Service(hub, running, tokens)


def scaling(service, least, most, **config):
    """Return a config whose autoscaler is quick."""
    app = service.config(**config)
    replica = app["args"]["replica"]
    replica |= {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": 2}
    replica |= {"upscale_delay_s": 0.5, "downscale_delay_s": 2}
    quick = autoscaling(ReplicaConfig(**replica)) | QUICK
    app["deployments"] = [{"name": "LLMServer", "autoscaling_config": quick}]
    return app


def until_replicas(count, timeout_s=60):
    """Wait for a number of replicas."""
    deadline = time.monotonic() + timeout_s
    while len(names := replicas()) != count:
        if time.monotonic() > deadline:
            raise AssertionError(f"not {count} replicas within {timeout_s} s: {names}")
        time.sleep(0.2)


def replicas():
    """Return the names of the replicas' actors; Serve itself names none after a failed build."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if "#LLMServer#" in actor["name"]]


@contextmanager
def page_of(service):
    """Look at the status page's replicas all the time; yields the states and phases seen."""
    seen = set()

    def look():
        replicas = httpx.get(f"{service.url}/status", timeout=10).json()["replicas"]
        seen.update((replica["state"], replica["phase"]) for replica in replicas)

    with meanwhile(look, every_s=0.2):
        yield seen


def test_scaling_from_none_to_two_and_back_loses_nothing(service):
    """A sleeping service is ready without waking, holds its first request, grows and shrinks."""
    service.put_app(scaling(service, 0, 2))
    service.wait("RUNNING")
    until_replicas(0)
    assert httpx.get(f"{service.url}/ready", timeout=10).status_code == 200
    time.sleep(1)
    assert replicas() == [], "being asked for readiness woke it"
    assert httpx.get(f"{service.url}/status", timeout=10).json()["replicas"] == []
    with service.client() as client, page_of(service) as shown:
        answer = client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=4)
        assert answer.choices[0].message.content
    assert {"STARTING"} == {state for state, phase in shown if phase}
    assert {phase for _, phase in shown} >= {"load"}
    with service.under_load(clients=8, tokens=40) as answered:
        until_replicas(2)
    with service.under_load() as trickle:
        until_replicas(1)
    assert len(answered) >= 8  # each client at least once
    assert len(trickle) > 8
    assert set(answered) | set(trickle) == {200}


def test_scaling_is_frozen_by_a_failed_build_until_a_rollback_nudges_it(service):
    """What Ray 2.60 does, and why `serve-app deploy` proves first and goes back with a nudge.

    If the first half fails, Ray has been fixed and `nudged` can go.
    """
    before = scaling(service, 1, 2)
    service.put_app(before)
    service.wait("RUNNING")
    until_replicas(1)
    service.hub.set_behaviour(service.tokens["b"], Behaviour.never_asked)
    builds = service.builds()
    service.put_app(scaling(service, 1, 2, access={"timeout_s": 4}))
    service.wait_for_build(builds, "DEPLOY_FAILED", timeout_s=60)
    service.hub.set_behaviour(service.tokens["b"], Behaviour.granted)
    with service.under_load(clients=8, tokens=40) as answered:
        with pytest.raises(AssertionError, match="not 2 replicas"):
            until_replicas(2, timeout_s=5)
        service.put_app(before)
        with pytest.raises(AssertionError, match="not 2 replicas"):
            until_replicas(2, timeout_s=5)
        (app,) = nudged({"applications": [before]})["applications"]
        service.put_app(app)
        until_replicas(2)
    assert set(answered) == {200}


def test_prefix_routing_lets_a_conversation_find_its_beginning(service):
    """Every turn; of several prompts each is answered, and a lost replica costs none."""
    serve.delete("llm")  # two replicas need both nodes
    app = service.config()
    app["args"]["replica"]["routing"] = "prefix"
    service.put_app(app)
    service.wait("RUNNING")
    talks = [[{"role": "user", "content": f"{n}. " + "Tell me more. " * 12}] for n in range(6)]
    with service.client() as client:

        def turn(talk):
            answer = client.chat.completions.create(model="smol", messages=talk, max_tokens=4)
            said = answer.choices[0].message.content
            talk += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
            return answer.usage

        asked = [turn(talk).prompt_tokens for talk in talks]
        for _ in range(2):
            usages = [turn(talk) for talk in talks]
            found = [usage.prompt_tokens_details.cached_tokens for usage in usages]
            assert all(now > before / 2 for now, before in zip(found, asked, strict=True)), found
            asked = [usage.prompt_tokens for usage in usages]
        prompts = [f"Once, {n}" for n in range(8)]
        answer = client.completions.create(model="smol", prompt=prompts, max_tokens=2)
        assert len(answer.choices) == len(prompts)
        kill_one_replica()
        assert all(turn(talk).completion_tokens for talk in talks)
