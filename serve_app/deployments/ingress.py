"""The ingress deployment: OpenAI's HTTP surface in front of the LLM server.

`RemoteEngine` makes a Serve handle an `LLMEngine`; it is the one place where Ray's errors
end: what a client may read is `ServeAppError.message`, everything else stays in the log.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import structlog
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import __version__
from serve_app.access.preflight import preflight
from serve_app.access.recheck import Watch
from serve_app.access.token import write_no_core_file
from serve_app.access.verdict import Verdict
from serve_app.api.app import RequestRecord, create_app
from serve_app.cluster.controller import through_haproxy
from serve_app.cluster.placement import placements_of
from serve_app.config import AppConfig
from serve_app.deployments.heartbeats import without_heartbeats
from serve_app.deployments.status import Fleet, living_nodes
from serve_app.errors import (
    EngineDead,
    EngineError,
    NotReady,
    Overloaded,
    RequestCancelled,
    ServeAppError,
)
from serve_app.protocol import GenerationRequest, Prompt, PromptTokens, TokenDelta
from serve_app.serve_config import SERVER_DEPLOYMENT
from serve_app.telemetry import logs, rollout_counts
from serve_app.telemetry.metrics import REPEAT_S, AccessMetrics, IngressMetrics, RolloutMetrics
from serve_app.telemetry.prometheus import Exposition
from serve_app.watchdog import LoopWatchdog, stack_of

log = structlog.get_logger()

READY_TIMEOUT_S = 2.0
# A loop that has not come round for so long answers nobody; its process makes room for another.
LOOP_TIMEOUT_S = 30.0


class RemoteEngine:
    """An `LLMEngine` behind a Serve handle.

    Args:
        handle: handle of the `LLMServer` deployment.
        patience_s: how long a request may wait for its first delta, in Serve's line, in the
            engine's, and for a replica to start.
        stall_timeout_s: how long a replica that has taken it on may give no sign of life.
        may_sleep: whether there may be no replica at all until somebody asks.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        *,
        patience_s: float,
        stall_timeout_s: float,
        may_sleep: bool = False,
    ) -> None:
        self._stream = handle.options(stream=True)
        self._handle = handle
        self._patience_s = patience_s
        self._stall_timeout_s = stall_timeout_s
        self._may_sleep = may_sleep

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Continue one prompt on some replica; see `LLMEngine.generate`.

        A replica that is lost before its first delta cost the client nothing yet: the request
        goes to another one, once. One with a structure does not: should that have been what
        ended the replica, it would end the next one.

        Raises:
            ServeAppError: the replica's own error, or an `EngineError` that says no more
                than a client may know.
        """
        for again in (True, False):
            begun = False
            try:
                async with aclosing(self._continue(request)) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
            except EngineDead:
                if begun or not again or request.sampling.structure is not None:
                    raise
                log.warning("request.moved", request_id=request.request_id)
            else:
                return

    async def _continue(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        deltas: Any = self._stream.generate.remote(request)
        open_completions = request.n
        finished = False
        try:
            async for item in without_heartbeats(
                deltas, patience_s=self._patience_s, stall_timeout_s=self._stall_timeout_s
            ):
                if isinstance(item, ServeAppError):
                    finished = True
                    raise item
                open_completions -= item.finish_reason is not None
                finished = open_completions == 0
                yield item
        except (RayError, RayServeException) as error:
            finished = True
            raise translate(error, request_id=request.request_id) from None
        finally:
            if not finished:
                deltas.cancel()

    async def ready(self) -> bool:
        """Tell whether a replica would answer now; False when none does within two seconds.

        A service that sleeps is ready: whoever asks it something wakes it, this does not.
        """
        if self._may_sleep and await asyncio.to_thread(_asleep):
            return True
        response: Any = self._handle.ready.remote()
        try:
            return bool(await asyncio.wait_for(response, READY_TIMEOUT_S))
        except (TimeoutError, RayError, RayServeException):
            response.cancel()
            return False

    async def tokenize(self, prompt: Prompt) -> PromptTokens:
        """Return a prompt's tokens; see `LLMEngine.tokenize`."""
        tokens: PromptTokens = await self._ask("tokenize", prompt)
        return tokens

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Return the text of ids; see `LLMEngine.detokenize`."""
        text: str = await self._ask("detokenize", token_ids)
        return text

    async def token_strings(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """Return each id as the vocabulary writes it; see `LLMEngine.token_strings`."""
        strings: tuple[str, ...] = await self._ask("token_strings", token_ids)
        return strings

    async def tokenizer_info(self) -> dict[str, Any]:
        """Return the tokenizer's settings; see `LLMEngine.tokenizer_info`."""
        info: dict[str, Any] = await self._ask("tokenizer_info")
        return info

    async def _ask(self, method: str, *arguments: object) -> Any:
        response: Any = getattr(self._handle, method).remote(*arguments)
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                answer = await response
        except TimeoutError:
            response.cancel()
            raise NotReady(
                f"no replica answered within {self._stall_timeout_s:g} s; retry later"
            ) from None
        except (RayError, RayServeException) as error:
            raise translate(error, request_id="") from None
        if isinstance(answer, ServeAppError):
            raise answer
        return answer


def _asleep() -> bool:
    """Tell whether this application has no replica of the model, and starts none."""
    name = serve.get_replica_context().app_name
    try:
        deployment = serve.status().applications[name].deployments[SERVER_DEPLOYMENT]
    except (RayError, RayServeException, KeyError):
        return False
    return not any(deployment.replica_states.values())


def translate(error: Exception, *, request_id: str) -> ServeAppError:
    """Turn an exception of Ray into one of ours; a remote traceback never reaches a client."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ServeAppError):
        return cause
    if isinstance(cause, BackPressureError):
        return Overloaded("too many requests are waiting; retry later", retry_after_s=1)
    if isinstance(cause, TaskCancelledError | asyncio.CancelledError):
        return RequestCancelled("the request was cancelled")
    kind = type(cause).__name__
    ours = not isinstance(cause, RayError | RayServeException)
    # An exception's text may quote a prompt; Ray's own words do not.
    detail = "" if ours else str(cause)[:2000]
    log.error("request.failed", request_id=request_id, cause=kind, detail=detail)
    if not ours:
        return EngineDead("the replica was lost while it answered; retry the request", cause=kind)
    return EngineError("generation failed", cause=kind)


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
        self._engine = RemoteEngine(
            llm,
            patience_s=config.api.first_token_timeout_s,
            stall_timeout_s=config.api.stall_timeout_s,
            may_sleep=config.replica.min_replicas == 0,
        )
        self._config = config
        self._commit = verdict.commit
        access = AccessMetrics()
        self._watch = Watch(
            partial(recheck, config, verdict.commit),
            verdict,
            interval_s=config.access.watch_interval_s,
            on_verdict=access.show,
        )
        loop = asyncio.get_running_loop()
        self._watchdog = LoopWatchdog(
            loop, limit_s=LOOP_TIMEOUT_S, alarm=partial(_end_process, threading.get_ident())
        )
        self._watchdog.start()
        told = (self._watch.run(), access.keep(living_nodes), tell_rollouts())
        self._watching = [loop.create_task(work) for work in told]

    def __serve_build_asgi_app__(self) -> Any:
        """Build the HTTP application; Serve calls it once, after the constructor."""
        context = serve.get_replica_context()
        app = create_app(
            self._engine,
            model_name=self._config.model.name,
            aliases=self._config.model.names,
            api=self._config.api,
            created=int(time.time()),
            version=__version__,
            commit=self._commit,
            access=self._watch.snapshot,
            metrics=Exposition().page,
            whole=Fleet(context.app_name, context.replica_tag),
            on_finished=self._finished,
            direct=not through_haproxy(),
        )
        return SingleRequestId(app)

    async def check_health(self) -> None:
        """Answer Serve's health check on the loop that answers requests: it has to come round."""

    async def __del__(self) -> None:
        """Stop the watch."""
        if watchdog := getattr(self, "_watchdog", None):
            watchdog.stop()
        for watching in getattr(self, "_watching", ()):
            watching.cancel()

    def _finished(self, record: RequestRecord) -> None:
        self._metrics.observe(record)
        write_record(record)


async def tell_rollouts() -> None:
    """Publish how this application's rollouts ended, until cancelled."""
    shown = RolloutMetrics()
    name = serve.get_replica_context().app_name
    while True:
        with suppress(RayError):
            for result, ends in (await asyncio.to_thread(rollout_counts.told, name)).items():
                shown.show(result, **asdict(ends))
        await asyncio.sleep(REPEAT_S)


def _end_process(loop_thread: int, seconds: float) -> None:
    """End this process, whose event loop is blocked, so that Serve starts another at once."""
    log.error("ingress.hung", seconds=round(seconds, 1), stack=stack_of(loop_thread))
    os._exit(1)


def recheck(config: AppConfig, commit: str | None) -> Verdict:
    """Ask every node again about the commit that is served, whatever the branch means by now."""
    model = config.model if commit is None else config.model.model_copy(update={"revision": commit})
    return preflight(config.model_copy(update={"model": model}), placements=placements_of(config))


def write_record(record: RequestRecord) -> None:
    """Write the one log line of a request."""
    facts = {
        "request_id": record.request_id,
        "path": record.path,
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
