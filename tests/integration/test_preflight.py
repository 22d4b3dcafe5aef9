"""The gate on a real cluster of logical nodes: each node's own token, environment and fate."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access.preflight import (
    Placement,
    RolloutBlocked,
    check_cluster,
    preflight,
    require_access,
)
from serve_app.cluster import placement
from serve_app.config import AppConfig
from serve_app.serve_config import ServedApp
from tests.access.cases import ADAPTER_REPO, adapter_files
from tests.conftest import TINY_REPO, tiny_files
from tests.integration.conftest import LogicalNode, cluster_of

pytestmark = pytest.mark.cluster

BEHAVIOURS = {
    "granted": Behaviour.granted,
    "never-asked": Behaviour.never_asked,
    "pending": Behaviour.pending,
    "none": None,
}


@pytest.fixture(scope="module")
def shared_hub():
    with LocalHub([Repo(TINY_REPO, tiny_files()), Repo(ADAPTER_REPO, adapter_files())]) as running:
        yield running


@pytest.fixture(scope="module")
def tokens(shared_hub):
    return {
        name: shared_hub.issue_token(behaviour, account=f"user-{name}")
        for name, behaviour in BEHAVIOURS.items()
        if behaviour is not None
    }


@pytest.fixture(scope="module")
def cluster(tokens):
    nodes = [LogicalNode(name, tokens.get(name), {"is": name}) for name in BEHAVIOURS]
    with cluster_of(*nodes) as running:
        yield running


def config(hub, *, access=None, **replica):
    return AppConfig.model_validate(
        {
            "model": {"repo_id": TINY_REPO},
            "access": {"endpoint": hub.url, **(access or {})},
            "replica": {"num_gpus": 1, **replica},
        }
    )


def rows(verdict):
    return {node.node_name: node.outcome.value for node in verdict.nodes}


def test_preflight_of_four_nodes_with_four_tokens_is_right_on_every_row(
    cluster, shared_hub, tokens
):
    """Each node is asked with its own token, and no byte of weights is asked for by the refused."""
    shared_hub.clear_log()
    verdict = preflight(config(shared_hub))
    assert rows(verdict) == {
        "granted": "granted",
        "never-asked": "license_not_accepted",
        "pending": "request_pending",
        "none": "no_token",
    }
    assert verdict.exit_code == 3
    assert verdict.commit == shared_hub.commits()[TINY_REPO]["main"]
    by_name = {node.node_name: node for node in verdict.nodes}
    assert by_name["pending"].token.account == "user-pending"
    assert by_name["none"].token.source == "none"
    assert len({node.token.fingerprint for node in verdict.nodes}) == 4
    assert verdict.hub_requests == sum(entry.origin == "hub" for entry in shared_hub.log)
    assert sum(entry.bytes_sent for entry in shared_hub.log if entry.origin != "hub") <= 9
    reported = json.dumps(verdict.to_json()) + verdict.table()
    assert not any(token in reported for token in tokens.values())
    assert not any(token.encode() in pickle.dumps(verdict) for token in tokens.values())


def test_preflight_of_a_selector_asks_only_nodes_that_may_host_a_replica(cluster, shared_hub):
    """Where no replica can land nobody has to be allowed anything."""
    chosen = config(shared_hub, label_selector={"is": "in(granted,other)"})
    verdict = require_access(chosen)
    assert rows(verdict) == {"granted": "granted"}
    assert verdict.exit_code == 0


def test_require_access_stops_the_build_with_the_table(cluster, shared_hub):
    """The one exception that Serve shows as it is."""
    with pytest.raises(RolloutBlocked) as caught:
        require_access(config(shared_hub))
    assert str(caught.value).startswith("Access BLOCKED: 3 of 4 nodes cannot read")


def test_preflight_proves_an_adapter_on_every_node_too(cluster, shared_hub, tokens):
    """The base is granted there; the adapter is not: blocked, with both named."""
    adapters = [{"name": "legal", "repo_id": ADAPTER_REPO}]
    both = AppConfig.model_validate(
        {
            "model": {"repo_id": TINY_REPO, "adapters": adapters},
            "access": {"endpoint": shared_hub.url},
            "engine": {"backend": "vllm"},
            "replica": {"num_gpus": 1, "label_selector": {"is": "in(granted,none)"}},
        }
    )
    token = tokens["granted"]
    shared_hub.set_behaviour(token, Behaviour.pending, repo_id=ADAPTER_REPO)
    try:
        verdict = preflight(both)
    finally:
        shared_hub.set_behaviour(token, Behaviour.granted, repo_id=ADAPTER_REPO)
    assert rows(verdict) == {"granted": "granted", "none": "no_token"}
    assert rows(verdict.adapters["legal"]) == {"granted": "request_pending", "none": "no_token"}
    assert {TINY_REPO, ADAPTER_REPO} <= set(verdict.table().replace("(", " ").split())
    alone = both.model_copy(
        update={"replica": both.replica.model_copy(update={"label_selector": {"is": "granted"}})}
    )
    approved = preflight(alone)
    assert approved.approved
    assert approved.commits == {
        "": shared_hub.commits()[TINY_REPO]["main"],
        "legal": shared_hub.commits()[ADAPTER_REPO]["main"],
    }


def test_preflight_without_an_eligible_node_says_what_was_asked_and_what_exists(
    cluster, shared_hub
):
    """Not granted, not refused: exit 4."""
    verdict = preflight(config(shared_hub, num_gpus=8))
    assert verdict.exit_code == 4
    assert "GPU 8" in verdict.table()
    assert "4 with CPU 1, GPU 1" in " ".join(verdict.table().split())


def test_preflight_without_an_eligible_node_can_be_deferred_with_the_commit_pinned(
    cluster, shared_hub
):
    """A cluster that scales from zero rolls out, with the note that nothing is proven yet."""
    verdict = require_access(config(shared_hub, access={"on_no_nodes": "defer"}, num_gpus=8))
    assert verdict.is_deferred
    assert verdict.commit == shared_hub.commits()[TINY_REPO]["main"]
    assert verdict.table().startswith("Access DEFERRED, nothing is proven")
    assert not preflight(config(shared_hub, access={"on_no_nodes": "defer"})).approved


def test_preflight_counts_the_replicas_environment_and_not_the_nodes(cluster, shared_hub, tokens):
    """A deployment's override of the token's variable reaches the probe."""
    (own,) = placement.placements_of(config(shared_hub, label_selector={"is": "granted"}))
    env = {"env_vars": {"HF_TOKEN": tokens["pending"]}}
    verdict = preflight(config(shared_hub), placements=[Placement(own.demands, env)])
    assert rows(verdict) == {"granted": "request_pending"}


def test_preflight_keeps_the_others_answers_beside_a_hanging_hub(cluster, shared_hub, tokens):
    """The node that waits for it says so; the gate is bounded."""
    shared_hub.set_behaviour(tokens["pending"], Behaviour.hang)
    try:
        verdict = preflight(config(shared_hub, access={"timeout_s": 0.5, "deadline_s": 6}))
    finally:
        shared_hub.set_behaviour(tokens["pending"], Behaviour.pending)
    assert rows(verdict)["pending"] == "hub_unreachable"
    assert rows(verdict)["granted"] == "granted"
    assert verdict.duration_s < 8


def test_check_cluster_uses_the_one_this_process_is_connected_to(cluster, shared_hub):
    """The command line's gate is the same gate."""
    chosen = config(shared_hub, label_selector={"is": "granted"})
    assert check_cluster(ServedApp("llm", chosen, {})).exit_code == 0


def test_check_from_outside_asks_the_nodes_and_the_token_of_the_override(
    cluster, shared_hub, tokens, tmp_path
):
    """What the YAML overrides of a deployment leaves one node and fetches the token there."""
    token_file = tmp_path / "token"
    token_file.write_text(tokens["granted"])
    override = {
        "name": "LLMServer",
        "ray_actor_options": {
            "num_gpus": 1,
            "label_selector": {"is": "none"},
            "runtime_env": {"env_vars": {"HF_TOKEN_PATH": str(token_file)}},
        },
    }
    args = {"model": {"repo_id": TINY_REPO}, "access": {"endpoint": shared_hub.url}}
    app = {
        "name": "llm",
        "import_path": "serve_app.app:build_app",
        "args": args,
        "runtime_env": {"env_vars": {"SOME": "thing"}},
        "deployments": [override],
    }
    done = serve_app("check", tmp_path, cluster, app)
    assert done.returncode == 0, done.stdout + done.stderr
    (node,) = json.loads(done.stdout)["nodes"]
    assert (node["node_name"], node["outcome"]) == ("none", "granted")
    assert node["token"]["source"] == f"file:{token_file}"


def test_receipt_shows_each_nodes_own(cluster, shared_hub, tokens, tmp_path):
    """Two tokens, two proofs; the node that was never proven is named and makes the exit code 4."""
    app = {
        "name": "llm",
        "import_path": "serve_app.app:build_app",
        "args": {"model": {"repo_id": TINY_REPO}, "access": {"endpoint": shared_hub.url}},
    }

    def ask(command, nodes):
        app["args"]["replica"] = {"num_gpus": 1, "label_selector": {"is": f"in({nodes})"}}
        return serve_app(command, tmp_path, cluster, app)

    shared_hub.set_behaviour(tokens["pending"], Behaviour.granted)
    try:
        checked = ask("check", "granted,pending")
        shared_hub.clear_log()
        done = ask("receipt", "granted,pending,none")
    finally:
        shared_hub.set_behaviour(tokens["pending"], Behaviour.pending)
    assert checked.returncode == 0, checked.stderr
    assert done.returncode == 4, done.stderr
    assert shared_hub.log == []
    shown = {node["node_name"]: node for node in json.loads(done.stdout)["nodes"]}
    assert shown["none"]["receipt"] is None
    assert "with the token in use (none)" in shown["none"]["message"]
    proofs = [shown[name]["receipt"] for name in ("granted", "pending")]
    assert {proof["commit"] for proof in proofs} == {shared_hub.commits()[TINY_REPO]["main"]}
    assert len({proof["token"]["fingerprint"] for proof in proofs}) == 2
    assert not any(token in done.stdout for token in tokens.values())


def serve_app(command, folder, cluster, app):
    """Run `serve-app COMMAND` on a file with the application, from outside the cluster."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [app]}))
    program = Path(sys.executable).parent / "serve-app"
    return subprocess.run(
        [program, command, str(path), "--json", "--address", cluster.address],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )


def test_preflight_reports_a_node_that_dies_and_asks_one_that_joins(cluster, shared_hub, tokens):
    """Ray takes a while to notice a death; the others' answers do not suffer. Runs last."""
    cluster.remove("none")
    cluster.add(LogicalNode("joined", tokens["granted"], {"is": "granted"}))
    chosen = config(shared_hub, label_selector={"is": "!never-asked"})
    verdict = preflight(chosen)
    assert rows(verdict) == {
        "granted": "granted",
        "joined": "granted",
        "none": "probe_failed",
        "pending": "request_pending",
    }
    (lost,) = [node for node in verdict.nodes if node.node_name == "none"]
    assert "left the cluster" in lost.hub_message
