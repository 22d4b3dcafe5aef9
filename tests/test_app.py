"""What the two deployments are bound with."""

import pytest

from serve_app.access.verdict import Verdict
from serve_app.app import bind
from serve_app.config import parse_args

VERDICT = Verdict("acme/tiny", "main", "0" * 40, "https://hub", 1.0, ())


@pytest.mark.parametrize(("replicas", "ingresses"), [(1, 1), (2, 2), (8, 2)])
def test_whoever_has_a_replica_to_lose_has_an_ingress_to_lose(replicas, ingresses):
    """One ingress would take every stream with it, those of the other replicas too."""
    scale = {"min_replicas": 1, "max_replicas": replicas}
    config = parse_args({"model": {"repo_id": "acme/tiny"}, "replica": scale})
    application = bind(config, VERDICT)
    assert application._bound_deployment.num_replicas == ingresses


def test_no_line_of_serves_forms_before_an_ingress():
    """`/health` would wait in it, behind bodies that come slowly: its own limits come first."""
    application = bind(parse_args({"model": {"repo_id": "acme/tiny"}}), VERDICT)
    assert application._bound_deployment.max_ongoing_requests >= 100_000
