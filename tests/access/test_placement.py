"""Where replicas may go: the config, and what a Serve config overrides."""

import pytest
from ray.serve._private.utils import override_runtime_envs_except_env_vars
from ray.serve.schema import ServeApplicationSchema

from serve_app.access import placement
from serve_app.access.nodes import Demand
from serve_app.config import AppConfig

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
    monkeypatch.setattr(placement, "_goal_applications", lambda: applications)
    return applications


def test_without_serve_the_config_says_where(goal):
    """In the caller's own environment, which tasks inherit."""
    assert placement.placements_of(CONFIG) == (placement.Placement((OWN,)),)
    assert placement.asked_by(CONFIG).runtime_env == {}


def test_other_applications_do_not_count(goal):
    """Neither those with other args nor those that are not ours."""
    goal += [application(args={"model": {"repo_id": "acme/other"}}), application(args={"x": 1})]
    assert placement.placements_of(CONFIG) == (placement.Placement((OWN,)),)


def test_the_environment_of_the_application_is_the_replicas(goal):
    """It is passed on even where the builder would have inherited it."""
    goal.append(application(runtime_env={"env_vars": {"A": "1"}}))
    assert placement.placements_of(CONFIG)[0].runtime_env == {"env_vars": {"A": "1"}}


def test_overrides_of_the_deployment_count_though_the_builder_never_sees_them(goal):
    """Resources replace the config's, as Serve does; variables are combined, the rest replaced."""
    own = {"env_vars": {"B": "2", "C": "2"}, "pip": ["y"]}
    options = {"num_gpus": 1, "label_selector": {"zone": "in(a,b)"}, "runtime_env": own}
    goal.append(
        application({"name": "LLMServer", "ray_actor_options": options}, runtime_env=APP_ENV)
    )
    (found,) = placement.placements_of(CONFIG)
    assert found.demands == (Demand({"CPU": 1, "GPU": 1}, {"zone": "in(a,b)"}),)
    assert found.runtime_env == override_runtime_envs_except_env_vars(APP_ENV, own)


def test_overrides_of_the_ingress_do_not_count(goal):
    """Only the deployment that reads the weights matters."""
    goal.append(application({"name": "Ingress", "ray_actor_options": {"num_gpus": 8}}))
    assert placement.placements_of(CONFIG)[0].demands == (OWN,)


def test_any_bundle_of_a_placement_group_may_hold_the_replica(goal):
    """Each is a demand of its own."""
    bundles = [{"CPU": 1.0}, {"GPU": 1.0}]
    goal.append(application({"name": "LLMServer", "placement_group_bundles": bundles}))
    assert placement.placements_of(CONFIG)[0].demands == (Demand({"CPU": 1}), Demand({"GPU": 1}))


def test_two_applications_with_the_same_args_are_both_checked(goal):
    """The builder does not know which of them it builds; equal ones are checked once."""
    special = {"name": "LLMServer", "ray_actor_options": {"num_gpus": 1}}
    goal += [application(), application(name="again"), application(special, name="special")]
    assert len(placement.placements_of(CONFIG)) == 2
