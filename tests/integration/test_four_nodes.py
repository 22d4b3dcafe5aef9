"""Four nodes with four tokens: the rollout is blocked by three, and the old version serves on."""

import re
import time

import pytest

from scripts.local_hub import Behaviour, LocalHub, Repo
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import REPO, Service

pytestmark = pytest.mark.cluster

BEHAVIOURS = {
    "granted": Behaviour.granted,
    "never-asked": Behaviour.never_asked,
    "pending": Behaviour.pending,
    "none": None,
}
EXPECTED = {
    "granted": "granted",
    "never-asked": "license_not_accepted",
    "pending": "request_pending",
    "none": "no_token",
}
ROUNDS = 3


@pytest.fixture(scope="module")
def service(demo_model_dir):
    """The first version runs on the granted node alone."""
    with LocalHub([Repo.from_dir(REPO, demo_model_dir, gated="manual")]) as hub:
        tokens = {
            name: hub.issue_token(behaviour, account=f"user-{name}")
            for name, behaviour in BEHAVIOURS.items()
            if behaviour is not None
        }
        nodes = [
            LogicalNode(name, tokens.get(name), {"is": name}, num_gpus=0) for name in BEHAVIOURS
        ]
        with cluster_of(*nodes) as running:
            service = Service(hub, running, tokens)
            service.deploy(replicas=1, selector={"is": "granted"})
            yield service


def test_gate_of_four_nodes_is_right_on_every_row_and_no_request_is_lost(
    service, record_testsuite_property
):
    """From PUT to DEPLOY_FAILED in seconds, without a byte of weights."""
    service.hub.clear_log()
    everywhere = {"is": f"in({','.join(BEHAVIOURS)})"}
    seconds = []
    with service.under_load() as answered:
        for number in range(ROUNDS):
            before = service.builds()
            began = time.monotonic()
            service.put(served_name=f"second-{number}", replicas=1, selector=everywhere)
            message = service.wait_for_build(before, "DEPLOY_FAILED", timeout_s=30).message
            seconds.append(round(time.monotonic() - began, 2))
            rows = dict(re.findall(r"^  ([\w-]+) +([a-z_]+) +\S+", message, re.MULTILINE))
            assert rows == EXPECTED
            assert "Access BLOCKED: 3 of 4 nodes cannot read" in message
            assert "Traceback" not in message
    assert set(answered) == {200}
    assert len(answered) > ROUNDS
    assert sum(entry.bytes_sent for entry in service.hub.log if entry.origin != "hub") <= 9 * ROUNDS
    record_testsuite_property("put_to_deploy_failed_s", seconds)
    assert sorted(seconds)[ROUNDS // 2] < 15, seconds
