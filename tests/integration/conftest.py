"""Logical nodes on one machine: Ray clusters with a name, a GPU and a token for each node."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent
START_TRIES = 3  # a raylet has 30 s to come up, which a loaded machine may miss
# Where a replica that cannot start is not the point: Serve would try three times, 10 s each.
ONE_TRY = {"RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1"}


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, which loads and answers at once, where its words do not matter."""
    from tests.models import make_model  # which imports torch

    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@dataclass(frozen=True, slots=True)
class LogicalNode:
    """One node to be: its name, its token, its labels, its GPUs, the rest of its environment."""

    name: str
    token: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    num_gpus: int = 1
    env: Mapping[str, str] = field(default_factory=dict)


class RunningCluster:
    """A cluster of logical nodes; the head has CPUs for Serve and no GPU.

    Args:
        cluster: Ray's own, for what is not offered here.
    """

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self._nodes: dict[str, Any] = {}

    @property
    def dashboard(self) -> str:
        """The address of its REST interface, if it was asked for."""
        return f"http://{self.cluster.webui_url}"

    @property
    def address(self) -> str:
        """What `ray.init(address=...)` takes."""
        return str(self.cluster.address)

    def add(self, node: LogicalNode) -> None:
        """Start one more node and wait until the cluster knows it."""
        token = {} if node.token is None else {"HF_TOKEN": node.token}
        variables = {**node.env, **token}
        for attempt in range(1, START_TRIES + 1):
            try:
                self._nodes[node.name] = self.cluster.add_node(
                    num_cpus=1,
                    num_gpus=node.num_gpus,
                    node_name=node.name,
                    env_vars=variables,
                    labels=dict(node.labels),
                )
            except Exception:
                if attempt == START_TRIES:
                    raise
            else:
                return

    def kill_raylet(self, name: str) -> None:
        """Kill a node's raylet alone; its workers look for the process, so none may be left."""
        (raylet,) = self._nodes[name].all_processes["raylet"]
        raylet.process.kill()
        raylet.process.wait()

    def remove(self, name: str) -> None:
        """Let a node die."""
        self.cluster.remove_node(self._nodes.pop(name), allow_graceful=False)


@contextmanager
def cluster_of(
    *nodes: LogicalNode,
    head_cpus: int = 2,
    env: Mapping[str, str] | None = None,
    dashboard: bool = False,
    home: Path | None = None,
) -> Iterator[RunningCluster]:
    """Run a cluster and connect this process to it.

    The environment of whoever runs the tests is kept out: nodes see their own token only, and
    what `env` gives to all of them. Ray's sessions are in `home`, by default in a new folder.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("RAY_", "HF_TOKEN", "HUGGING_FACE_")):
                patch.delenv(name)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_metrics_report_interval_ms", "1000")  # 10 s otherwise
        # Sockets need short paths; and a dashboard that ends last may still write into them.
        with tempfile.TemporaryDirectory(
            prefix="ray", dir="/tmp", ignore_cleanup_errors=True
        ) as own:
            patch.setenv("RAY_TMPDIR", str(home or own))
            # Ray reads its environment when it is imported.
            import ray
            from ray.cluster_utils import Cluster

            head = {
                "num_cpus": head_cpus,
                "num_gpus": 0,
                "include_dashboard": dashboard,
                "dashboard_port": free_port(),  # another cluster may have Ray's usual one
                "dashboard_agent_listen_port": 0,
            }
            for attempt in range(1, START_TRIES + 1):
                try:  # Ray gives a node 30 s, which a busy machine may not
                    cluster = Cluster(initialize_head=True, head_node_args=head)
                    break
                except Exception:
                    if attempt == START_TRIES:
                        raise
            running = RunningCluster(cluster)
            try:
                for node in nodes:
                    running.add(node)
                ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
                yield running
            finally:
                ray.shutdown()
                cluster.shutdown()
