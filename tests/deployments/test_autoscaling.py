"""How many replicas the load needs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from ray.serve.config import AutoscalingConfig
from ray.serve.config import AutoscalingPolicy as Policy

from serve_app.deployments.autoscaling import POLICY, TokenLoad, load_of
from serve_app.engine.stats import EngineStats


def context(*loads, replicas=2, requests=0.0):
    """Return what Serve's controller shows a policy, with a replica's report for each load."""
    metrics = {}
    for replica, (tokens, capacity) in enumerate(loads):
        metrics.setdefault("ongoing_tokens", {})[replica] = tokens
        metrics.setdefault("kv_tokens", {})[replica] = capacity
    return SimpleNamespace(
        current_num_replicas=replicas,
        target_num_replicas=1,
        total_num_requests=requests,
        aggregated_metrics=metrics or None,
        config=AutoscalingConfig(target_ongoing_requests=16),
    )


@pytest.mark.parametrize(
    ("target", "given", "needed"),
    [
        (None, context(requests=64), 4),
        (None, context((0, 1000), (0, 1000), requests=8), 0.5),
        (None, context((1500, 1000), (1500, 1000), requests=8), 3),
        (None, context((500, 1000), (0, 1000), requests=64), 4),
        (300, context((600, 1000), (600, 1000), requests=8), 4),
        (None, context(replicas=0), 1),
    ],
    ids=["no report", "idle", "tokens", "requests", "own target", "asleep"],
)
def test_token_load_takes_the_larger_need(target, given, needed):
    """In requests, or in tokens against what fits the KV cache or the target that was set."""
    assert TokenLoad(target)(given)[0] == needed


def test_load_of_a_replica_is_what_runs_and_what_waits():
    """Both, with the size of the cache."""
    stats = EngineStats(1, 1, 0, 900, 0, 0, 0, 0, waiting_tokens=300, running_tokens=200)
    assert load_of(stats) == {"ongoing_tokens": 500.0, "kv_tokens": 900.0}


def test_policy_reaches_the_controller_by_value():
    """Its module needs nothing of this package there, and nothing heavy."""
    policy = Policy(policy_function=POLICY, policy_kwargs={"target_ongoing_tokens": 5})
    check = (
        "import sys, pickle; kind = pickle.loads(bytes.fromhex(sys.stdin.read())); "
        "assert kind(5)._target == 5; assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", check],
        input=policy.get_serialized_policy_def().hex().encode(),
        check=True,
        cwd="/",
    )
