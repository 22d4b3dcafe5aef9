"""The faults. A function's docstring says what breaks; it returns what the numbers do not."""

from __future__ import annotations

from collections.abc import Callable

from scripts.chaos_table.stage import Setup, Stage, kill


def replica_killed(stage: Stage) -> str:
    """One of two replicas gets SIGKILL while it streams."""
    victim = stage.replicas()[0]
    streams: list[int] = []

    def strike() -> None:
        streams.append(stage.streams_of(victim))
        kill(victim.pid)

    stage.strike(strike)
    stage.recovered(lambda: stage.are_well(victim))
    return f"it had {streams[0]} streams"


def node_killed(stage: Stage) -> str:
    """A node with one of two replicas dies; another node has room."""
    victim = stage.replicas()[0]
    ingress = [replica.node for replica in stage.replicas("Ingress")]
    streams: list[int] = []

    def strike() -> None:
        streams.append(stage.streams_of(victim))
        stage.cluster.remove(victim.node)

    stage.strike(strike)
    stage.recovered(lambda: stage.are_well(victim))
    return (
        f"it had {streams[0]} streams and {ingress.count(victim.node)} of {len(ingress)} ingresses"
    )


def ingress_killed(stage: Stage) -> str:
    """One ingress replica gets SIGKILL."""
    ingresses = stage.replicas("Ingress")
    victim = ingresses[0]

    def is_well() -> bool:
        now = stage.replicas("Ingress")
        running = {replica.actor for replica in now if replica.state == "RUNNING"}
        return len(running) == len(ingresses) and victim.actor not in running

    stage.strike(lambda: kill(victim.pid))
    stage.recovered(is_well)
    return f"one of {len(ingresses)}"


def controller_killed(stage: Stage) -> str:
    """Serve's controller gets SIGKILL."""
    (pid,) = stage.pids_of("ServeController")
    before = {replica.actor for replica in stage.replicas()}
    stage.strike(lambda: kill(pid))
    stage.recovered(lambda: stage.pids_of("ServeController") != [pid] and stage.are_well())
    same = before == {replica.actor for replica in stage.replicas()}
    return "the same replicas serve on" if same else "replicas were restarted"


def proxy_killed(stage: Stage) -> str:
    """The only proxy gets SIGKILL."""
    (pid,) = stage.pids_of("ProxyActor")
    stage.strike(lambda: kill(pid))
    stage.recovered(lambda: stage.pids_of("ProxyActor") not in ([], [pid]))
    return "one proxy; a load balancer over one on each node has others"


Fault = Callable[[Stage], str]
FAULTS: dict[str, tuple[Fault, Setup]] = {
    "replica killed": (replica_killed, Setup()),
    "node killed": (node_killed, Setup()),
    "ingress killed": (ingress_killed, Setup()),
    "controller killed": (controller_killed, Setup()),
    "proxy killed": (proxy_killed, Setup()),
}
