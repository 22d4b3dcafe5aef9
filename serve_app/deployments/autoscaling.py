"""How many replicas the load needs, in requests and in tokens.

Requests alone mislead: ten long ones fill the KV cache of a replica that takes hundreds of
short ones. So each replica also reports the tokens that its requests can come to, and the
larger need counts. Serve adds its bounds, delays and factors, and wakes the first replica of an
application that sleeps. Serve's controller runs this; it may import nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

    from serve_app.config import ReplicaConfig
    from serve_app.engine.stats import EngineStats

POLICY = "serve_app.scaling:TokenLoad"
TOKENS, CAPACITY = "ongoing_tokens", "kv_tokens"


def autoscaling(replica: ReplicaConfig) -> dict[str, Any]:
    """Return Serve's autoscaling config of a deployment's replicas, whole.

    What a Serve config says of it for one deployment does not add to this: it takes its place.
    """
    return {
        "min_replicas": replica.min_replicas,
        "max_replicas": replica.max_replicas,
        "target_ongoing_requests": replica.target_ongoing_requests,
        "upscale_delay_s": replica.upscale_delay_s,
        "downscale_delay_s": replica.downscale_delay_s,
        "policy": {
            "policy_function": POLICY,
            "policy_kwargs": {"target_ongoing_tokens": replica.target_ongoing_tokens},
        },
    }


def load_of(stats: EngineStats) -> dict[str, float]:
    """Return what a replica reports: its requests' tokens at the most, and its KV cache's."""
    return {
        TOKENS: float(stats.running_tokens + stats.waiting_tokens),
        CAPACITY: float(stats.kv_tokens_total),
    }


class TokenLoad:
    """A policy of Serve's autoscaler.

    Args:
        target_ongoing_tokens: of a replica, prompt and possible completion of what runs and
            waits there; None aims at what fits its KV cache.
    """

    def __init__(self, target_ongoing_tokens: int | None = None) -> None:
        self._target = target_ongoing_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the replicas that are needed, as a fraction, and no state."""
        if context.current_num_replicas == 0:
            return context.target_num_replicas, {}
        config: Any = context.config
        by_requests = context.total_num_requests / config.get_target_ongoing_requests()
        return max(by_requests, self._by_tokens(context)), {}

    def _by_tokens(self, context: AutoscalingContext) -> float:
        reported = context.aggregated_metrics or {}
        tokens = reported.get(TOKENS, {})
        capacities = reported.get(CAPACITY, {})
        if not tokens or not capacities:
            return 0.0  # before the first report
        target = self._target or sum(capacities.values()) / len(capacities)
        return sum(tokens.values()) / target
