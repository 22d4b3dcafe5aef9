"""The gate where no node is there to ask; with nodes it is tested on a cluster."""

import pytest

from scripts.local_hub import Behaviour
from serve_app.access import preflight
from serve_app.access.preflight import RolloutBlocked, require_access
from serve_app.access.verdict import Outcome
from serve_app.cluster import tasks
from serve_app.cluster.placement import Placement, asked_by
from serve_app.config import AppConfig
from tests.conftest import TINY_REPO


@pytest.fixture(autouse=True)
def empty_cluster(monkeypatch, tmp_path):
    """A cluster that has scaled to zero, and a cache of the test's own."""
    monkeypatch.setattr(preflight, "all_nodes", list)
    monkeypatch.setattr(tasks, "all_nodes", list)
    monkeypatch.setattr(tasks, "draining", tuple)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def gate(hub, tmp_path, *, token="", **access):
    """Run the gate with a token, if any, on the builder's own node."""
    if token:
        (tmp_path / "token").write_text(token)
        access["token_file"] = str(tmp_path / "token")
    limits = {"endpoint": hub.url, "timeout_s": 1, "deadline_s": 3}
    config = AppConfig.model_validate({"model": {"repo_id": TINY_REPO}, "access": limits | access})
    placements = [Placement(asked_by(config).demands)]
    return preflight.preflight(config, placements=placements), config


def test_require_access_blocks_without_a_node_unless_somebody_said_otherwise(
    hub, tmp_path, monkeypatch
):
    """What is not known counts as no."""
    verdict, config = gate(hub, tmp_path, token=hub.issue_token())
    assert verdict.exit_code == 4
    assert not verdict.is_deferred
    assert hub.log == []
    assert "the cluster has no node that is alive" in verdict.table()
    monkeypatch.setattr(preflight, "placements_of", lambda config: (asked_by(config),))
    with pytest.raises(RolloutBlocked, match="Access NOT PROVEN"):
        require_access(config)


@pytest.mark.parametrize("behaviour", [None, Behaviour.granted, Behaviour.pending])
def test_preflight_deferred_pins_the_commit_and_proves_nothing(hub, tmp_path, behaviour):
    """Whatever the builder's own token may do: it is not the replicas'."""
    token = hub.issue_token(behaviour) if behaviour else ""
    verdict, _ = gate(hub, tmp_path, token=token, on_no_nodes="defer")
    assert (verdict.approved, verdict.is_deferred, verdict.exit_code) == (True, True, 0)
    assert verdict.commit == hub.commits()[TINY_REPO]["main"]
    assert [node.outcome for node in verdict.nodes] == [Outcome.PROBE_FAILED]
    assert verdict.hub_requests > 0
    assert "nothing is proven" in verdict.table()


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [(Behaviour.hang, 4, "hub_unreachable"), (Behaviour.invalid, 3, "invalid_token")],
)
def test_preflight_deferred_without_a_commit_blocks_with_the_reason(
    hub, tmp_path, behaviour, code, words
):
    """A branch that nobody can resolve cannot be pinned."""
    token = hub.issue_token(behaviour)
    verdict, _ = gate(hub, tmp_path, token=token, on_no_nodes="defer")
    assert not verdict.approved
    assert verdict.exit_code == code
    assert words in verdict.table()


def test_preflight_of_a_local_model_pins_no_commit(tmp_path):
    """The directory is looked at where a replica starts."""
    config = AppConfig.model_validate(
        {"model": {"path": str(tmp_path / "none")}, "access": {"on_no_nodes": "defer"}}
    )
    verdict = preflight.preflight(config, placements=[asked_by(config)])
    assert verdict.is_deferred
    assert len(verdict.nodes) == 1
