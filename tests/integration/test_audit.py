"""`serve-app receipt` on a cluster: each node shows its own proof."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY_REPO
from tests.integration.conftest import LogicalNode, cluster_of


@pytest.mark.cluster
def test_receipt_shows_each_nodes_own(hub, tmp_path, monkeypatch):
    """Two tokens, two proofs; the node that was never proven is named and makes the exit code 4."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    tokens = {name: hub.issue_token(account=f"user-{name}") for name in ("a", "b")}
    args = {"model": {"repo_id": TINY_REPO}, "access": {"endpoint": hub.url}}
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": [app]}))
    nodes = [LogicalNode(name, token) for name, token in tokens.items()]
    with cluster_of(*nodes) as running:
        checked = serve_app("check", config, running.address)
        running.add(LogicalNode("bare"))
        hub.clear_log()
        done = serve_app("receipt", config, running.address)
    assert checked.returncode == 0, checked.stderr
    assert done.returncode == 4, done.stderr
    assert hub.log == []
    shown = {node["node_name"]: node for node in json.loads(done.stdout)["nodes"]}
    assert shown["bare"]["receipt"] is None
    assert "with the token in use (none)" in shown["bare"]["message"]
    proofs = {name: shown[name]["receipt"] for name in tokens}
    assert {proof["commit"] for proof in proofs.values()} == {hub.commits()[TINY_REPO]["main"]}
    assert len({proof["token"]["fingerprint"] for proof in proofs.values()}) == 2
    assert not any(token in done.stdout for token in tokens.values())


def serve_app(command, config, address):
    return subprocess.run(
        [
            Path(sys.executable).parent / "serve-app",
            command,
            str(config),
            "--json",
            "--address",
            address,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
