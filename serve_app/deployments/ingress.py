"""The ingress deployment: OpenAI's HTTP surface in front of the LLM server."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import structlog
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import __version__
from serve_app.access.token import write_no_core_file
from serve_app.access.verdict import Verdict
from serve_app.api.app import RequestRecord, create_app
from serve_app.api.key_limits import KeyLimits
from serve_app.cluster.controller import through_haproxy
from serve_app.cluster.network import node_address
from serve_app.config import AppConfig
from serve_app.deployments.canary import Canary
from serve_app.deployments.engine_client import RemoteEngine
from serve_app.deployments.files import watch_files
from serve_app.deployments.frame_receiver import FrameReceiver
from serve_app.deployments.jobs import Work, keep_running
from serve_app.deployments.key_exchange import KeyExchange
from serve_app.deployments.shared_watch import SharedWatch
from serve_app.deployments.split import Split
from serve_app.deployments.status import Fleet
from serve_app.errors import RequestCancelled
from serve_app.serve_config import SERVER_DEPLOYMENT
from serve_app.telemetry import logs, rollout_history
from serve_app.telemetry.metrics import REPEAT_S, CanaryMetrics, IngressMetrics, RolloutMetrics
from serve_app.telemetry.prometheus import Exposition
from serve_app.watchdog import LoopWatchdog, stack_of

log = structlog.get_logger()

# A loop that has not come round for so long answers nobody; its process makes room for another.
LOOP_TIMEOUT_S = 30.0


class SingleRequestId:
    """ASGI wrapper that leaves the `x-request-id` of an answer to Serve.

    Serve (2.60, proxy and direct ingress) gives every request an id, hands it to the
    application in the request's headers and appends it to the answer; the application,
    which takes the same id, would send the header a second time.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on but the application's own header."""

        async def send_once(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_once)


class Ingress:
    """The HTTP application of one ingress replica, and the watch over the grants.

    Args:
        llm: handle of the LLM server.
        config: the whole tree.
        verdict: what the gate said of this version, with the commit that is served.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, llm: DeploymentHandle[Any], config: AppConfig, verdict: Verdict
    ) -> None:
        logs.configure_serve(config.logging)
        write_no_core_file()  # keys and prompts of clients pass through here
        self._metrics = IngressMetrics()
        self._frames = FrameReceiver()
        await self._frames.listen(node_address())
        context = serve.get_replica_context()
        application = context.app_name
        stable = RemoteEngine(
            llm,
            self._frames,
            patience_s=config.api.first_token_timeout_s,
            stall_timeout_s=config.api.stall_timeout_s,
            may_sleep=config.replica.min_replicas == 0,
        )
        self._engine = Split(
            stable,
            partial(connect, self._frames),
            application=application,
            ingress=context.replica_tag,
            metrics=CanaryMetrics(),
        )
        self._config = config
        self._commit = verdict.commit
        self._watch = SharedWatch(application, config, verdict, holder=context.replica_tag)
        self._files = watch_files(application, config, keys=True)
        self._key_limits = KeyLimits()
        self._exchange = KeyExchange(application, context.replica_tag, self._key_limits)
        loop = asyncio.get_running_loop()
        self._watchdog = LoopWatchdog(
            loop, limit_s=LOOP_TIMEOUT_S, alarm=partial(_end_process, threading.get_ident())
        )
        self._watchdog.start()
        jobs: dict[str, Work] = {
            "grants": self._watch.run,
            "rollouts": export_rollouts,
            "canary": self._engine.run,
        }
        if config.api.api_keys_file is not None:
            await self._exchange.round()  # before the first request
            jobs["keys"] = self._exchange.run
        self._watching = [loop.create_task(keep_running(work, name)) for name, work in jobs.items()]

    def __serve_build_asgi_app__(self) -> Any:
        """Build the HTTP application; Serve calls it once, after the constructor."""
        metrics = Exposition().page
        app = create_app(
            self._engine,
            model_name=self._config.model.name,
            aliases=self._config.model.names,
            adapters=[adapter.name for adapter in self._config.model.adapters],
            api=self._config.api,
            created=int(time.time()),
            version=__version__,
            commit=self._commit,
            access=self._watch.snapshot,
            metrics=metrics,
            service=Fleet(serve.get_replica_context().app_name, metrics),
            on_finished=self._finished,
            key_limits=self._key_limits,
            direct=not through_haproxy(),
        )
        return SingleRequestId(app)

    async def check_health(self) -> None:
        """Answer Serve's health check on the loop that answers requests: it has to come round."""

    async def __del__(self) -> None:
        """Stop the watch, and what listens for replicas."""
        if watchdog := getattr(self, "_watchdog", None):
            watchdog.stop()
        if files := getattr(self, "_files", None):
            files.stop()
        for watching in getattr(self, "_watching", ()):
            watching.cancel()
        if watch := getattr(self, "_watch", None):
            await asyncio.to_thread(watch.release)
        if frames := getattr(self, "_frames", None):
            frames.close()
        if exchange := getattr(self, "_exchange", None):
            exchange.leave()

    def _finished(self, record: RequestRecord) -> None:
        self._metrics.observe(record)
        write_record(record)


async def connect(frames: FrameReceiver, canary: Canary) -> RemoteEngine:
    """Return the engine of a canary, which is another application.

    Args:
        frames: of this ingress.
        canary: of its application.

    Raises:
        RayServeException: there is none of its name.
    """
    try:
        handle: DeploymentHandle[Any] = await asyncio.to_thread(
            serve.get_deployment_handle, SERVER_DEPLOYMENT, canary.application
        )
    except KeyError:  # Ray 2.60's own word for it
        raise RayServeException(f"no {canary.application} serves") from None
    return RemoteEngine(
        handle, frames, patience_s=canary.patience_s, stall_timeout_s=canary.stall_timeout_s
    )


async def export_rollouts() -> None:
    """Publish how this application's rollouts ended, until cancelled."""
    shown = RolloutMetrics()
    name = serve.get_replica_context().app_name
    while True:
        with suppress(RayError):
            totals = await asyncio.to_thread(rollout_history.totals, name)
            for result in rollout_history.ROLLOUTS & totals.keys():
                shown.show(result, **asdict(totals[result]))
        await asyncio.sleep(REPEAT_S)


def _end_process(loop_thread: int, seconds: float) -> None:
    """End this process, whose event loop is blocked, so that Serve starts another at once."""
    log.error("ingress.hung", seconds=round(seconds, 1), stack=stack_of(loop_thread))
    os._exit(1)


def write_record(record: RequestRecord) -> None:
    """Write the one log line of a request."""
    facts = {
        "request_id": record.request_id,
        "path": record.path,
        "key": record.key and record.key.name,
        "status": record.status,
        "finish_reason": record.finish_reason,
        "error_code": record.error_code,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "ttft_s": record.ttft_s,
        "duration_s": round(record.duration_s, 4),
    }
    if record.error_code == RequestCancelled.code:
        log.info("request.cancelled", **facts)
    elif record.status >= 500:
        log.error("request.finished", **facts)
    else:
        log.info("request.finished", **facts)
