"""What the two deployments are bound with."""

import pytest

from serve_app import app
from serve_app.access.preflight import RolloutBlocked
from serve_app.access.verdict import NodeVerdict, Outcome, Verdict
from serve_app.app import bind
from serve_app.config import parse_args
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import What

VERDICT = Verdict("acme/tiny", "main", "0" * 40, "https://hub", 1.0, ())


@pytest.mark.parametrize(("replicas", "ingresses"), [(1, 1), (2, 2), (4, 2)])
def test_bind_gives_an_ingress_to_lose_to_whoever_has_a_replica_to_lose(replicas, ingresses):
    """One ingress would take every stream with it, those of the other replicas too."""
    scale = {"min_replicas": 1, "max_replicas": replicas}
    config = parse_args({"model": {"repo_id": "acme/tiny"}, "replica": scale})
    application = bind(config, VERDICT)
    assert application._bound_deployment.num_replicas == ingresses


def test_bind_lets_ingresses_grow_with_the_streams():
    """One process carries some streams and no more; what all replicas run decides how many."""
    config = parse_args(
        {
            "model": {"repo_id": "acme/tiny"},
            "replica": {"min_replicas": 1, "max_replicas": 8},
            "engine": {"max_running_requests": 256},
        }
    )
    scaling = bind(config, VERDICT)._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 16)
    assert scaling.target_ongoing_requests == 128


def test_bind_lets_no_line_of_serves_form_before_an_ingress():
    """`/health` would wait in it, behind bodies that come slowly: its own limits come first."""
    application = bind(parse_args({"model": {"repo_id": "acme/tiny"}}), VERDICT)
    assert application._bound_deployment.max_ongoing_requests >= 100_000


@pytest.fixture
def gate(monkeypatch, kv_store):
    """A gate that says what the test wants, of a build of two applications with the same args."""
    outcome = [Outcome.GRANTED]

    def preflight(config, **_):
        node = NodeVerdict("id", "n1", outcome[0], "fix", commit="c" * 40)
        return Verdict("acme/tiny", "main", "c" * 40, "http://hub", 0.5, (node,))

    monkeypatch.setattr(app, "preflight", preflight)
    monkeypatch.setattr(app, "applications_of", lambda config: ["a", "b"])
    return outcome


ARGS = {"model": {"repo_id": "acme/tiny"}}


def test_build_app_records_an_approved_build(gate):
    """For each application that is built from these args, with the gate's own words."""
    app.build_app(ARGS)
    for name in "ab":
        (entry,) = rollout_history.entries(name)
        assert (entry.what, entry.who, entry.commit) == (What.APPROVED, "build", "c" * 40)
        assert entry.why.startswith("Access granted: acme/tiny (main, commit cccccccccccc)")
        assert entry.duration_s == 0.5


def test_build_canary_has_a_root_without_the_replicas(gate):
    """What Serve puts a port in front of is the root; the replicas stand behind it."""
    application = app.build_canary(ARGS)
    root = application._bound_deployment
    assert (root.name, root.num_replicas) == ("Unrouted", 1)
    (server,) = root.init_args
    assert server._bound_deployment.name == "LLMServer"
    gate[0] = Outcome.EXPIRED_TOKEN
    with pytest.raises(RolloutBlocked):
        app.build_canary(ARGS)


def test_build_app_records_a_blocked_build_and_blocks(gate):
    """A store that is lost does not turn the refusal into another error."""
    gate[0] = Outcome.EXPIRED_TOKEN
    with pytest.raises(RolloutBlocked):
        app.build_app(ARGS)
    (entry,) = rollout_history.entries("a")
    assert entry.what == What.BLOCKED
    assert entry.why.startswith("Access BLOCKED: 1 of 1 node cannot read acme/tiny")


@pytest.mark.parametrize("outcome", [Outcome.GRANTED, Outcome.EXPIRED_TOKEN])
def test_build_app_decides_the_same_when_the_store_does_not_answer(gate, kv_store, outcome):
    """Neither a yes nor a no."""
    gate[0], kv_store.is_lost = outcome, True
    if outcome is Outcome.GRANTED:
        app.build_app(ARGS)
    else:
        with pytest.raises(RolloutBlocked, match="Access BLOCKED"):
            app.build_app(ARGS)
