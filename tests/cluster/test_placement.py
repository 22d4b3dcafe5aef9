"""Where replicas may go: the config, and what a Serve config overrides."""

import socket
import threading
import time

import pytest
from ray.serve._private.utils import override_runtime_envs_except_env_vars
from ray.serve.schema import ServeApplicationSchema

from serve_app.cluster import connection, placement
from serve_app.cluster.nodes import Demand
from serve_app.config import AppConfig
from serve_app.errors import ConfigError

ARGS = {"model": {"repo_id": "acme/tiny"}, "replica": {"num_gpus": 2, "accelerator_type": "H100"}}
CONFIG = AppConfig.model_validate(ARGS)
OWN = Demand({"CPU": 1, "GPU": 2, "accelerator_type:H100": 0.001})
APP_ENV = {"env_vars": {"A": "1", "B": "1"}, "pip": ["x"]}


def application(*deployments, args=ARGS, **facts):
    return ServeApplicationSchema.model_validate(
        {
            "name": "llm",
            "import_path": "serve_app.app:build_app",
            "args": args,
            "deployments": list(deployments),
            **facts,
        }
    )


@pytest.fixture
def goal(monkeypatch):
    """Set what the Serve controller is rolling out."""
    applications = []
    monkeypatch.setattr(placement, "goal_applications", lambda: applications)
    return applications


def test_placements_of_the_config_without_serve(goal):
    """In the caller's own environment, which tasks inherit."""
    assert placement.placements_of(CONFIG) == (placement.Placement((OWN,)),)
    assert placement.asked_by(CONFIG).runtime_env == {}


def test_placements_of_do_not_count_other_applications(goal):
    """Neither those with other args nor those that are not ours."""
    goal += [application(args={"model": {"repo_id": "acme/other"}}), application(args={"x": 1})]
    assert placement.placements_of(CONFIG) == (placement.Placement((OWN,)),)


def test_placements_of_have_the_environment_of_the_application(goal):
    """It is passed on even where the builder would have inherited it."""
    goal.append(application(runtime_env={"env_vars": {"A": "1"}}))
    assert placement.placements_of(CONFIG)[0].runtime_env == {"env_vars": {"A": "1"}}


def test_placements_of_count_overrides_that_the_builder_never_sees(goal):
    """Resources replace the config's, as Serve does; variables are combined, the rest replaced."""
    own = {"env_vars": {"B": "2", "C": "2"}, "pip": ["y"]}
    options = {"num_gpus": 1, "label_selector": {"zone": "in(a,b)"}, "runtime_env": own}
    goal.append(
        application({"name": "LLMServer", "ray_actor_options": options}, runtime_env=APP_ENV)
    )
    (found,) = placement.placements_of(CONFIG)
    assert found.demands == (Demand({"CPU": 1, "GPU": 1}, {"zone": "in(a,b)"}),)
    assert found.runtime_env == override_runtime_envs_except_env_vars(APP_ENV, own)


def test_placement_of_outside_is_that_of_the_builder(goal):
    """`serve-app check` reads the file, the builder asks the controller; they agree."""
    options = {"num_gpus": 1, "runtime_env": {"env_vars": {"B": "2"}}}
    reported = application(
        {"name": "LLMServer", "ray_actor_options": options},
        {"name": "Ingress", "ray_actor_options": {"num_cpus": 3}},
        runtime_env=APP_ENV,
    )
    goal.append(reported)
    outside = placement.placement_of(CONFIG, APP_ENV, reported.deployments)
    assert placement.placements_of(CONFIG) == (outside,)
    assert outside.runtime_env["env_vars"] == {"A": "1", "B": "2"}
    assert placement.placement_of(CONFIG, {}) == placement.asked_by(CONFIG)


def test_placements_of_do_not_count_overrides_of_the_ingress(goal):
    """Only the deployment that reads the weights matters."""
    goal.append(application({"name": "Ingress", "ray_actor_options": {"num_gpus": 8}}))
    assert placement.placements_of(CONFIG)[0].demands == (OWN,)


def test_placements_of_any_bundle_of_a_placement_group(goal):
    """Each is a demand of its own."""
    bundles = [{"CPU": 1.0}, {"GPU": 1.0}]
    goal.append(application({"name": "LLMServer", "placement_group_bundles": bundles}))
    assert placement.placements_of(CONFIG)[0].demands == (Demand({"CPU": 1}), Demand({"GPU": 1}))


def test_placements_of_two_applications_with_the_same_args_are_both_checked(goal):
    """The builder does not know which of them it builds; equal ones are checked once."""
    special = {"name": "LLMServer", "ray_actor_options": {"num_gpus": 1}}
    goal += [application(), application(name="again"), application(special, name="special")]
    assert len(placement.placements_of(CONFIG)) == 2


@pytest.fixture
def no_recorded_cluster(monkeypatch):
    """Keep the clusters of whoever runs the tests out of them."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", frozenset)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: None)


def test_find_cluster_looks_for_none_beyond_what_is_named(no_recorded_cluster, monkeypatch):
    """A Ray process of somebody else on the same machine is left alone."""
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: {"192.0.2.1:6379"})
    assert connection.find_cluster(None) is None


@pytest.mark.parametrize("named", ["argument", "variable"])
def test_find_cluster_that_is_named_and_not_there_is_a_config_error(
    no_recorded_cluster, monkeypatch, named
):
    """At once, with the address in the message."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{held.getsockname()[1]}"
        if named == "variable":
            monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}"):
            connection.find_cluster(address if named == "argument" else None)


def test_find_cluster_with_something_else_at_the_address_is_a_config_error(
    no_recorded_cluster, monkeypatch
):
    """Within the limit; Ray itself would try for minutes."""
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 1.0)
    release = threading.Event()
    monkeypatch.setattr(connection, "_greet", lambda _: release.wait(30))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ConfigError, match="is no Ray cluster that lets this process in"):
            connection.find_cluster(address)
    release.set()
    assert time.monotonic() - began < 4
