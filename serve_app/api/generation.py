"""The way of a generation request: read, check, generate, answer, and always let go.

The first delta is awaited before the status is sent, so that a request the engine refuses
gets its own status and not a broken stream. A client that goes away, a deadline and a
cancelled task all end in the same place: leaving `Choices`, which frees the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import structlog
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from serve_app.api import shapes, sse
from serve_app.api.answers import ChunkVoice, usage_body
from serve_app.api.body import TIMEOUT_HEADER, parse_object, require_json, time_limit
from serve_app.api.chat_voice import ChatVoice
from serve_app.api.choices import Choices, Piece, join
from serve_app.api.completion_voice import CompletionVoice, read_echoes
from serve_app.api.convert import Plan, plan_chat, plan_completion
from serve_app.api.envelope import envelope
from serve_app.api.fields import CHAT, COMPLETION, Fields
from serve_app.api.fields import RESPONSES as RESPONSE
from serve_app.api.intake import Intake
from serve_app.api.offload import Offload
from serve_app.api.record import Trace, trace_of
from serve_app.api.response_voice import ResponseVoice
from serve_app.api.responses import plan_response, renamed
from serve_app.api.schemas import ChatRequest, CompletionRequest, validate
from serve_app.api.shapes import OldCalls
from serve_app.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    RequestCancelled,
    RequestError,
    ServeAppError,
)
from serve_app.protocol import LLMEngine, Usage

log = structlog.get_logger()


class Voice(Protocol):
    """Writes the answer of one API request."""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Mapping[str, object]:
        """Return the complete answer: one piece for each choice, by index."""
        ...

    def events(self, pieces: Sequence[Piece], usage: Usage) -> Iterator[bytes]:
        """Return the events of a stream that tell more pieces."""
        ...

    def end(self, usage: Usage) -> bytes:
        """Return what a stream ends with when all went well."""
        ...

    def failed(self, error: ServeAppError) -> bytes:
        """Return what a stream ends with instead."""
        ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What makes chat, completions and responses differ.

    Args:
        fields: which fields of a body are honoured.
        plan: from a body and the request's id.
        voice: writes the answer of a plan under a model's name.
        renamed: gives an error the endpoint's own name of the field at fault.
    """

    fields: Fields
    plan: Callable[[dict[str, Any], str], Plan]
    voice: Callable[[LLMEngine, str, Plan], Awaitable[Voice]]
    renamed: Callable[[RequestError], RequestError] = lambda error: error


async def _chat_voice(_engine: LLMEngine, model: str, plan: Plan) -> Voice:
    voice: ChunkVoice = ChatVoice(model, plan)
    return _Chunks(OldCalls(voice) if plan.old_calls else voice, plan)


def _plan_chat(body: dict[str, Any], request_id: str) -> Plan:
    old = shapes.is_old(body)
    try:
        plan = plan_chat(validate(ChatRequest, shapes.modern(body)), request_id=request_id)
    except RequestError as error:
        raise (shapes.renamed(error) if old else error) from error
    return replace(plan, old_calls=old)


async def _completion_voice(engine: LLMEngine, model: str, plan: Plan) -> Voice:
    return _Chunks(CompletionVoice(model, plan, await read_echoes(engine, plan)), plan)


async def _response_voice(_engine: LLMEngine, model: str, plan: Plan) -> Voice:
    return ResponseVoice(model, plan)


CHAT_COMPLETIONS = Endpoint(
    fields=CHAT,
    plan=_plan_chat,
    voice=_chat_voice,
)
COMPLETIONS = Endpoint(
    fields=COMPLETION,
    plan=lambda body, request_id: plan_completion(
        validate(CompletionRequest, body), request_id=request_id
    ),
    voice=_completion_voice,
)
RESPONSES = Endpoint(
    fields=RESPONSE,
    plan=lambda body, request_id: plan_response(body, request_id=request_id),
    voice=_response_voice,
    renamed=renamed,
)


class Generate:
    """The ASGI endpoint of one `Endpoint`.

    Args:
        endpoint: chat, completions or responses.
        engine: continues the prompts.
        model_name: the one model that is served here.
        intake: reads the bodies.
        offload: does what takes long.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        engine: LLMEngine,
        *,
        model_name: str,
        intake: Intake,
        offload: Offload,
    ) -> None:
        self._endpoint = endpoint
        self._engine = engine
        self._model_name = model_name
        self._intake = intake
        self._offload = offload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; errors are raised, the boundary turns them into answers."""
        headers, trace = Headers(scope=scope), trace_of(scope)
        trace.model = self._model_name
        seconds = time_limit(headers)
        try:
            async with asyncio.timeout(seconds) as limit:
                require_json(headers)
                async with self._intake.body(receive, headers) as raw:
                    plan = await self._offload.run(len(raw), partial(self._plan, raw, trace))
                await while_connected(receive, self._answer(plan, trace, send))
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                "the request was not finished within its own time limit", param=TIMEOUT_HEADER
            ) from None

    def _plan(self, raw: bytes, trace: Trace) -> Plan:
        body = parse_object(raw)
        self._require_model(body.get("model"))
        ignored = self._endpoint.fields.check(body)
        with self._own_names():
            plan = self._endpoint.plan(body, trace.request_id)
        trace.stream = plan.stream
        if ignored:
            names = [name[:64] for name in ignored[:16]]
            log.debug("request.fields_ignored", request_id=trace.request_id, fields=names)
        return plan

    def _require_model(self, name: object) -> None:
        if name is None or name == self._model_name:
            return
        if not isinstance(name, str):
            raise InvalidRequest("`model`: must be a string", param="model")
        raise ModelNotFound(
            f"this model is not served here; ask for {self._model_name!r}, or leave `model` out",
            param="model",
        )

    async def _answer(self, plan: Plan, trace: Trace, send: Send) -> None:
        voice = await self._endpoint.voice(self._engine, self._model_name, plan)
        trace.write_failure = voice.failed
        running = Choices(self._engine, plan.requests, prompt_only=plan.prompt_only)
        with self._own_names(plan.structure_field):
            async with running as choices:
                if plan.stream:
                    await _stream(voice, choices, trace, send)
                else:
                    await _collect(voice, choices, trace, send)

    @contextmanager
    def _own_names(self, structure: str | None = None) -> Iterator[None]:
        """Let errors name the fields as this endpoint's clients write them.

        Args:
            structure: the field that the engine knows as `structure`.
        """
        try:
            yield
        except InvalidRequest as error:
            if error.param == "structure":
                error = InvalidRequest(error.message, param=structure)
            raise self._endpoint.renamed(error) from error
        except RequestError as error:
            raise self._endpoint.renamed(error) from error


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, or cancel it when the client goes away.

    Args:
        receive: the connection's, after the body was read.
        work: awaited to its end also when it is cancelled.

    Raises:
        RequestCancelled: the client went away first.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestCancelled("the client went away")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
    await working


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _collect(voice: Voice, choices: Choices, trace: Trace, send: Send) -> None:
    arrived: dict[int, list[Piece]] = {}
    while pieces := await choices.next():
        trace.delta_arrived(choices.usage, choices.timing, choices.count)
        for piece in pieces:
            arrived.setdefault(piece.index, []).append(piece)
    whole = [join(arrived[index]) for index in sorted(arrived)]
    trace.finish_reason = whole[0].finish_reason
    body = sse.dump(voice.whole(whole, choices.usage))
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    await _start(send, {**headers, "server-timing": trace.server_timing})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _stream(voice: Voice, choices: Choices, trace: Trace, send: Send) -> None:
    pieces = await choices.next()
    trace.delta_arrived(choices.usage, choices.timing, choices.count)
    await _start(send, {**sse.HEADERS, "server-timing": trace.server_timing})
    while pieces:
        for piece in pieces:
            if piece.index == 0 and piece.finish_reason is not None:
                trace.finish_reason = piece.finish_reason
        body = b"".join(voice.events(pieces, choices.usage))
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        pieces = await choices.next()
        trace.delta_arrived(choices.usage, choices.timing, choices.count)
    body = voice.end(choices.usage)
    await send({"type": "http.response.body", "body": body, "more_body": False})


class _Chunks:
    """See `Voice`; an event is a chunk, with the usage that was asked for."""

    def __init__(self, voice: ChunkVoice, plan: Plan) -> None:
        self._voice = voice
        self._plan = plan

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Mapping[str, object]:
        return self._voice.whole(pieces, usage)

    def events(self, pieces: Sequence[Piece], usage: Usage) -> Iterator[bytes]:
        for piece in pieces:
            for chunk in self._voice.chunks(piece):
                yield self._event(chunk, usage)

    def end(self, usage: Usage) -> bytes:
        if not self._plan.include_usage:
            return sse.DONE
        return sse.event({**self._voice.end(), "usage": usage_body(usage)}) + sse.DONE

    def failed(self, error: ServeAppError) -> bytes:
        return sse.event(envelope(error))

    def _event(self, chunk: dict[str, Any], usage: Usage) -> bytes:
        if self._plan.continuous_usage:
            chunk["usage"] = usage_body(usage)
        elif self._plan.include_usage:
            chunk["usage"] = None
        return sse.event(chunk)


async def _start(send: Send, headers: dict[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
