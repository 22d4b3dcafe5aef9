"""Prometheus metrics of a replica, exported by Ray on each node's metrics port.

Names carry their unit and follow vLLM's suffixes, so that its dashboards port over; Ray adds
the `ray_` prefix and Serve the application, deployment and replica. No label ever holds a
token, a prompt or a request id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from contextlib import suppress

from ray.exceptions import RayError
from ray.serve import metrics

from serve_app.access.verdict import NodeVerdict, Outcome, Verdict
from serve_app.api.app import RequestRecord
from serve_app.engine.stats import EngineStats
from serve_app.errors import KeyLimitExceeded

# Bounds in seconds: from one decode step on a GPU to a minute of queueing on a CPU.
_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]


# Ray 2.60 forgets a gauge 20 s after it was set (twice its report interval).
REPEAT_S = 5.0


class _Repeated:
    """Values of gauges that are set once and count from then on."""

    def __init__(self) -> None:
        self._values: dict[tuple[metrics.Gauge, tuple[tuple[str, str], ...]], float] = {}

    def set(self, gauge: metrics.Gauge, value: float, **tags: str) -> None:
        """Publish a value, and keep it for `repeat`."""
        self._values[gauge, tuple(tags.items())] = value
        gauge.set(value, tags=tags)

    def repeat(self) -> None:
        """Publish every value again."""
        for (gauge, tags), value in list(self._values.items()):
            gauge.set(value, tags=dict(tags))


class IngressMetrics:
    """What clients saw: one observation for each request."""

    def __init__(self) -> None:
        self._requests = metrics.Counter(
            "serve_app_requests_total",
            description="Requests by how they ended.",
            tag_keys=("path", "status", "outcome"),  # type: ignore[arg-type]
        )
        self._ttft = metrics.Histogram(
            "serve_app_time_to_first_token_seconds",
            description="From the request's arrival at the ingress to its first token.",
            boundaries=_SECONDS,
        )
        self._latency = metrics.Histogram(
            "serve_app_e2e_request_latency_seconds",
            description="From the request's arrival at the ingress to its last byte.",
            boundaries=_SECONDS,
        )
        self._queue = metrics.Histogram(
            "serve_app_request_queue_time_seconds",
            description="From the request's arrival at the replica to its first step.",
            boundaries=_SECONDS,
        )
        self._prefill = metrics.Histogram(
            "serve_app_request_prefill_time_seconds",
            description="From the request's first step to its first token.",
            boundaries=_SECONDS,
        )
        self._decode = metrics.Histogram(
            "serve_app_request_decode_time_seconds",
            description="From the request's first token to its last one.",
            boundaries=_SECONDS,
        )
        self._itl = metrics.Histogram(
            "serve_app_inter_token_latency_seconds",
            description="Seconds a token at the ingress, one observation a delta.",
            boundaries=_SECONDS,
        )
        self._tpot = metrics.Histogram(
            "serve_app_request_time_per_output_token_seconds",
            description="A request's mean seconds a token after the first.",
            boundaries=_SECONDS,
        )
        self._prompt = metrics.Counter(
            "serve_app_prompt_tokens_total", description="Prompt tokens of answered requests."
        )
        self._generation = metrics.Counter(
            "serve_app_generation_tokens_total", description="Tokens sent to clients."
        )
        self._key_requests = metrics.Counter(
            "serve_app_key_requests_total",
            description="Requests by the name of their API key; limited: refused for its limits.",
            tag_keys=("key", "limited"),  # type: ignore[arg-type]
        )
        self._key_prompt = metrics.Counter(
            "serve_app_key_prompt_tokens_total",
            description="Prompt tokens of answered requests by the name of their API key.",
            tag_keys=("key",),
        )
        self._key_generation = metrics.Counter(
            "serve_app_key_generation_tokens_total",
            description="Tokens sent to clients by the name of their API key.",
            tag_keys=("key",),
        )

    def observe(self, record: RequestRecord) -> None:
        """Count one finished request."""
        outcome = record.finish_reason or record.error_code or "ok"
        self._requests.inc(
            1, tags={"path": record.path, "status": str(record.status), "outcome": outcome}
        )
        self._latency.observe(record.duration_s)
        if record.ttft_s is not None:
            self._ttft.observe(record.ttft_s)
            self._queue.observe(record.timing.queue_s)
            self._prefill.observe(record.timing.prefill_s)
            self._decode.observe(record.timing.decode_s)
        for seconds in record.itl_s:
            self._itl.observe(seconds)
        if record.itl_s:
            self._tpot.observe(sum(record.itl_s) / len(record.itl_s))
        if record.prompt_tokens:
            self._prompt.inc(record.prompt_tokens)
        if record.completion_tokens:
            self._generation.inc(record.completion_tokens)
        if record.key is not None:
            self._observe_key(record, record.key.label)

    def _observe_key(self, record: RequestRecord, label: str) -> None:
        limited = "yes" if record.error_code == KeyLimitExceeded.code else "no"
        self._key_requests.inc(1, tags={"key": label, "limited": limited})
        if record.prompt_tokens:  # Ray refuses to add nothing
            self._key_prompt.inc(record.prompt_tokens, tags={"key": label})
        if record.completion_tokens:
            self._key_generation.inc(record.completion_tokens, tags={"key": label})


class AccessMetrics:
    """The present outcome of every node, as a state set: 1 for it, 0 for those it had before.

    Alert on `serve_app_access_granted{outcome="granted"} == 0`. A node that left the cluster has
    no series, so that autoscaling wakes nobody: what is not published again, Ray forgets.
    """

    def __init__(self) -> None:
        self._granted = metrics.Gauge(
            "serve_app_access_granted",
            description="1 for the node's present outcome of the access check, else 0.",
            tag_keys=("node", "repo", "outcome"),  # type: ignore[arg-type]  # Ray 2.60 says tuple[str]
        )
        # By the id of the node and the repository.
        self._present: dict[tuple[str, str], tuple[str, str]] = {}  # -> name, outcome
        self._had: dict[tuple[str, str], set[str]] = {}  # -> outcomes

    def show(self, verdict: Verdict) -> None:
        """Publish a verdict over all nodes; a node that is not in it is forgotten."""
        found = [
            ((node.node_id, part.repo_id), (node.node_name, node.outcome.value))
            for part in verdict.parts
            for node in part.nodes
            if node.node_id and not node.deferred
        ]
        # Two parts may be of one repository, at two commits: a refusal is shown before a grant.
        self._present = dict(sorted(found, key=lambda each: each[1][1] != Outcome.GRANTED.value))
        self._had = {
            key: {*self._had.get(key, ()), outcome, Outcome.GRANTED.value}
            for key, (_, outcome) in self._present.items()
        }
        self._publish()

    def forget(self) -> None:
        """Publish nothing any more: another process does."""
        self._present = {}

    async def keep(self, living: Callable[[], Set[str]]) -> None:
        """Publish the last verdict again and again, until cancelled.

        Args:
            living: returns the ids of the nodes in the cluster; it may block. Others are
                forgotten at once and not only with the next verdict. While it raises
                `RayError`, all are kept.
        """
        while True:
            await asyncio.sleep(REPEAT_S)
            with suppress(RayError):
                alive = await asyncio.to_thread(living)
                self._present = {key: at for key, at in self._present.items() if key[0] in alive}
            self._publish()

    def _publish(self) -> None:
        for (node_id, repo), (name, present) in self._present.items():
            for outcome in self._had[node_id, repo]:
                tags = {"node": name, "repo": repo, "outcome": outcome}
                self._granted.set(float(outcome == present), tags=tags)


class RolloutMetrics:
    """How the application's rollouts ended; every ingress exports the same, so take the maximum."""

    def __init__(self) -> None:
        self._ended = metrics.Counter(
            "serve_app_rollouts_total",
            description="Gates and rollouts of the application by result; max, not sum.",
            tag_keys=("result",),
        )
        self._at = metrics.Gauge(
            "serve_app_rollout_last_timestamp_seconds",
            description="When a gate or rollout last ended with this result, in Unix time.",
            tag_keys=("result",),
        )
        self._took = metrics.Gauge(
            "serve_app_rollout_last_duration_seconds",
            description="How long that gate or rollout took.",
            tag_keys=("result",),
        )
        self._counted: dict[str, int] = {}

    def show(self, result: str, *, count: int, at: float, duration_s: float) -> None:
        """Publish one result: how often, when last in Unix seconds, and how long that took."""
        tags = {"result": result}
        if (more := count - self._counted.get(result, 0)) > 0:  # Ray refuses to add nothing
            self._ended.inc(more, tags=tags)
            self._counted[result] = count
        self._at.set(at, tags=tags)
        self._took.set(duration_s, tags=tags)


class CanaryMetrics:
    """What clients saw of two versions, while one is tried beside the other."""

    def __init__(self) -> None:
        self._share = metrics.Gauge(
            "serve_app_canary_share",
            description="Share of the requests that the ingress gives to a canary, 0 to 1.",
        )
        self._requests = metrics.Counter(
            "serve_app_canary_requests_total",
            description="Requests while there is a canary, by version (stable, canary): ok, error.",
            tag_keys=("track", "outcome"),  # type: ignore[arg-type]
        )
        self._ttft = metrics.Histogram(
            "serve_app_canary_time_to_first_token_seconds",
            description="From the ingress' question to the first token, by version.",
            boundaries=_SECONDS,
            tag_keys=("track",),
        )

    def share(self, share: float) -> None:
        """Publish the present share."""
        self._share.set(share)

    def first_token(self, track: str, seconds: float) -> None:
        """Count the first token of a request."""
        self._ttft.observe(seconds, tags={"track": track})

    def ended(self, track: str, outcome: str) -> None:
        """Count the end of a request."""
        self._requests.inc(1, tags={"track": track, "outcome": outcome})


class ServerMetrics:
    """What one replica is doing."""

    def __init__(self) -> None:
        self._checks = metrics.Counter(
            "serve_app_access_checks_total",
            description="Access checks of this replica by outcome.",
            tag_keys=("outcome",),
        )
        self._repeated = _Repeated()
        self._load = metrics.Gauge(
            "serve_app_model_load_seconds", description="Loading and warm-up of this replica."
        )
        self._model = metrics.Gauge(
            "serve_app_model_info",
            description="1 for the model and the commit that this replica serves.",
            tag_keys=("model", "commit"),  # type: ignore[arg-type]
        )
        self._weights = metrics.Counter(
            "serve_app_weights_bytes_total",
            description="Bytes of the model by where this replica got them: hub, peer, cache.",
            tag_keys=("source",),
        )
        self._cold_start = metrics.Gauge(
            "serve_app_cold_start_seconds",
            description="Where this replica's start spent its time, by phase.",
            tag_keys=("phase",),
        )
        self._running = metrics.Gauge(
            "serve_app_num_requests_running", description="Requests in the batch."
        )
        self._waiting = metrics.Gauge(
            "serve_app_num_requests_waiting", description="Requests waiting for a place."
        )
        self._kv = metrics.Gauge(
            "serve_app_kv_cache_usage_perc",
            description="Share of the KV cache that running requests hold, 0 to 1.",
        )
        # Counters of the engine's running totals, in the order of `sample`.
        self._totals = (
            metrics.Counter(
                "serve_app_prefix_cache_queries_total",
                description="Prompt tokens looked up in the prefix cache.",
            ),
            metrics.Counter(
                "serve_app_prefix_cache_hits_total",
                description="Prompt tokens that were found there and not computed again.",
            ),
            metrics.Counter(
                "serve_app_preemptions_total",
                description="Requests put back, for room in the KV cache or for whose turn it is.",
            ),
        )
        self._counted = (0, 0, 0)

    def checked(self, verdict: NodeVerdict) -> None:
        """Count one access check."""
        self._checks.inc(1, tags={"outcome": verdict.outcome})

    def loaded(self, seconds: float, *, model: str, commit: str | None) -> None:
        """Record what is served now, and how long loading took."""
        self._repeated.set(self._load, seconds)
        self._repeated.set(self._model, 1.0, model=model, commit=commit or "")

    def started(self, phases: Mapping[str, float], weights_bytes: Mapping[str, int]) -> None:
        """Publish a start: seconds by `<phase>_s`, and the model's bytes by source."""
        for name, seconds in phases.items():
            self._repeated.set(self._cold_start, seconds, phase=name.removesuffix("_s"))
        for source, size in weights_bytes.items():
            if size:  # Ray refuses to add nothing
                self._weights.inc(size, tags={"source": source})

    def sample(self, stats: EngineStats) -> None:
        """Publish the engine's state of this moment, and the figures of the start again."""
        self._repeated.repeat()
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv.set(stats.kv_tokens_used / max(1, stats.kv_tokens_total))
        totals = (stats.prefix_cache_queries, stats.prefix_cache_hits, stats.preemptions)
        for counter, total, counted in zip(self._totals, totals, self._counted, strict=True):
            if total > counted:  # Ray refuses to add nothing
                counter.inc(total - counted)
        self._counted = totals
