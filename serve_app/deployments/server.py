"""The LLM server deployment: one replica is one engine.

Before it touches the weights a replica proves its own access to the pinned commit, because
replicas also start where no builder ran: on scale-up, after an edit of `ray_actor_options`, on
recovery. Only then it fetches, loads, warms up and takes requests; libraries are imported all the
while. The ledger says where the seconds went.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import structlog
from ray import serve

from serve_app.access import verdict as verdicts
from serve_app.access.license import license_in
from serve_app.access.node_check import ADAPTER_LOADER, loader_of, prove_here
from serve_app.cluster.placement import all_nodes
from serve_app.config import AppConfig, ModelConfig
from serve_app.deployments import status
from serve_app.deployments.autoscaling import load_of
from serve_app.deployments.files import watch_files
from serve_app.deployments.frame_sender import FrameSender
from serve_app.deployments.frames import ReplyTo
from serve_app.deployments.heartbeats import HEARTBEATS_PER_TIMEOUT, with_heartbeats
from serve_app.deployments.jobs import Work, keep_running
from serve_app.deployments.parts import in_parts
from serve_app.deployments.start import Proven, import_libraries, load
from serve_app.errors import AccessDenied, EngineDead, ServeAppError
from serve_app.protocol import GenerationRequest, Heartbeat, Prompt, PromptTokens, TokenDelta
from serve_app.telemetry import cold_start, logs, metrics
from serve_app.weights.fetch import Fetched

if TYPE_CHECKING:
    from serve_app.access.verdict import NodeVerdict
    from serve_app.checkpoint.runnable import Loader
    from serve_app.engine.backends import ReplicaEngine

log = structlog.get_logger()

# Serve restarts a failed constructor at once and for ever; holding it keeps one denied node
# at no more than four tries a minute. Jitter spreads the replicas of a cluster.
HOLD_S = (15.0, 30.0)
FAULT_HOLD_S = (2.0, 4.0)  # of weights that cannot be loaded; each try takes its time already
SAMPLE_INTERVAL_S = 2.0
LOOK_S = 0.5  # between two looks at whether the engine is there
LAST_WORDS_S = 1.0  # for the errors of streams that were open when it stopped


class LLMServer:
    """One model on one replica.

    Args:
        config: the whole tree; the parts go to the components that own them.
        commit: the commit that the gate pinned; None for a local directory.

    Raises:
        AccessDenied: this node may not read the weights, or could not prove it.
        ModelLoadError: the weights are unusable.
    """

    _engine: ReplicaEngine

    async def __init__(self, config: AppConfig, commit: str | None) -> None:  # type: ignore[misc]
        logs.configure_serve(config.logging)
        self._metrics = metrics.ServerMetrics()
        self._carry_tokens(config)
        context = serve.get_replica_context()
        self._ledger = cold_start.Ledger(context.app_name, context.replica_tag)
        libraries = import_libraries(config.engine, self._ledger)
        try:
            with self._ledger.span("check"):
                proven = await self._prove_access(config, commit)
            self._engine, fetched = await asyncio.to_thread(
                load, config, proven, self._ledger, libraries
            )
        except ServeAppError as error:
            limits = HOLD_S if isinstance(error, AccessDenied) else FAULT_HOLD_S
            await asyncio.sleep(random.uniform(*limits))  # noqa: S311 (spreads load, no secret)
            raise
        took_s = self._engine.load_report.total_s
        self._metrics.loaded(took_s, model=config.model.source, commit=commit)
        # Both beside the first requests, which they must not delay; a structure that is asked for
        # before there is what compiles it waits for that.
        self._preparing = asyncio.create_task(asyncio.to_thread(self._engine.prepare_grammars))
        recording = asyncio.to_thread(
            self._record_start, proven[0].verdict, fetched, cold_start.now()
        )
        self._start = asyncio.create_task(recording)
        self._files = watch_files(context.app_name, config)
        jobs: dict[str, Work] = {
            "metrics": self._sample,
            "engine": partial(end_when_dead, self._engine),
        }
        self._watching = [
            asyncio.create_task(keep_running(job, name)) for name, job in jobs.items()
        ]

    def _carry_tokens(self, config: AppConfig) -> None:
        self._heartbeat_s = config.api.stall_timeout_s / HEARTBEATS_PER_TIMEOUT
        self._frames = FrameSender(self._heartbeat_s)
        self._first_answer: asyncio.Task[None] | None = None

    async def generate(
        self, request: GenerationRequest, reply_to: ReplyTo | None = None
    ) -> AsyncIterator[TokenDelta | Heartbeat | ServeAppError]:
        """Continue one prompt; see `LLMEngine.generate`.

        Our own errors travel as the last item, not as exceptions: Serve would log every
        client's mistake with a traceback and count it as a failure of the replica.

        Args:
            request: what to continue.
            reply_to: where the items go; then there are none here. Without it, or where it
                cannot be reached, they come from here, with heartbeats first and while there is
                none, so that the reader knows of a lost replica.
        """
        deltas = in_parts(self._deltas(request))
        connection = await self._frames.connection(reply_to) if reply_to else None
        try:
            if reply_to and connection:
                await connection.carry(reply_to.key, deltas)
                return
            async for delta in with_heartbeats(deltas, self._heartbeat_s):
                yield delta
        except ServeAppError as error:
            yield error

    async def _deltas(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        asked_at = cold_start.now()
        async for delta in self._engine.generate(request):
            if self._first_answer is None:
                recording = self._record_first_answer(asked_at, cold_start.now() - asked_at)
                self._first_answer = asyncio.create_task(recording)
            yield delta

    async def tokenize(self, prompt: Prompt) -> PromptTokens | ServeAppError:
        """Return a prompt's tokens, or our own error as a value; see `generate`."""
        try:
            return await self._engine.tokenize(prompt)
        except ServeAppError as error:
            return error

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | ServeAppError:
        """Return the text of ids, or our own error as a value; see `generate`."""
        try:
            return await self._engine.detokenize(token_ids)
        except ServeAppError as error:
            return error

    async def token_strings(self, token_ids: tuple[int, ...]) -> tuple[str, ...] | ServeAppError:
        """Return each id as the vocabulary writes it, or our own error; see `generate`."""
        try:
            return await self._engine.token_strings(token_ids)
        except ServeAppError as error:
            return error

    async def tokenizer_info(self) -> dict[str, Any]:
        """Return the tokenizer's settings; see `LLMEngine.tokenizer_info`."""
        return await self._engine.tokenizer_info()

    async def ready(self) -> bool:
        """Return whether the engine takes requests."""
        return bool(await self._engine.ready())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report the load to Serve's autoscaler in tokens; see `autoscaling.py`."""
        return load_of(self._engine.stats())

    async def check_health(self) -> None:
        """Fail Serve's health check when the engine is dead, so that the replica is replaced."""
        self._engine.check()

    async def __del__(self) -> None:
        """Stop the engine thread; Serve calls this after the running streams have ended."""
        watching = getattr(self, "_watching", ())
        for each in watching:
            each.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        if files := getattr(self, "_files", None):
            files.stop()
        if engine := getattr(self, "_engine", None):
            await asyncio.to_thread(engine.close)
        self._frames.close()

    async def _prove_access(self, config: AppConfig, commit: str | None) -> list[Proven]:
        """Prove the model and each adapter; the model is the first."""
        model, *adapters = config.model.parts
        pinned = [(each, each.revision, ADAPTER_LOADER) for each in adapters]  # by the gate
        wanted = [(model, commit, loader_of(config)), *pinned]
        proving = (self._prove(model, config, commit, how) for model, commit, how in wanted)
        return list(await asyncio.gather(*proving))

    async def _prove(
        self, model: ModelConfig, config: AppConfig, commit: str | None, loader: Loader
    ) -> Proven:
        verdict = await asyncio.to_thread(
            prove_here, model, config.access, commit=commit, loader=loader
        )
        node_id, node_name = _this_node()
        verdict = replace(verdict, node_id=node_id, node_name=node_name)
        self._metrics.checked(verdict)
        for warning in verdict.token.warnings:
            log.warning("access.conflict", node_id=verdict.node_id, detail=warning)
        if verdict.outcome is verdicts.Outcome.GRANTED:
            log.info("access.granted", node_id=verdict.node_id, **verdicts.log_facts(verdict))
            return Proven(model, commit, verdict)
        log.error("access.refused", node_id=verdict.node_id, **verdicts.log_facts(verdict))
        what = "" if model is config.model else f"adapter {model.source} on "
        raise AccessDenied(what + verdict.line())

    def _record_start(
        self, proven: NodeVerdict, fetched: Fetched, ready_at: float
    ) -> cold_start.Start:
        """Close the ledger and record it: in metrics, in the log, in the cluster's memory."""
        moved = fetched.bytes_by_source()
        start = self._ledger.close(proven.node_name, moved, ready_at=ready_at)
        self._metrics.started(start.facts(), moved)
        log.info("replica.started", node_id=proven.node_id, **moved, **start.facts())
        cold_start.keep(start)
        text = license_in(fetched.directory)
        commit = {"commit": proven.commit}
        status.publish_license(start.application, asdict(text) | commit if text else None)
        status.publish_window(start.application, self._engine.max_context_tokens)
        return start

    async def _record_first_answer(self, asked_at: float, ttft_s: float) -> None:
        self._metrics.started({"first_token_s": ttft_s}, {})
        start = cold_start.with_first_token(await self._start, asked_at=asked_at, ttft_s=ttft_s)
        await asyncio.to_thread(cold_start.keep, start)

    async def _sample(self) -> None:
        while True:
            self._metrics.sample(self._engine.stats())
            await asyncio.sleep(SAMPLE_INTERVAL_S)


async def end_when_dead(
    engine: ReplicaEngine, end: Callable[[int], object] = os._exit, *, look_s: float = LOOK_S
) -> None:
    """End this process soon after its engine has stopped, so that Serve sends nothing here.

    Serve's router prefers the shortest line, and who refuses at once has it; by its health check
    alone Serve would notice after three of them.

    Args:
        engine: of this replica.
        end: ends the process.
        look_s: seconds between two looks.
    """
    while True:
        try:
            engine.check()
        except EngineDead as dead:
            await asyncio.sleep(LAST_WORDS_S)
            log.error("replica.ended", reason=dead.message)
            logging.shutdown()
            end(1)
            return
        await asyncio.sleep(look_s)


def _this_node() -> tuple[str, str]:
    """Return Ray's id of this node and the name that the tables show for it."""
    node_id = ray.get_runtime_context().get_node_id()
    names = {node["NodeID"]: str(node.get("NodeName") or "") for node in all_nodes()}
    return node_id, names.get(node_id) or node_id[:12]
