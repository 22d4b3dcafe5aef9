"""What the plan says that a rollout needs, before it does anything."""

import pytest

from serve_app.access.verdict import Verdict
from serve_app.config import parse_args
from serve_app.rollout import plan
from serve_app.serve_config import ServedApp

VERDICT = Verdict("acme/tiny", "main", "c" * 40, "https://hub", 0.1, ())


def app(**replica):
    config = parse_args({"model": {"repo_id": "acme/tiny"}, "replica": replica})
    return ServedApp("llm", config, {})


@pytest.fixture(autouse=True)
def cluster(monkeypatch):
    """Three nodes: without the weights, with them, and one that did not answer."""
    lacking = [("a", 1_500), ("b", 0), ("c", None)]
    monkeypatch.setattr(plan, "_lacking", lambda app, verdict: lacking)
    monkeypatch.setattr(plan.ray, "available_resources", lambda: {"GPU": 1.0})


def test_needs_names_the_bytes_of_each_node():
    """A node that was not seen is not taken for one that has them."""
    assert list(plan.needs(app(num_gpus=0), VERDICT)) == [
        "llm: a: 1,500 bytes to fetch",
        "llm: b: has the weights",
        "llm: c: its cache could not be read",
    ]


@pytest.mark.parametrize(("asked", "waits"), [(1, False), (2, True)])
def test_needs_says_when_no_gpu_is_spare(asked, waits):
    """Then the rollout waits for one until it goes back."""
    gpus, *rest = plan.needs(app(num_gpus=asked), VERDICT)
    assert gpus == f"llm: {asked} GPUs a replica, 1 replicas at the least; 1 GPUs are free now"
    assert ("no replica can start" in rest[0]) is waits
