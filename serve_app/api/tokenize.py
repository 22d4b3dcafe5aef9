"""`/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's shape: what a prompt costs.

A prompt or a conversation is read as the endpoint reads it that would answer it, so the ids are
those that a request would begin with.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from serve_app.api.generation import CHAT_COMPLETIONS, COMPLETIONS
from serve_app.api.intake import Intake
from serve_app.api.names import Names
from serve_app.api.offload import Offload
from serve_app.api.request_body import parse_object, require_json
from serve_app.api.request_record import trace_of
from serve_app.api.sse import dump
from serve_app.errors import InvalidRequest
from serve_app.protocol import LLMEngine

Body: TypeAlias = dict[str, Any]
Run: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]  # a request's `Offload.run`
MAX_IDS = 2**20
_STRINGS = "return_token_strs"  # the other fields are those of the endpoint that is meant


def token_routes(
    engine: LLMEngine, names: Names, *, intake: Intake, offload: Offload
) -> list[Route]:
    """Return the routes; those of vLLM stand outside of `/v1`, and are found there as well.

    Args:
        engine: knows the model's tokenizer.
        names: of the one model.
        intake: reads the bodies.
        offload: does what takes long.
    """
    answers = {
        "/tokenize": partial(_tokenize, engine),
        "/detokenize": partial(_detokenize, engine),
    }
    posts = [
        Route(f"{base}{path}", _Endpoint(answer, names, intake, offload), methods=["POST"])
        for path, answer in answers.items()
        for base in ("", "/v1")
    ]

    async def info(_request: Request) -> Response:
        return Response(dump(await engine.tokenizer_info()), media_type="application/json")

    return [*posts, Route("/tokenizer_info", info), Route("/v1/tokenizer_info", info)]


class _Endpoint:
    """The ASGI side of an answer that needs no stream."""

    def __init__(
        self,
        answer: Callable[[Body, Run], Awaitable[Body]],
        names: Names,
        intake: Intake,
        offload: Offload,
    ) -> None:
        self._answer = answer
        self._names = names
        self._intake = intake
        self._offload = offload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        trace_of(scope).model = self._names.own
        require_json(headers)
        async with self._intake.body(receive, headers) as raw:
            run = partial(self._offload.run, len(raw))
            request = await run(partial(parse_object, raw))
        self._names.answering(request.get("model"))
        answer = await self._answer(request, run)
        body = await run(partial(dump, answer))
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def _tokenize(engine: LLMEngine, request: Body, run: Run) -> Body:
    strings = request.get(_STRINGS)
    if not isinstance(strings, bool | None):
        raise InvalidRequest(f"`{_STRINGS}`: must be true or false", param=_STRINGS)
    endpoint = CHAT_COMPLETIONS if "messages" in request else COMPLETIONS
    fields = {name: value for name, value in request.items() if name != _STRINGS}
    requests = (await run(partial(endpoint.plan, fields, ""))).requests
    if len(requests) != 1:
        raise InvalidRequest("`prompt`: must be one prompt", param="prompt")
    tokens = await engine.tokenize(requests[0].prompt)
    ids = tokens.token_ids
    return {
        "count": len(ids),
        "max_model_len": tokens.max_context_tokens,
        "tokens": list(ids),
        "token_strs": list(await engine.token_strings(ids)) if strings else None,
    }


async def _detokenize(engine: LLMEngine, request: Body, run: Run) -> Body:
    ids = await run(partial(_ids, request.get("tokens")))
    return {"prompt": await engine.detokenize(ids) if ids else ""}


def _ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_IDS or not all(map(_is_id, value)):
        raise InvalidRequest("`tokens`: must be a list of token ids", param="tokens")
    return tuple(value)


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31
