"""The Serve YAML around our args."""

from pathlib import Path

import pytest
import yaml

from serve_app import serve_config
from serve_app.cluster.placement import placement_of
from serve_app.errors import ConfigError

TOKEN = "hf_" + "Qz7" * 12
GOOD = {
    "http_options": {"port": 8000},
    "applications": [
        {
            "name": "llm",
            "import_path": "serve_app.app:build_app",
            "args": {"model": {"repo_id": "acme/tiny"}},
        }
    ],
}
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def read(tmp_path, document):
    path = tmp_path / "x.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return serve_config.read(path)


def changed(**application):
    return GOOD | {"applications": [GOOD["applications"][0] | application]}


def test_read_takes_serves_own_traces(tmp_path):
    """The lines that the reference shows are taken; a wrong key in them is not."""
    assert read(tmp_path, GOOD | {"tracing_config": {"enabled": True, "sampling_ratio": 0.01}})
    with pytest.raises(ConfigError, match="tracing_config"):
        read(tmp_path, GOOD | {"tracing_config": {"on": True}})


def test_read_keeps_overrides_of_deployments_with_their_application(tmp_path):
    """They decide where replicas go, and the builder never sees them."""
    special = {"name": "LLMServer", "ray_actor_options": {"label_selector": {"zone": "a"}}}
    plain = GOOD["applications"][0] | {"name": "plain", "route_prefix": "/plain"}
    document = changed(deployments=[special])
    document["applications"].append(plain)
    first, second = read(tmp_path, document)
    (kept,) = first.deployments
    assert kept.model_dump(exclude_unset=True) == special
    assert second.deployments == ()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_read_takes_every_shipped_config(path):
    """The files in configs/ pass their own check."""
    assert serve_config.read(path)[0].config.model.repo_id


def test_read_finds_our_applications(tmp_path):
    """Other people's applications in the same file are left alone."""
    other = {"name": "x", "route_prefix": "/x", "import_path": "a:b"}
    document = GOOD | {"applications": [*GOOD["applications"], other]}
    assert [app.name for app in read(tmp_path, document)] == ["llm"]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("a: [1,\nb", "not valid YAML at line"),
        ("- 1", "must be a mapping"),
        ({"applications": []}, "must be a list of applications"),
        (GOOD | {"aplications": 1}, "unknown key aplications; did you mean applications?"),
        (changed(model={"repo_id": "a/b"}), "model belongs under `args:`"),
        (changed(impot_path="x"), "did you mean import_path?"),
        (
            changed(import_path="other:app"),
            "no application has `import_path: serve_app.app:build_app`",
        ),
        (
            changed(args={"model": {"repo": "a/b"}}),
            "args.model.repo: unknown key; did you mean repo_id?",
        ),
        (GOOD | {"http_options": {"port": "x"}}, "http_options.port"),
    ],
)
def test_read_reports_a_fault_in_one_clear_line(tmp_path, document, words):
    """The message names the key and the fix."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, document)
    assert words in caught.value.message


@pytest.mark.parametrize(
    "document",
    [
        changed(runtime_env={"env_vars": {"HF_TOKEN": "anything"}}),
        changed(runtime_env={"env_vars": {"X": TOKEN}}),
        changed(deployments=[{"name": "LLMServer", "user_config": {"a": TOKEN}}]),
        changed(
            deployments=[
                {"name": "L", "ray_actor_options": {"runtime_env": {"env_vars": {"HF_TOKEN": "y"}}}}
            ]
        ),
    ],
)
def test_read_refuses_a_token_anywhere_in_the_yaml(tmp_path, document):
    """Also in runtime_env and user_config, which Ray keeps in clear text."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, document)
    assert TOKEN not in caught.value.message
    assert "mounted Kubernetes secret" in caught.value.message


def test_read_reports_a_missing_file_in_one_sentence(tmp_path):
    """No traceback for a wrong path."""
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        serve_config.read(tmp_path / "none.yaml")


def foreign(tmp_path, *deployments, **application):
    path = tmp_path / "x.yaml"
    app = {"name": "x", "import_path": "their.app:build", "args": {"any": "thing"}}
    document = {"applications": [app | application | {"deployments": list(deployments)}]}
    path.write_text(yaml.safe_dump(document))
    return serve_config.read_foreign(path, repo_id="acme/tiny", revision="v1")


def placement(app):
    return placement_of(app.config, app.runtime_env, app.deployments)


def test_read_foreign_counts_every_deployment_with_a_gpu(tmp_path):
    """Each is asked on its own nodes and in its own environment; a router is left out."""
    options = {"num_gpus": 1, "runtime_env": {"env_vars": {"B": "2"}}}
    first, second = foreign(
        tmp_path,
        {"name": "Router", "ray_actor_options": {"num_cpus": 1}},
        {"name": "One", "ray_actor_options": options | {"label_selector": {"zone": "a"}}},
        {"name": "Two", "ray_actor_options": {"num_gpus": 2, "label_selector": {"zone": "b"}}},
        runtime_env={"env_vars": {"A": "1"}},
    )
    assert (first.name, second.name) == ("x/One", "x/Two")
    assert (first.config.model.repo_id, first.config.model.revision) == ("acme/tiny", "v1")
    assert [placement(app).demands[0].labels for app in (first, second)] == [
        {"zone": "a"},
        {"zone": "b"},
    ]
    assert placement(first).runtime_env == {"env_vars": {"A": "1", "B": "2"}}
    assert placement(second).demands[0].resources["GPU"] == 2


def test_read_foreign_takes_bundles_and_an_explicit_zero_as_they_are(tmp_path):
    """Four GPUs in a placement group are four; a replica on CPU asks for none."""
    bundles = [{"CPU": 1}, {"GPU": 4}]
    (grouped,) = foreign(tmp_path, {"name": "M", "placement_group_bundles": bundles})
    assert [demand.resources for demand in placement(grouped).demands] == bundles
    (on_cpu,) = foreign(tmp_path, {"name": "M", "ray_actor_options": {"num_gpus": 0}})
    assert placement(on_cpu).demands[0].resources["GPU"] == 0


def test_read_foreign_asks_for_one_gpu_by_default(tmp_path):
    """Nothing in the file says what a replica needs."""
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"name": "x", "import_path": "a:b"}]}))
    (found,) = serve_config.read_foreign(path, repo_id="acme/tiny", revision="main")
    assert found.config.replica.num_gpus == 1
    with pytest.raises(ConfigError, match="--repo-id"):
        serve_config.read(path)


def test_read_foreign_refuses_a_wrong_repository_name(tmp_path):
    """The name comes from the command line and is checked like one in the file."""
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"name": "x", "import_path": "a:b"}]}))
    with pytest.raises(ConfigError, match="owner/name"):
        serve_config.read_foreign(path, repo_id="a/b/c", revision="main")


@pytest.mark.parametrize("scaling", [{"upscale_delay_s": 5}, {"min_replicas": 2}])
def test_read_refuses_half_an_autoscaler(tmp_path, scaling):
    """Serve would set both bounds to 1 without a word."""
    override = {"name": "LLMServer", "autoscaling_config": scaling}
    with pytest.raises(ConfigError, match=r"under args\.replica"):
        read(tmp_path, changed(deployments=[override]))
    whole = override | {"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}}
    assert read(tmp_path, changed(deployments=[whole]))
