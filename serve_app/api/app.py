"""The HTTP application: every route and every layer, in the order a request meets them.

    RequestId ─► CORS ─► Boundary ─► RequireKey ─► routes ─► Generate ─► LLMEngine
                 if set  errors,     if set
                         records

`create_app` takes built objects and only wires them; it runs under Ray Serve and under any
ASGI server. Nothing here knows Ray, torch, the log's format or the metrics.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from serve_app.api.answers import Model
from serve_app.api.auth import ApiKeys, RequireKey
from serve_app.api.board import Board, Whole
from serve_app.api.generation import CHAT_COMPLETIONS, COMPLETIONS, RESPONSES, Generate
from serve_app.api.intake import Intake
from serve_app.api.middleware import Boundary, RequestId
from serve_app.api.offload import Offload
from serve_app.api.record import RequestRecord
from serve_app.api.sse import dump
from serve_app.api.tokens import token_routes
from serve_app.config import ApiConfig
from serve_app.errors import (
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NotReady,
    RouteNotFound,
    ServeAppError,
)
from serve_app.protocol import LLMEngine

__all__ = ["READY_TIMEOUT_S", "RequestRecord", "create_app"]

READY_TIMEOUT_S = 3.0  # over the ingress' own limit, so that its answer arrives
PROBES = frozenset({"/health", "/ready", "/version"})
OPEN = PROBES | {"/"}  # the page holds no data; what it asks for needs the key
QUIET = OPEN | {"/metrics", "/status"}
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_EXPOSED = ("x-request-id", "retry-after")


def create_app(  # noqa: PLR0913 - the one place that wires everything, by keyword
    engine: LLMEngine,
    *,
    model_name: str,
    api: ApiConfig,
    created: int,
    version: str,
    commit: str | None = None,
    max_context_tokens: int | None = None,
    access: Callable[[], Mapping[str, Any]] | None = None,
    metrics: Callable[[], Awaitable[str]] | None = None,
    whole: Whole | None = None,
    on_finished: Callable[[RequestRecord], None] | None = None,
) -> Starlette:
    """Wire the OpenAI-compatible application.

    Args:
        engine: answers the prompts.
        model_name: the one model's name; the owner is the part before its slash.
        api: limits, keys and origins.
        created: when the model was made available, in Unix seconds.
        version: this package's version, for `/version`.
        commit: the commit of the weights, for `/version`.
        max_context_tokens: the model's window, told in `/v1/models`.
        access: returns the last verdict of every node; None leaves `/access` out.
        metrics: returns Prometheus' text for `/metrics`; None leaves it out.
        whole: the rest of the service, for `/status`; None if this is all of it.
        on_finished: called once at the end of every request that is not a healthy probe.

    Raises:
        ConfigError: the file of API keys cannot be used.
    """
    card: Model = {
        "id": model_name,
        "object": "model",
        "created": created,
        "owned_by": model_name.partition("/")[0],
    }
    if max_context_tokens is not None:
        card["max_model_len"] = max_context_tokens
    about = {"version": version, "model": model_name, "commit": commit}
    board = Board(engine, about, whole)
    intake = Intake(max_bytes=api.max_request_bytes, timeout_s=api.body_timeout_s)
    offload = Offload()
    pages = _Pages(engine, card, about, access, metrics)
    app = Starlette(
        routes=[
            *_generation_routes(board, model_name, intake, offload),
            *token_routes(engine, model_name, intake=intake, offload=offload),
            *pages.routes(),
            *board.routes(),
        ],
        middleware=_layers(api, on_finished),
        exception_handlers={HTTPException: _refuse_route},
    )
    app.router.redirect_slashes = False  # a redirected POST loses its body in many clients
    return app


def _generation_routes(
    engine: LLMEngine, model_name: str, intake: Intake, offload: Offload
) -> list[Route]:
    endpoints = {
        "/v1/chat/completions": CHAT_COMPLETIONS,
        "/v1/completions": COMPLETIONS,
        "/v1/responses": RESPONSES,
    }
    return [
        Route(
            path,
            Generate(endpoint, engine, model_name=model_name, intake=intake, offload=offload),
            methods=["POST"],
        )
        for path, endpoint in endpoints.items()
    ]


def _layers(
    api: ApiConfig, on_finished: Callable[[RequestRecord], None] | None
) -> list[Middleware]:
    layers = [Middleware(RequestId)]
    if api.cors_allow_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=api.cors_allow_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=_EXPOSED,
            )
        )
    layers.append(Middleware(Boundary, on_finished=on_finished, probes=QUIET))
    if api.api_keys_file is not None:
        layers.append(Middleware(RequireKey, keys=ApiKeys(api.api_keys_file), open_paths=OPEN))
    return layers


@dataclass(frozen=True, slots=True)
class _Pages:
    """The answers that need no generation."""

    engine: LLMEngine
    card: Model
    about: Mapping[str, str | None]
    access: Callable[[], Mapping[str, Any]] | None
    metrics: Callable[[], Awaitable[str]] | None

    def routes(self) -> list[Route]:
        routes = [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{model:path}", self.retrieve_model),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/version", self.version),
        ]
        if self.access is not None:
            routes.append(Route("/access", self.verdict))
        if self.metrics is not None:
            routes.append(Route("/metrics", self.samples))
        return routes

    async def list_models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [self.card]})

    async def retrieve_model(self, request: Request) -> Response:
        if request.path_params["model"] != self.card["id"]:
            name = self.card["id"]
            raise ModelNotFound(f"this model is not served here; {name!r} is", param="model")
        return _json({**self.card})

    async def health(self, _request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        try:
            ready = await asyncio.wait_for(self.engine.ready(), READY_TIMEOUT_S)
        except TimeoutError:
            ready = False
        if not ready:
            raise NotReady("no replica can answer now; retry later")
        return _json({"status": "ready"})

    async def version(self, _request: Request) -> Response:
        return _json(self.about)

    async def verdict(self, _request: Request) -> Response:
        assert self.access is not None  # noqa: S101 - the route exists only then
        return _json(self.access())

    async def samples(self, _request: Request) -> Response:
        assert self.metrics is not None  # noqa: S101 - the route exists only then
        return PlainTextResponse(await self.metrics(), headers={"content-type": PROMETHEUS})


def _json(body: Mapping[str, object]) -> Response:
    return Response(dump(body), media_type="application/json")


async def _refuse_route(_request: Request, error: Exception) -> Response:
    """Turn Starlette's refusals into ours; the boundary writes them."""
    raise _translate(error) from None


def _translate(error: Exception) -> ServeAppError:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class alone
    if error.status_code == 405:
        methods = sorted((error.headers or {}).get("Allow", "").split(", "))
        allow = ", ".join(methods)
        return MethodNotAllowed(f"this path takes {allow}", allow=allow)
    if error.status_code == 404:
        return RouteNotFound("no such path; the API is under /v1, for example /v1/models")
    return InvalidRequest("the request is malformed")
