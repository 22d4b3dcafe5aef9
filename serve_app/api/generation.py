"""The way of a generation request: read, check, generate, answer, and always let go.

The first delta is awaited before the status is sent, for some seconds (`delivery.py`), so that a
request the engine refuses gets its own status and not a broken stream. A client that goes away,
a deadline and a cancelled task all end in the same place: leaving `Choices`, which frees the
engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from serve_app.api import shapes
from serve_app.api.chat_response import ChatWriter
from serve_app.api.choices import Choices
from serve_app.api.completion_response import CompletionWriter, read_echoes
from serve_app.api.convert import Plan, plan_chat, plan_completion
from serve_app.api.delivery import AnswerWriter, Chunks, EventStream, collect, plain_failure
from serve_app.api.intake import Intake
from serve_app.api.names import Names
from serve_app.api.offload import Offload
from serve_app.api.request_body import TIMEOUT_HEADER, parse_object, require_json, time_limit
from serve_app.api.request_record import Trace, trace_of
from serve_app.api.response_types import ChunkWriter
from serve_app.api.responses_request import plan_response, renamed
from serve_app.api.responses_response import ResponseWriter
from serve_app.api.schemas import ChatRequest, CompletionRequest, validate
from serve_app.api.shapes import OldCalls
from serve_app.api.supported_fields import CHAT, COMPLETION, Fields
from serve_app.api.supported_fields import RESPONSES as RESPONSE
from serve_app.config import ApiConfig
from serve_app.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RequestCancelled,
    RequestError,
)
from serve_app.protocol import LLMEngine, Priority

log = structlog.get_logger()

# What a request is taken for against its key's limit of tokens, until it has ended.
BYTES_PER_TOKEN = 4
UNLIMITED_TOKENS = 256  # of a completion without a limit; most are shorter


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What makes chat, completions and responses differ.

    Args:
        fields: which fields of a body are honoured.
        plan: from a body and the request's id.
        writer: writes the answer of a plan under a model's name.
        renamed: gives an error the endpoint's own name of the field at fault.
    """

    fields: Fields
    plan: Callable[[dict[str, Any], str], Plan]
    writer: Callable[[LLMEngine, str, Plan], Awaitable[AnswerWriter]]
    renamed: Callable[[RequestError], RequestError] = lambda error: error


async def _chat_writer(_engine: LLMEngine, model: str, plan: Plan) -> AnswerWriter:
    writer: ChunkWriter = ChatWriter(model, plan)
    return Chunks(OldCalls(writer) if plan.old_calls else writer, plan)


def _plan_chat(body: dict[str, Any], request_id: str) -> Plan:
    old = shapes.is_old(body)
    try:
        plan = plan_chat(validate(ChatRequest, shapes.modern(body)), request_id=request_id)
    except RequestError as error:
        raise (shapes.renamed(error) if old else error) from error
    return replace(plan, old_calls=old)


async def _completion_writer(engine: LLMEngine, model: str, plan: Plan) -> AnswerWriter:
    return Chunks(CompletionWriter(model, plan, await read_echoes(engine, plan)), plan)


async def _response_writer(_engine: LLMEngine, model: str, plan: Plan) -> AnswerWriter:
    return ResponseWriter(model, plan)


CHAT_COMPLETIONS = Endpoint(
    fields=CHAT,
    plan=_plan_chat,
    writer=_chat_writer,
)
COMPLETIONS = Endpoint(
    fields=COMPLETION,
    plan=lambda body, request_id: plan_completion(
        validate(CompletionRequest, body), request_id=request_id
    ),
    writer=_completion_writer,
)
RESPONSES = Endpoint(
    fields=RESPONSE,
    plan=lambda body, request_id: plan_response(body, request_id=request_id),
    writer=_response_writer,
    renamed=renamed,
)


class Generate:
    """The ASGI endpoint of one `Endpoint`.

    Args:
        endpoint: chat, completions or responses.
        engine: continues the prompts.
        names: of the one model that is served here.
        limits: of answers.
        intake: reads the bodies.
        offload: does what takes long.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        engine: LLMEngine,
        *,
        names: Names,
        limits: ApiConfig,
        intake: Intake,
        offload: Offload,
    ) -> None:
        self._endpoint = endpoint
        self._engine = engine
        self._names = names
        self._limits = limits
        self._intake = intake
        self._offload = offload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; errors are raised, the boundary turns them into answers."""
        headers, trace = Headers(scope=scope), trace_of(scope)
        trace.model = self._names.own
        seconds = time_limit(headers)
        try:
            async with asyncio.timeout(seconds) as limit:
                # First of all: a browser can post other types from a foreign page without asking.
                require_json(headers)
                async with self._intake.body(receive, headers) as raw:
                    # In a thread where it is large: parsing 2 MB takes longer than a token.
                    plan = await self._offload.run(len(raw), partial(self._plan, raw, trace))
                if trace.allowance is not None:
                    trace.allowance.reserve(_most_tokens(plan, len(raw)))
                await while_connected(receive, self._answer(plan, trace, send))
        except TimeoutError:
            # A TimeoutError of the engine's own is a fault and no deadline of the client's.
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                "the request was not finished within its own time limit", param=TIMEOUT_HEADER
            ) from None

    def _plan(self, raw: bytes, trace: Trace) -> Plan:
        body = parse_object(raw)
        model = self._names.answering(body.get("model"))
        ignored = self._endpoint.fields.check(body)
        with self._own_names():
            plan = self._endpoint.plan(body | {"model": model}, trace.request_id)
        trace.stream = plan.stream
        if ignored:
            names = [name[:64] for name in ignored[:16]]
            log.debug("request.fields_ignored", request_id=trace.request_id, fields=names)
        if adapter := self._names.adapter(model):
            trace.model = adapter
        priority = trace.key.priority if trace.key else Priority.NORMAL
        requests = tuple(
            replace(request, client=trace.client, adapter=adapter, priority=priority)
            for request in plan.requests
        )
        return replace(plan, model=model, requests=requests)

    async def _answer(self, plan: Plan, trace: Trace, send: Send) -> None:
        stream = EventStream(
            trace, send, keep_alive_s=self._limits.keep_alive_s or None, offload=self._offload
        )
        # Until the writer is there: it may have to ask a replica for the prompt's text first.
        trace.write_failure = plain_failure
        making = self._endpoint.writer(self._engine, plan.model, plan)
        writer = await (stream.wait_for(making) if plan.stream else making)
        trace.write_failure = writer.failed
        running = Choices(
            self._engine,
            plan.requests,
            prompt_only=plan.prompt_only,
            max_bytes=self._limits.max_answer_bytes,
        )
        with self._own_names(plan.structure_field):
            async with running as choices:
                if plan.stream:
                    await stream.deliver(writer, choices)
                else:
                    await collect(writer, choices, trace, send, self._offload)

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


def _most_tokens(plan: Plan, body_bytes: int) -> int:
    """Return what a request may come to, prompts and completions together, before they are known.

    Args:
        plan: says how long its completions may be.
        body_bytes: which the prompts are most of.
    """
    limits = [(request.n, request.sampling.max_tokens) for request in plan.requests]
    completions = sum(n * (UNLIMITED_TOKENS if limit is None else limit) for n, limit in limits)
    return body_bytes // BYTES_PER_TOKEN + completions


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
        # To its end also when it is cancelled: leaving `Choices` is what frees the engine.
        await asyncio.gather(working, watching, return_exceptions=True)
    await working


async def _disconnected(receive: Receive) -> None:
    # Whatever else comes, such as more of a body that was read whole, means nothing.
    while (await receive())["type"] != "http.disconnect":
        pass
