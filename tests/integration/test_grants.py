"""Grants that change while the application serves: withdrawn, missing on scale-up, given back."""

import re
import time

import httpx
import pytest

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.cluster.controller import living_replicas
from serve_app.telemetry import rollout_history
from serve_app.telemetry.metrics import REPEAT_S
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import REPO, SERVING, Service, until

pytestmark = pytest.mark.cluster

WATCH_S = 2
ROUND_S = 6  # of the questions to two nodes beside a load that takes both cores


@pytest.fixture(scope="module")
def service(tiny_model_dir):
    """One replica, on one of two nodes that were both granted when it rolled out."""
    with LocalHub([Repo.from_dir(REPO, tiny_model_dir, gated="manual")]) as hub:
        tokens = {name: hub.issue_token(Behaviour.granted, account=name) for name in ("a", "b")}
        nodes = [LogicalNode(name, token, SERVING, num_gpus=0) for name, token in tokens.items()]
        with cluster_of(*nodes, head_cpus=1) as running:
            service = Service(hub, running, tokens)
            service.deploy(replicas=1, access={"watch_interval_s": WATCH_S})
            yield service


def outcomes(service):
    shown = httpx.get(f"{service.url}/access").json()["nodes"]
    return {node["node_name"]: node["outcome"] for node in shown}


def gauge(service, node, outcome):
    """Return the value of the grant's gauge; None before it is exported."""
    labels = rf'(?=[^}}]*node="{node}")(?=[^}}]*outcome="{outcome}")'
    pattern = rf"serve_app_access_granted\{{{labels}[^}}]*\}} ([0-9.]+)"
    values = re.findall(pattern, service.metrics())
    return float(values[-1]) if values else None


def test_grant_withdrawn_is_reported_while_every_request_is_answered(service):
    """Within one interval at /access, then as a gauge, once in the log; likewise its return."""
    with service.under_load() as answered:
        service.hub.set_behaviour(service.tokens["a"], Behaviour.never_asked)
        took = until(lambda: outcomes(service)["a"] == "license_not_accepted", 20)
        assert took < WATCH_S + ROUND_S
        assert outcomes(service)["b"] == "granted"
        until(lambda: gauge(service, "a", "granted") == 0, 40)
        assert gauge(service, "a", "license_not_accepted") == 1
        assert gauge(service, "b", "granted") == 1
        service.hub.set_behaviour(service.tokens["a"], Behaviour.granted)
        until(lambda: outcomes(service)["a"] == "granted", 10)
    assert len(answered) > 10
    assert set(answered) == {200}
    until(lambda: service.logged("access.refused", "Ingress"), 10)
    (line,) = service.logged("access.refused", "Ingress")
    assert (line["outcome"], line["levelname"]) == ("license_not_accepted", "ERROR")
    recorded = rollout_history.entries("llm")
    assert [(entry.what, entry.who) for entry in recorded] == [
        ("approved", "build"),
        ("access_lost", "watch"),
        ("access_regained", "watch"),
    ]
    assert recorded[1].why == "license_not_accepted on a"


def test_grant_denied_lets_a_scale_up_wait_and_harms_nobody(service):
    """Few tries, the reason in status, log and metric; up by itself when the grant is there."""
    from ray import serve

    ((_, home),) = service.replicas()
    other = "b" if home == "a" else "a"
    service.hub.set_behaviour(service.tokens[other], Behaviour.never_asked)
    time.sleep(2 * WATCH_S)
    with service.under_load() as answered:
        service.put(replicas=1, access={"watch_interval_s": WATCH_S}, overrides={"num_replicas": 2})
        until(lambda: tries(service, other), 30)
        began, first = time.monotonic(), len(tries(service, other))
        message = lambda: serve.status().applications["llm"].deployments["LLMServer"].message  # noqa: E731
        until(lambda: "license_not_accepted" in message(), 60)
        reason = message().strip().splitlines()[-1]
        assert reason.startswith(f"serve_app.errors.AccessDenied: {other}: license_not_accepted")
        metric = 'serve_app_access_checks_total{[^}]*outcome="license_not_accepted"'
        until(lambda: re.search(metric, service.metrics()), 60)
        minutes = max(1.0, (time.monotonic() - began) / 60)
        assert (len(tries(service, other)) - first) / minutes <= 4
        assert [state for state, node in service.replicas() if node == home] == ["RUNNING"]
        service.hub.set_behaviour(service.tokens[other], Behaviour.granted)
        until(lambda: [s for s, _ in service.replicas()] == ["RUNNING", "RUNNING"], 90)
    assert set(answered) == {200}
    assert len(answered) > 10
    # Ray goes on with the counters of the refused; the service's own page knows who lives.
    of_replicas = set(re.findall(r'ray_serve_app_\w+{[^}]*replica="([^"]+)"', service.metrics()))
    assert of_replicas & living_replicas()
    assert len(of_replicas - living_replicas()) >= first


def tries(service, node):
    """Refusals that replicas on a node logged."""
    return [
        line for line in service.logged("access.refused", "LLMServer") if line["account"] == node
    ]


def test_access_metrics_leave_no_series_of_a_node_that_left(service):
    """It was refused when it went; nobody is woken for a node that is no more."""
    import ray
    from ray import serve

    service.put(replicas=1, access={"watch_interval_s": WATCH_S}, overrides={"num_replicas": 1})
    until(lambda: [state for state, _ in service.replicas()] == ["RUNNING"], 90)
    ((_, home),) = service.replicas()
    other = "b" if home == "a" else "a"
    service.hub.set_behaviour(service.tokens[other], Behaviour.never_asked)
    until(lambda: gauge(service, other, "granted") == 0, 40)
    service.cluster.remove(other)
    until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, 60)  # the head and home
    until(lambda: not published(service, other), 60)  # here Ray forgets faster than it is published
    time.sleep(2 * REPEAT_S)
    over, seen = time.monotonic() + 3 * REPEAT_S, set()
    while time.monotonic() < over:
        seen |= {node for node in (home, other) if published(service, node)}
        time.sleep(0.5)
    assert seen == {home}
    assert serve.status().applications["llm"].status == "RUNNING"


def published(service, node):
    return f'node="{node}"' in service.metrics()
