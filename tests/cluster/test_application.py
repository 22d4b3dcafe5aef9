"""Where the deployments of somebody else's application go, as Serve decides it."""

from typing import Any

import pytest
from ray import serve
from ray.serve.schema import DeploymentSchema

from serve_app.cluster.application import placements
from serve_app.errors import ConfigError

ENV = {"env_vars": {"A": "1"}}


@serve.deployment
class Part:
    def __init__(self, *parts):
        self.parts = parts


def part(name, *parts, **options):
    deployment: Any = Part
    return deployment.options(name=name, **options).bind(*parts)


def application():
    """A front, one deployment on a GPU and one in a placement group of two bundles."""
    options = {"num_gpus": 1, "runtime_env": {"env_vars": {"B": "2"}}}
    loader = part("Loader", ray_actor_options=options)
    group = part("Group", placement_group_bundles=[{"CPU": 1}, {"GPU": 2, "CPU": 1}])
    return part("Front", loader, group)


def asked(found):
    return [
        [{name: n for name, n in demand.resources.items() if n} for demand in place.demands]
        for place in found
    ]


def test_placements_of_those_on_gpus_load_the_weights():
    """Each with its own bundles, and the application's environment under its own."""
    found = placements(application(), runtime_env=ENV)
    assert asked(found) == [[{"CPU": 1, "GPU": 1}], [{"CPU": 1}, {"GPU": 2, "CPU": 1}]]
    assert [place.runtime_env for place in found] == [{"env_vars": {"A": "1", "B": "2"}}, ENV]


def test_placements_of_named_ones_and_of_all_without_gpus():
    """Names win; equal places are one."""
    (front,) = placements(application(), names=["Front"])
    assert asked([front]) == [[{"CPU": 1}]]
    assert len(placements(part("Front", part("A"), part("B")))) == 1
    with pytest.raises(ConfigError, match="no Lader; it has Front, Group, Loader"):
        placements(application(), names=["Lader"])


def test_placements_take_the_configs_overrides_of_the_code():
    """Resources, labels and bundles of the YAML take the place of the code's."""
    changed = [
        DeploymentSchema(name="Loader", ray_actor_options={"num_gpus": 2}),
        DeploymentSchema(
            name="Group",
            placement_group_bundles=[{"GPU": 4, "CPU": 1}],
            placement_group_bundle_label_selector=[{"zone": "b"}],
        ),
    ]
    loader, group = placements(application(), overrides=changed)
    assert asked([loader, group]) == [[{"CPU": 1, "GPU": 2}], [{"GPU": 4, "CPU": 1}]]
    assert group.demands[0].labels == {"zone": "b"}


def test_placements_run_no_hook_of_the_replicas_process():
    """The builder of ray.serve.llm sets one, which would import an engine."""
    env = {"worker_process_setup_hook": "m.hook", "env_vars": {"A": "1"}}
    (found,) = placements(part("L", ray_actor_options={"num_gpus": 1, "runtime_env": env}))
    assert found.runtime_env == ENV
