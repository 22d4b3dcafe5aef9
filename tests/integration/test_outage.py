"""The Hub is down: what serves can be changed and scaled on receipts, if the config allows it."""

import pytest

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access.receipt import stored
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import QUESTION, REPO, SERVING, Service

pytestmark = pytest.mark.cluster

ALLOWED = {"on_unreachable": "allow_cached", "timeout_s": 1, "deadline_s": 10}  # two cold probes


def test_rollout_during_an_outage_goes_on_with_receipts(demo_model_dir):
    """New replicas start from the node's copy; without the permission the same is blocked."""
    with LocalHub([Repo.from_dir(REPO, demo_model_dir, gated="manual")]) as hub:
        token = hub.issue_token(Behaviour.granted, account="a")
        # The second node is the room that the new replica needs beside the old one.
        nodes = [LogicalNode(name, token, SERVING, num_gpus=0) for name in ("a", "b")]
        with cluster_of(*nodes, head_cpus=1) as running:
            service = Service(hub, running, {"a": token})
            service.put(replicas=1)
            status = service.wait("RUNNING", "DEPLOY_FAILED")
            assert status.status == "RUNNING", status.message
            (receipt,) = [kept for kept in stored(REPO) if kept.endpoint == hub.url]
            assert receipt.commit == hub.commits()[REPO]["main"]

            hub.stop()
            service.put(
                served_name="blocked", replicas=1, access=ALLOWED | {"on_unreachable": "block"}
            )
            status = service.wait("DEPLOY_FAILED", timeout_s=40)
            assert "Access NOT PROVEN: 2 of 2 nodes" in status.message

            service.put(served_name="cached", replicas=1, access=ALLOWED)
            service.wait("DEPLOYING", timeout_s=20)
            status = service.wait("RUNNING", "DEPLOY_FAILED")
            assert status.status == "RUNNING", status.message
            with service.client() as client:
                answer = client.chat.completions.create(
                    model="cached", messages=QUESTION, temperature=0, max_tokens=16
                )
    assert "Paris" in answer.choices[0].message.content
