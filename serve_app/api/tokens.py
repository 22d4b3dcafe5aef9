"""`POST /tokenize` and `/detokenize`, in vLLM's shape: what a prompt costs, before it is sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from serve_app.api.body import parse_object, read_body, require_json
from serve_app.api.generation import CHAT_COMPLETIONS, COMPLETIONS
from serve_app.api.record import trace_of
from serve_app.api.sse import dump
from serve_app.errors import InvalidRequest, ModelNotFound, UnsupportedParameter
from serve_app.protocol import LLMEngine

Body: TypeAlias = dict[str, Any]
MAX_IDS = 2**20
# Neutral values of vLLM's own fields; the others are those of the endpoint that is meant.
_OWN = {"add_special_tokens": True, "return_token_strs": False}


def token_routes(engine: LLMEngine, model_name: str, *, max_request_bytes: int) -> list[Route]:
    """Return both routes.

    Args:
        engine: knows the model's tokenizer.
        model_name: the one model's name.
        max_request_bytes: largest body.
    """
    answers = {
        "/tokenize": partial(_tokenize, engine),
        "/detokenize": partial(_detokenize, engine),
    }
    return [
        Route(path, _Endpoint(answer, model_name, max_request_bytes), methods=["POST"])
        for path, answer in answers.items()
    ]


class _Endpoint:
    """The ASGI side of an answer that needs no stream."""

    def __init__(
        self, answer: Callable[[Body], Awaitable[Body]], model_name: str, max_request_bytes: int
    ) -> None:
        self._answer = answer
        self._model_name = model_name
        self._max_request_bytes = max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        trace_of(scope).model = self._model_name
        require_json(headers)
        request = parse_object(await read_body(receive, headers, max_bytes=self._max_request_bytes))
        if request.get("model") not in (None, self._model_name):
            raise ModelNotFound(
                f"this model is not served here; ask for {self._model_name!r}, or leave `model` "
                "out",
                param="model",
            )
        body = dump(await self._answer(request))
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def _tokenize(engine: LLMEngine, request: Body) -> Body:
    for name, neutral in _OWN.items():
        if request.get(name) not in (None, neutral):
            raise UnsupportedParameter(f"`{name}` is not supported here", param=name)
    endpoint = CHAT_COMPLETIONS if "messages" in request else COMPLETIONS
    fields = {name: value for name, value in request.items() if name not in _OWN}
    requests = endpoint.plan(fields, "").requests
    if len(requests) != 1:
        raise InvalidRequest("`prompt`: must be one prompt", param="prompt")
    tokens = await engine.tokenize(requests[0].prompt)
    return {
        "count": len(tokens.token_ids),
        "max_model_len": tokens.max_context_tokens,
        "tokens": list(tokens.token_ids),
    }


async def _detokenize(engine: LLMEngine, request: Body) -> Body:
    ids = request.get("tokens")
    if not isinstance(ids, list) or len(ids) > MAX_IDS or not all(map(_is_id, ids)):
        raise InvalidRequest("`tokens`: must be a list of token ids", param="tokens")
    return {"prompt": await engine.detokenize(tuple(ids)) if ids else ""}


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31
