"""Weights once per cluster: nodes with a cache each, one of which asks the Hub."""

import json

import pytest

from scripts.local_hub import Behaviour, LocalHub, Repo
from tests.cluster.conftest import LogicalNode, cluster_of
from tests.cluster.service import QUESTION, REPO, SERVING, Service

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def service(demo_model_dir, tmp_path_factory):
    """Two nodes, two tokens, two caches; a third place on the second node."""
    with LocalHub([Repo.from_dir(REPO, demo_model_dir, gated="manual")]) as hub:
        nodes, tokens = [], {}
        for name in ("a", "b"):
            home = tmp_path_factory.mktemp(f"home-{name}")
            (home / ".agent_harnesses.json").write_text(
                json.dumps({"standardEnvVars": [], "harnesses": {}})
            )
            tokens[name] = hub.issue_token(Behaviour.granted, account=name)
            nodes.append(
                LogicalNode(name, tokens[name], SERVING, num_gpus=0, env={"HF_HOME": str(home)})
            )
        with cluster_of(*nodes) as running:
            service = Service(hub, running, tokens)
            service.deploy(replicas=2)
            yield service


def weights_sent(hub):
    return [entry for entry in hub.log if entry.origin != "hub" and entry.bytes_sent > 9]


def test_a_cluster_asks_the_hub_for_the_weights_once(service):
    """The second node has the bytes from the first, and serves with them."""
    assert len(weights_sent(service.hub)) == 1
    started = service.logged("replica.started", "LLMServer")
    assert len(started) == 2
    fetched, copied = sorted(started, key=lambda line: line["peer"])
    assert fetched["hub"] == copied["peer"] > 250e6
    assert fetched["peer"] == copied["hub"] == 0
    with service.client() as client:
        for _ in range(4):
            answer = client.chat.completions.create(model="smol", messages=QUESTION, max_tokens=8)
            assert "Paris" in answer.choices[0].message.content
