"""The replicas as an `LLMEngine`, over a Serve handle.

The one place where Ray's errors end: what a client may read is `ServeAppError.message`,
everything else stays in the log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

import structlog
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.deployments.frame_receiver import LOST, NO_CONNECTION, FrameReceiver, Inbox
from serve_app.deployments.parts import Joining
from serve_app.errors import (
    EngineDead,
    EngineError,
    ModelNotFound,
    NotReady,
    Overloaded,
    RequestCancelled,
    ServeAppError,
)
from serve_app.protocol import GenerationRequest, Heartbeat, Prompt, PromptTokens, TokenDelta
from serve_app.serve_config import SERVER_DEPLOYMENT

log = structlog.get_logger()

READY_TIMEOUT_S = 2.0
AGAIN_S = 0.25
# The session of a call that goes to any replica, wherever its beginning leads (`prefix_router.py`).
ANY_REPLICA = "any replica"
LAST_FRAME_S = 5.0  # behind the end of the call that it belongs to
# Times that a request may meet a stopped engine, whose replica ends in 2 s, or one that has not the
# adapter.
UNTOUCHED = 40


class RemoteEngine:
    """An `LLMEngine` behind a Serve handle.

    Args:
        handle: handle of the `LLMServer` deployment.
        receiver: where replicas send deltas.
        patience_s: how long a request may wait for its first delta, in Serve's line, in the
            engine's, and for a replica to start.
        stall_timeout_s: how long a replica that has taken it on may give no sign of life.
        may_sleep: whether there may be no replica at all until somebody asks.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        receiver: FrameReceiver,
        *,
        patience_s: float,
        stall_timeout_s: float,
        may_sleep: bool = False,
    ) -> None:
        self._stream = handle.options(stream=True)
        self._receiver = receiver
        self._tasks: set[asyncio.Task[None]] = set()
        self._handle = handle
        self._patience_s = patience_s
        self._stall_timeout_s = stall_timeout_s
        self._may_sleep = may_sleep

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Continue one prompt on some replica; see `LLMEngine.generate`.

        A replica that is lost, or whose engine stops, before its first delta cost the client
        nothing yet: the request goes to another one, once. One with a structure does not: should
        that have been what ended the replica, it would end the next one. A replica whose engine
        had stopped before counts for nothing: it ends in a moment, and until then it may be met
        again. Nor does one of another version count, which during a rollout may lack an adapter.

        Raises:
            ServeAppError: the replica's own error, or an `EngineError` that says no more
                than a client may know.
        """
        moved = request.sampling.structure is not None
        left = UNTOUCHED
        stream = self._stream
        while True:
            begun = False
            try:
                async with aclosing(self._continue(request, stream)) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
            except (EngineDead, NotReady) as error:
                # Not to where its beginning leads: there it has been.
                stream = self._stream.options(session_id=ANY_REPLICA)
                if error.details.get("untouched") and left:
                    left -= 1
                    await asyncio.sleep(AGAIN_S)
                    continue
                if begun or moved or isinstance(error, NotReady):
                    raise
                moved = True
                log.warning("request.moved", request_id=request.request_id)
            else:
                return

    async def _continue(
        self, request: GenerationRequest, stream: DeploymentHandle[Any]
    ) -> AsyncGenerator[TokenDelta, None]:
        with self._receiver.open() as inbox:
            call: Any = stream.generate.remote(request, inbox.reply_to)
            forwarding = self._start(_forward(call, inbox, request.request_id))
            patient_until: float | None = time.monotonic() + self._patience_s
            unfinished = request.n  # completions
            over, parts = False, Joining()
            try:
                while unfinished:
                    item = await self._next(inbox, patient_until)
                    if isinstance(item, ServeAppError):
                        # Behind a lost connection the replica may be at it still.
                        over = item.details.get("cause") != NO_CONNECTION
                        raise _of_this_version(item, request)
                    patient_until = None
                    if (delta := parts.whole(item)) is None:
                        continue
                    if delta.finish_reason is not None:
                        unfinished -= 1
                    over = unfinished == 0
                    yield delta
            finally:
                if not (over or forwarding.done()):
                    call.cancel()

    async def _next(self, inbox: Inbox, patient_until: float | None) -> TokenDelta | ServeAppError:
        """Return what comes next for a request.

        Args:
            inbox: the request's.
            patient_until: when its first delta has to be there, in monotonic seconds; None once
                it was.

        Raises:
            NotReady: the first delta did not come in time.
            EngineDead: the replica that has it gives no sign of life any more.
        """
        while True:
            ends = [] if patient_until is None else [patient_until]
            if inbox.taken:
                ends.append(inbox.alive_at + self._stall_timeout_s)
            remaining = min(ends) - time.monotonic()
            if (item := await inbox.get(remaining)) is not None:
                return item
            now = time.monotonic()
            if patient_until is not None and now >= patient_until:
                raise NotReady(f"no replica answered within {self._patience_s:g} s; retry later")
            if inbox.taken and now >= inbox.alive_at + self._stall_timeout_s:
                raise EngineDead(
                    f"the replica gave no sign of life for {self._stall_timeout_s:g} s; "
                    "retry the request",
                    cause="stalled",
                )

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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
        try:
            return await self._ask_one(method, *arguments)
        except EngineDead:  # such a question ends no replica; another one answers
            return await self._ask_one(method, *arguments)

    async def _ask_one(self, method: str, *arguments: object) -> Any:
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


def _of_this_version(error: ServeAppError, request: GenerationRequest) -> ServeAppError:
    """Return an error; of a replica of another version, which lacks the adapter, that one is met.

    An ingress asks for what its own version has.
    """
    if not isinstance(error, ModelNotFound):
        return error
    message = f"this replica has no {request.adapter} yet, a rollout is under way; retry later"
    return NotReady(message, untouched=True)


async def _forward(call: Any, inbox: Inbox, request_id: str) -> None:
    """Put what comes over Ray's stream of a call into its inbox, and how it ended.

    Items come this way where the replica cannot reach this ingress by itself.
    """
    try:
        async for item in call:
            if isinstance(item, Heartbeat):
                inbox.sign_of_life()
            else:
                inbox.put(item)
        if inbox.closed:
            return
        await asyncio.sleep(LAST_FRAME_S)  # the call may be over before the last frame is here
        error: ServeAppError = EngineDead(LOST, cause="no end")
    except asyncio.CancelledError:
        inbox.put(RequestCancelled("the request was cancelled"))
        raise
    except Exception as failure:  # noqa: BLE001 (of any kind: somebody waits for the end)
        if inbox.closed:  # its client has cancelled it, which is nothing to log
            return
        error = translate(failure, request_id=request_id)
    inbox.put(error)


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
        return EngineDead(LOST, cause=kind)
    return EngineError("generation failed", cause=kind)
