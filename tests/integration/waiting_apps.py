"""A small application whose build, and whose replicas' start, wait for a file."""

import time
from pathlib import Path
from typing import Any

from ray import serve

POLL_S = 0.05


def wait_for(file):
    """Return as soon as there is such a file."""
    while not Path(file).exists():
        time.sleep(POLL_S)


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Version:
    def __init__(self, name, start_when):
        wait_for(start_when)
        self.name = name

    def __call__(self):
        return self.name


def build(args):
    """Build a version; `options` are those of its deployment."""
    wait_for(args["build_when"])
    deployment: Any = Version
    return deployment.options(**args.get("options", {})).bind(args["name"], args["start_when"])
