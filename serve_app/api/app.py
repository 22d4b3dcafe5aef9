"""The HTTP application: every route and every layer, in the order a request meets them.

    RequestId ─► PlainPath ─► CORS ─► Boundary ─► KnownHost ─► RequireKey ─► routes ─► Generate
                              if set  errors,     if set, or   if set,                 ─► LLMEngine
                                      records     without keys and its limits

`create_app` takes built objects and only wires them; it runs under Ray Serve and under any
ASGI server. Nothing here knows Ray, torch, the log's format or the metrics.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from serve_app.api.auth import RequireKey
from serve_app.api.generation import CHAT_COMPLETIONS, COMPLETIONS, RESPONSES, Generate
from serve_app.api.hosts import KnownHost
from serve_app.api.intake import Intake
from serve_app.api.key_limits import HEADERS, KeyLimits
from serve_app.api.keys import ApiKeys
from serve_app.api.middleware import Boundary, RequestId
from serve_app.api.models import Models
from serve_app.api.names import Names
from serve_app.api.offload import Offload
from serve_app.api.paths import PlainPath, lost
from serve_app.api.request_record import RequestRecord, trace_of
from serve_app.api.shared import Shared
from serve_app.api.sse import dump
from serve_app.api.status_page import Service, StatusPage
from serve_app.api.tokenize import token_routes
from serve_app.api.usage import UsagePage, shown_to
from serve_app.config import ApiConfig
from serve_app.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotReady,
    RouteNotFound,
    ServeAppError,
)
from serve_app.protocol import LLMEngine

__all__ = ["READY_TIMEOUT_S", "RequestRecord", "create_app"]

READY_TIMEOUT_S = 3.0  # over the ingress' own limit, so that its answer arrives
FRESH_S = 1.0  # age up to which a page is handed out again, however many ask
PROBES = frozenset({"/health", "/ping", "/ready", "/version"})
OPEN = PROBES | {"/"}  # the page holds no data; what it asks for needs the key
QUIET = OPEN | {"/metrics", "/status", "/usage"}
GENERATION = {
    "/v1/chat/completions": CHAT_COMPLETIONS,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
}
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_EXPOSED = ("x-request-id", "retry-after", *HEADERS)


def create_app(  # noqa: PLR0913 - the one place that wires everything, by keyword
    engine: LLMEngine,
    *,
    model_name: str,
    aliases: Sequence[str] = (),
    adapters: Sequence[str] = (),
    api: ApiConfig,
    created: int,
    version: str,
    commit: str | None = None,
    max_context_tokens: int | None = None,
    access: Callable[[], Mapping[str, Any]] | None = None,
    metrics: Callable[[], Awaitable[str]] | None = None,
    service: Service | None = None,
    on_finished: Callable[[RequestRecord], None] | None = None,
    key_limits: KeyLimits | None = None,
    direct: bool = True,
) -> Starlette:
    """Wire the OpenAI-compatible application.

    Args:
        engine: answers the prompts.
        model_name: the one model's name; the owner is the part before its slash.
        aliases: further names that it answers to.
        adapters: names of the LoRA adapters that it answers with, too.
        api: limits, keys and origins.
        created: when the model was made available, in Unix seconds.
        version: this package's version, for `/version`.
        commit: the commit of the weights, for `/version`.
        max_context_tokens: the model's window, for `/v1/models`; None asks `service`.
        access: returns the last verdict of every node; None leaves `/access` out.
        metrics: returns Prometheus' text for `/metrics`; None leaves it out.
        service: the service, all of its processes, for `/status`; None if nobody knows it.
        on_finished: called once at the end of every request that is not a healthy probe.
        key_limits: counts what each API key uses; None counts for this application alone.
        direct: clients connect to this server itself; False where a proxy on this machine is
            always between, so that the connection says nothing of where a request comes from.

    Raises:
        ConfigError: the file of API keys cannot be used.
    """
    names = Names(tuple(dict.fromkeys((model_name, *aliases))), tuple(adapters))
    about = {"version": version, "model": model_name, "commit": commit}
    models = Models(names, created=created, window=max_context_tokens, service=service)
    pages = _Pages(engine, about, access, metrics)
    intake = Intake(max_bytes=api.max_request_bytes, timeout_s=api.body_timeout_s)
    offload = Offload()
    keys = None if api.api_keys_file is None else ApiKeys(api.api_keys_file)
    required = (
        []
        if keys is None
        else [Middleware(RequireKey, keys=keys, limits=key_limits or KeyLimits(), open_paths=OPEN)]
    )
    app = Starlette(
        routes=[
            *_generation_routes(engine, names, api, intake, offload),
            *token_routes(engine, names, intake=intake, offload=offload),
            *models.routes(),
            *pages.routes(),
            *StatusPage(about, service).routes(),
            *([] if keys is None else UsagePage(keys, service).routes()),
        ],
        middleware=[*_layers(api, on_finished, direct=direct), *required],
        exception_handlers={HTTPException: _refuse_route},
    )
    app.router.redirect_slashes = False  # `PlainPath` has been there
    return app


def _generation_routes(
    engine: LLMEngine, names: Names, api: ApiConfig, intake: Intake, offload: Offload
) -> list[Route]:
    return [
        Route(
            path,
            Generate(
                endpoint,
                engine,
                names=names,
                limits=api,
                intake=intake,
                offload=offload,
            ),
            methods=["POST"],
        )
        for path, endpoint in GENERATION.items()
    ]


def _layers(
    api: ApiConfig, on_finished: Callable[[RequestRecord], None] | None, *, direct: bool
) -> list[Middleware]:
    layers = [Middleware(RequestId), Middleware(PlainPath)]
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
    layers.append(
        Middleware(
            Boundary, on_finished=on_finished, probes=QUIET, send_timeout_s=api.send_timeout_s
        )
    )
    hosts = api.allowed_hosts
    unprotected = direct and api.api_keys_file is None
    if (hosts is None and unprotected) or (hosts is not None and "*" not in hosts):
        layers.append(Middleware(KnownHost, allowed=hosts))
    return layers


class _Pages:
    """The answers that need no generation; who asks at the same time shares one."""

    def __init__(
        self,
        engine: LLMEngine,
        about: Mapping[str, str | None],
        access: Callable[[], Mapping[str, Any]] | None,
        metrics: Callable[[], Awaitable[str]] | None,
    ) -> None:
        self._about = about
        self._engine = engine
        self._ready = Shared(self._ask_engine)
        self._access = None if access is None else Shared(partial(_dumped, access), fresh_s=FRESH_S)
        self._metrics = None if metrics is None else Shared(metrics, fresh_s=FRESH_S)

    def routes(self) -> list[Route]:
        routes = [
            Route("/health", self.health),
            Route("/ping", self.health),
            Route("/ready", self.ready),
            Route("/version", self.version),
        ]
        if self._access is not None:
            routes.append(Route("/access", partial(self.verdict, self._access)))
        if self._metrics is not None:
            routes.append(Route("/metrics", partial(self.samples, self._metrics)))
        return routes

    async def health(self, _request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        try:
            ready = await asyncio.wait_for(self._ready.get(), READY_TIMEOUT_S)
        except TimeoutError:
            ready = False
        if not ready:
            raise NotReady("no replica can answer now; retry later")
        return _json({"status": "ready"})

    async def _ask_engine(self) -> bool:
        return await self._engine.ready()

    async def version(self, _request: Request) -> Response:
        return _json(self._about)

    async def verdict(self, access: Shared[bytes], _request: Request) -> Response:
        return Response(await access.get(), media_type="application/json")

    async def samples(self, metrics: Shared[str], request: Request) -> Response:
        page = shown_to(trace_of(request.scope).key, await metrics.get())
        return PlainTextResponse(page, headers={"content-type": PROMETHEUS})


async def _dumped(page: Callable[[], Mapping[str, Any]]) -> bytes:
    return dump(page())


def _json(body: Mapping[str, object]) -> Response:
    return Response(dump(body), media_type="application/json")


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Turn Starlette's refusals into ours; the boundary writes them."""
    raise _translate(error, request.scope) from None


def _translate(error: Exception, scope: Scope) -> ServeAppError:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class alone
    if error.status_code == 405:
        methods = sorted((error.headers or {}).get("Allow", "").split(", "))
        allow = ", ".join(methods)
        return MethodNotAllowed(f"this path takes {allow}", allow=allow)
    if error.status_code == 404:
        root = scope.get("root_path", "")
        return RouteNotFound(lost(str(scope["path"]).removeprefix(root), root))
    return InvalidRequest("the request is malformed")
