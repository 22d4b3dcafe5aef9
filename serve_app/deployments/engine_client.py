"""The replicas as an `LLMEngine`, over a Serve handle.

The one place where Ray's errors end: what a client may read is `ServeAppError.message`,
everything else stays in the log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import structlog
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.deployments.heartbeats import without_heartbeats
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

log = structlog.get_logger()

READY_TIMEOUT_S = 2.0
UNTOUCHED_S = 10.0  # how long a request looks for a replica whose engine runs; one ends in 2 s
AGAIN_S = 0.25


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
        ended the replica, it would end the next one. A replica whose engine had stopped before
        counts for nothing: it ends in a moment, and until then it may be met again.

        Raises:
            ServeAppError: the replica's own error, or an `EngineError` that says no more
                than a client may know.
        """
        moved = request.sampling.structure is not None
        patient_until = time.monotonic() + UNTOUCHED_S
        while True:
            begun = False
            try:
                async with aclosing(self._continue(request)) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
            except EngineDead as dead:
                if dead.details.get("untouched") and time.monotonic() < patient_until:
                    await asyncio.sleep(AGAIN_S)
                    continue
                if begun or moved:
                    raise
                moved = True
                log.warning("request.moved", request_id=request.request_id)
            else:
                return

    async def _continue(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        deltas: Any = self._stream.generate.remote(request)
        unfinished = request.n  # completions
        finished = False
        try:
            async for item in without_heartbeats(
                deltas, patience_s=self._patience_s, stall_timeout_s=self._stall_timeout_s
            ):
                if isinstance(item, ServeAppError):
                    finished = True
                    raise item
                if item.finish_reason is not None:
                    unfinished -= 1
                finished = unfinished == 0
                yield item
        except (RayError, RayServeException) as error:
            finished = True
            raise translate(error, request_id=request.request_id) from None
        finally:
            if not finished:
                deltas.cancel()

    async def ready(self) -> bool:
        """Return whether a replica would answer now; False when none does within two seconds.

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
    """Return whether this application has no replica of the model, and starts none."""
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
