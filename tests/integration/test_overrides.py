"""What the YAML overrides of a deployment counts for a check from outside too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY_REPO
from tests.integration.conftest import LogicalNode, cluster_of


@pytest.mark.cluster
def test_check_from_outside_asks_the_nodes_and_the_token_of_the_override(
    hub, tmp_path, monkeypatch
):
    """Its label selector leaves one node, and its environment fetches the token."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    token_file = tmp_path / "token"
    token_file.write_text(hub.issue_token(account="alice"))
    override = {
        "name": "LLMServer",
        "ray_actor_options": {
            "num_gpus": 1,
            "label_selector": {"zone": "b"},
            "runtime_env": {"env_vars": {"HF_TOKEN_PATH": str(token_file)}},
        },
    }
    args = {"model": {"repo_id": TINY_REPO}, "access": {"endpoint": hub.url}}
    app = {
        "name": "llm",
        "import_path": "serve_app.app:build_app",
        "args": args,
        "runtime_env": {"env_vars": {"SOME": "thing"}},
        "deployments": [override],
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": [app]}))
    nodes = [LogicalNode("a", labels={"zone": "a"}), LogicalNode("b", labels={"zone": "b"})]
    with cluster_of(*nodes) as running:
        done = subprocess.run(
            [
                Path(sys.executable).parent / "serve-app",
                "check",
                str(config),
                "--json",
                "--address",
                running.address,
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (node,) = json.loads(done.stdout)["nodes"]
    assert (node["node_name"], node["outcome"]) == ("b", "granted")
    assert node["token"]["source"] == f"file:{token_file}"
