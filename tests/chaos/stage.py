"""Where a fault strikes: logical nodes that share nothing, a Hub, a service and its load."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.local_hub import Behaviour, LocalHub, Repo
from tests.chaos import inside
from tests.chaos.load import Load
from tests.chaos.nodes import Setup, make_node, small_disk, with_clock
from tests.integration.conftest import RunningCluster, cluster_of
from tests.integration.homes import make_homes
from tests.integration.service import SERVING, Service
from tests.models import make_model

REPO = "acme/chaos"
WARM_S = 4.0  # of load before the fault, and again after the recovery
LIMIT_S = 120.0  # for a recovery


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica of the LLM server."""

    name: str
    actor: str
    pid: int
    node: str
    state: str


class Stage:
    """A running service; `strike` and `recovered` are noted for the table."""

    def __init__(
        self,
        setup: Setup,
        hub: LocalHub,
        repo: Repo,
        cluster: RunningCluster,
        homes: dict[str, Path],
        tokens: dict[str, str],
    ) -> None:
        self.setup, self.hub, self.repo, self.cluster = setup, hub, repo, cluster
        self.homes, self.tokens = homes, tokens
        self.service = Service(hub, cluster, tokens)
        self.load = Load(self.service.url, "chaos", per_s=setup.per_s, tokens=setup.tokens)
        self.struck_at: float | None = None
        self.recovered_at: float | None = None
        self.streams_lost = 0

    def config(self, **changes: Any) -> dict[str, Any]:
        """Return the application's config; `changes` are of its `args:`."""
        setup = self.setup
        args = {
            "model": {"repo_id": REPO, "served_name": "chaos", **setup.model},
            "access": {"endpoint": self.hub.url, "timeout_s": 2, **setup.access},
            "replica": {
                "num_gpus": 0,
                "num_cpus": 1 / setup.room,
                "label_selector": SERVING,
                "min_replicas": setup.replicas,
                "max_replicas": setup.replicas,
            },
            "engine": {
                "max_context_tokens": 512,
                "kv_cache_cpu_gib": 0.1,
                "native_cpu": setup.native,
                **setup.engine,
            },
            "logging": setup.logging,
            **changes,
        }
        app: dict[str, Any] = {
            "name": "llm",
            "import_path": "serve_app.app:build_app",
            "args": args,
        }
        if setup.gpus:
            share = {"num_gpus": setup.gpus / setup.room, "num_cpus": 1 / setup.room}
            options = {**share, "label_selector": SERVING}
            app["deployments"] = [{"name": "LLMServer", "ray_actor_options": options}]
        return app

    def deploy(self, **changes: Any) -> float:
        """Deploy and wait until all replicas run; returns the seconds it took."""
        began = time.monotonic()
        self.service.put_app(self.config(**changes))
        status = self.service.wait("RUNNING", "DEPLOY_FAILED", timeout_s=240)
        if status.status != "RUNNING":
            raise RuntimeError(status.message)
        return time.monotonic() - began

    @contextmanager
    def withdrawn(self, node: str) -> Iterator[None]:
        """Take the grant from a node's token, for as long as the block takes."""
        self.hub.set_behaviour(self.tokens[node], Behaviour.never_asked)
        try:
            yield
        finally:
            self.hub.set_behaviour(self.tokens[node], Behaviour.granted)

    def scale(self, replicas: int) -> None:
        """Change the number of replicas, which builds nothing, and wait until it is so."""
        app = self.config()
        app["deployments"] = [{"name": "LLMServer", "num_replicas": replicas}]
        self.service.put_app(app)
        if not self.wait_until(
            lambda: [r.state for r in self.replicas()] == ["RUNNING"] * replicas
        ):
            raise RuntimeError(f"not {replicas} replicas within {LIMIT_S:.0f} s")

    def lose(self, replica: Replica, fault: Callable[[], object] = lambda: None) -> None:
        """Let a fault happen, and kill a replica, whose successor meets it."""

        def both() -> None:
            fault()
            self.streams_lost = self.streams_of(replica)
            os.kill(replica.pid, signal.SIGKILL)

        self.strike(both)

    def strike(self, fault: Callable[[], object], *, settle_s: float = WARM_S) -> None:
        """Let the load become steady, then let the fault happen."""
        time.sleep(settle_s)
        self.struck_at = time.monotonic()
        fault()

    def recovered(self, is_well: Callable[[], bool]) -> None:
        """Wait until all is well again, and watch it for a while."""
        if self.wait_until(is_well):
            self.recovered_at = time.monotonic()
            time.sleep(WARM_S)

    def wait_until(self, holds: Callable[[], bool], limit_s: float = LIMIT_S) -> bool:
        """Return whether something becomes true in time; while Serve is away it is not."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            try:
                if holds():
                    return True
            except Exception as error:  # noqa: BLE001 (whatever a broken cluster raises)
                print(f"  not yet: {type(error).__name__}")
            time.sleep(0.2)
        return False

    def replicas(self, deployment: str = "LLMServer") -> list[Replica]:
        """Ask Serve's controller for a deployment's replicas."""
        import ray

        names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
        found = self.reported_by_serve()["deployments"][deployment]["replicas"]
        return [
            Replica(
                r["replica_id"],
                r.get("actor_id") or "",
                r.get("pid") or 0,
                names.get(r.get("node_id"), ""),
                str(getattr(r["state"], "value", r["state"])),
            )
            for r in found
        ]

    def living_nodes(self) -> set[str]:
        """Return the names of the nodes that Ray takes for alive."""
        import ray

        return {node["NodeName"] for node in ray.nodes() if node["Alive"]}

    def are_well(self, *lost: Replica) -> bool:
        """Return whether as many replicas run as there should be, without those that were lost."""
        running = [r for r in self.replicas() if r.state == "RUNNING"]
        gone = {replica.actor for replica in lost}
        return len(running) == self.setup.replicas and not gone & {r.actor for r in running}

    def streams_of(self, replica: Replica) -> int:
        """Ask a replica how many streams it has now."""
        return int(self._ask(replica.name, lambda actor: actor.get_num_ongoing_requests.remote()))

    def pid_of(self, name: str) -> int:
        """Ask an actor of Serve, known by a part of its name, for its process."""
        return int(self._ask(name, lambda actor: actor.__ray_call__.remote(inside.pid)))

    def _ask(self, name: str, call: Callable[[Any], Any]) -> Any:
        import ray

        known = ray.util.list_named_actors(all_namespaces=True)
        found = next(actor for actor in known if name in actor["name"])
        return ray.get(call(ray.get_actor(**found)), timeout=5)

    def reported(self) -> str:
        """Return the last line of what Serve says of the LLM server."""
        message: str = self.reported_by_serve()["deployments"]["LLMServer"]["message"]
        return message.strip().rpartition("\n")[2]

    def reported_by_serve(self) -> dict[str, Any]:
        """Return all that Serve's controller reports of the application."""
        import ray
        from ray.serve._private.constants import (
            SERVE_CONTROLLER_NAME,
            SERVE_NAMESPACE,
        )

        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        details = ray.get(controller.get_serve_instance_details.remote(), timeout=5)
        application: dict[str, Any] = details["applications"]["llm"]
        return application


@contextmanager
def stage_for(
    setup: Setup, model: Path | None = None, others: tuple[Repo, ...] = ()
) -> Iterator[Stage]:
    """Build nodes, Hub and Serve; nothing is deployed yet.

    Args:
        setup: what the fault needs.
        model: a model's directory; None makes a random one.
        others: more repositories of the Hub.
    """
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        model = model or make_model(folder / "model", **setup.shape)
        repo = Repo.from_dir(REPO, model, gated="manual")
        homes = {name: folder / name for name in setup.nodes}
        if setup.disk_mib:
            for home in make_homes(setup.nodes, folder).values():
                stack.enter_context(small_disk(home / "hub", setup.disk_mib))
        else:
            make_homes(setup.nodes, folder)
        hub = stack.enter_context(LocalHub([repo, *others]))
        tokens = {name: hub.issue_token(Behaviour.granted, account=name) for name in homes}
        nodes = [make_node(name, home, tokens[name], setup) for name, home in homes.items()]
        if setup.clock:
            nodes[0] = with_clock(nodes[0], homes[nodes[0].name])
        sessions = None
        if setup.sessions_mib:
            sessions = Path(f"/tmp/ray-{os.getpid()}")
            stack.enter_context(small_disk(sessions, setup.sessions_mib))
        cluster = stack.enter_context(cluster_of(*nodes, env=setup.env, home=sessions))
        yield Stage(setup, hub, repo, cluster, homes, tokens)
