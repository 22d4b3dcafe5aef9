"""The Kubernetes samples fit the package: commands exist, labels meet their selectors."""

from pathlib import Path

import pytest
import yaml

from serve_app import serve_config
from serve_app.__main__ import _parser

SAMPLE = Path(__file__).parent.parent.parent / "configs" / "kubernetes" / "join-gate.yaml"


@pytest.fixture
def documents():
    found = {document["kind"]: document for document in yaml.safe_load_all(SAMPLE.read_text())}
    assert set(found) == {"ConfigMap", "RayCluster"}
    return found


@pytest.fixture
def app(documents, tmp_path):
    path = tmp_path / "app.yaml"
    path.write_text(documents["ConfigMap"]["data"]["app.yaml"])
    (app,) = serve_config.read(path)
    return app


@pytest.fixture
def group(documents):
    (group,) = documents["RayCluster"]["spec"]["workerGroupSpecs"]
    return group


def test_the_init_container_runs_a_command_that_exists(group):
    """A renamed flag would leave every pod waiting for ever."""
    (container,) = group["template"]["spec"]["initContainers"]
    program, *arguments = container["command"]
    options = _parser().parse_args(arguments)
    assert program == "serve-app"
    assert options.this_node is True
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(options.config.parent) in mounted


def test_the_nodes_label_is_what_the_replicas_ask_for(group, app):
    """A replica goes nowhere but to a node that passed its gate."""
    assert app.config.replica.label_selector == group["labels"]
    assert "labels" not in group["rayStartParams"]  # KubeRay refuses them there since 1.5


def test_the_token_is_a_mounted_file_in_the_gate_and_in_the_replica(group, app):
    """Both read the same secret, and no value stands in the manifest."""
    folder = str(Path(app.config.access.token_file).parent)
    spec = group["template"]["spec"]
    for container in [*spec["initContainers"], *spec["containers"]]:
        assert folder in {mount["mountPath"] for mount in container["volumeMounts"]}
