"""Outcomes and the decision over them."""

import pickle

import pytest

from serve_app.access.verdict import UNDETERMINED, NodeVerdict, Outcome, Verdict, log_facts
from tests.access.cases import COMMIT, granted, verdict

ALL = [
    "granted", "no_token", "malformed_token", "invalid_token", "expired_token",
    "identity_refused", "license_not_accepted", "request_pending", "request_rejected",
    "request_reset", "token_scope", "org_policy", "content_blocked", "license_not_allowed",
    "digest_mismatch",
    "signature_invalid",
    "repo_not_found", "revision_not_found", "repo_disabled",
    "weights_missing", "weights_unreachable", "rate_limited", "hub_unreachable", "probe_failed",
    "unknown",
]  # fmt: skip


def whole(*nodes: NodeVerdict, commit: str | None = COMMIT, is_local: bool = False) -> Verdict:
    return Verdict("acme/tiny", "main", commit, "https://hub", 1.23456, nodes, 7, is_local)


def test_outcomes_are_the_published_ones():
    """Dashboards depend on these words; none is added or renamed silently."""
    assert [outcome.value for outcome in Outcome] == ALL


def test_verdict_is_yes_when_all_nodes_are_granted_at_one_commit():
    """Approval needs every node."""
    decision = whole(granted("a"), granted("b"))
    assert (decision.approved, decision.exit_code) == (True, 0)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome != "granted"])
def test_verdict_is_no_for_one_other_outcome(outcome):
    """Whatever it is, it blocks; the exit code distinguishes a refusal from not knowing."""
    decision = whole(granted("a"), verdict("b", outcome))
    assert not decision.approved
    assert decision.exit_code == (4 if outcome in UNDETERMINED else 3)


def test_verdict_refusal_outweighs_not_knowing():
    """Exit 3 if anything was refused."""
    nodes = (verdict("a", Outcome.HUB_UNREACHABLE), verdict("b", Outcome.NO_TOKEN))
    assert whole(*nodes).exit_code == 3


@pytest.mark.parametrize(
    "decision",
    [
        whole(),
        whole(granted("a"), granted("b", "d" * 40)),
        whole(granted("a", None), commit=None),
        whole(commit=None, is_local=True),
    ],
    ids=["no node", "two commits", "no commit", "no node, local"],
)
def test_verdict_does_not_approve_by_granted_nodes_alone(decision):
    """Without a node, or without one commit that all agree on, the answer is no (exit 4)."""
    assert (decision.approved, decision.exit_code) == (False, 4)


def test_verdict_of_a_local_model_needs_no_commit():
    """A directory has none."""
    assert whole(granted("a", None), commit=None, is_local=True).approved


def test_verdict_deferred_passes_only_with_a_commit_and_without_a_refusal():
    """What was not asked is no yes: it is distinguished, and one refusal elsewhere blocks."""
    nowhere = verdict("x", Outcome.PROBE_FAILED, deferred=True)
    assert whole(nowhere).approved
    assert whole(nowhere).is_deferred
    assert whole(nowhere).exit_code == 0
    assert whole(granted("a"), nowhere).is_deferred
    assert not whole(granted("a")).is_deferred
    assert not whole(nowhere, commit=None).approved
    assert whole(nowhere, commit=None).exit_code == 4
    assert whole(nowhere, verdict("a", Outcome.NO_TOKEN)).exit_code == 3
    assert not whole(nowhere, verdict("a", Outcome.HUB_UNREACHABLE)).approved


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.PROBE_FAILED])
def test_verdict_defers_nothing_that_was_asked(outcome):
    """The mark means that nobody answered; beside an answer it approves nothing."""
    assert not whole(verdict("a", outcome, deferred=True)).approved


def test_verdict_json_is_the_published_shape():
    """Keys and their order are what `check --json` promises."""
    shape = whole(verdict("a", Outcome.NO_TOKEN, http_status=401, hub_message="no", url="u"))
    assert shape.to_json() == {
        "approved": False,
        "repo_id": "acme/tiny",
        "revision": "main",
        "commit": COMMIT,
        "endpoint": "https://hub",
        "duration_s": 1.235,
        "hub_requests": 7,
        "nodes": [
            {
                "node_id": "id-a",
                "node_name": "a",
                "outcome": "no_token",
                "http_status": 401,
                "hub_message": "no",
                "remedy": "do this",
                "url": "u",
                "token": {
                    "source": "env:HF_TOKEN",
                    "fingerprint": "0123abcd",
                    "account": None,
                    "identity": None,
                },
                "license": {"id": None, "text_sha256": None},
                "digest": None,
                "mirror": None,
            }
        ],
    }


def test_verdict_crosses_processes():
    """They pickle and come back equal."""
    decision = whole(granted("a"), verdict("b", Outcome.UNKNOWN, hub_message="?"))
    assert pickle.loads(pickle.dumps(decision)) == decision


def test_log_facts_are_flat():
    """A log line takes them as keywords beside its own node_id."""
    facts = log_facts(granted("a"))
    assert "node_id" not in facts
    assert all(value is None or isinstance(value, str | int) for value in facts.values())
