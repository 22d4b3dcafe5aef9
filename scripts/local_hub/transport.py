"""Sockets: the three origins on uvicorn, in one thread with one event loop.

Starlette and uvicorn carry every answer that is HTTP. What a well-behaved framework does not
offer, to hang, to stop halfway and to send what is no HTTP, is done on the connection itself.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import uvicorn
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from scripts.local_hub.repos import CHUNK_BYTES
from scripts.local_hub.wire import Answer, FilePart, HubRequest, Origin, Request, Silence

LOOPBACK = "127.0.0.1"
BACKLOG = 1024
IDLE_S = 3600  # for which a connection may stay open between two requests
BREAK_S = 1  # for which answers may notice that their connection was broken
Respond = Callable[[Request], tuple[Answer, HubRequest | None]]


class Servers:
    """The origins, each on a port of its own.

    Args:
        origins: the port (0 takes a free one), and what makes the answer together with the log
            entry to complete while sending it.
        tls: certificate and key files; all origins speak https where given.

    Raises:
        OSError: a port is in use, or a certificate cannot be read.
    """

    def __init__(
        self, origins: Mapping[Origin, tuple[int, Respond]], tls: tuple[Path, Path] | None
    ) -> None:
        self._secure = tls is not None
        self._bound: dict[Origin, socket.socket] = {}
        self._servers: list[_Server] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        try:
            for origin, (port, respond) in origins.items():
                self._bound[origin] = socket.create_server((LOOPBACK, port), backlog=BACKLOG)
                self._servers.append(_Server(_application(respond), tls))
        except OSError:
            for bound in self._bound.values():
                bound.close()
            raise
        self.ports = {origin: bound.getsockname()[1] for origin, bound in self._bound.items()}

    @property
    def urls(self) -> dict[Origin, str]:
        """Scheme, host and port of each origin."""
        return {origin: _url(port, secure=self._secure) for origin, port in self.ports.items()}

    def start(self) -> None:
        """Serve in a background thread."""
        self._thread.start()
        self._started.wait()

    async def _serve(self) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        pairs = zip(self._servers, self._bound.values(), strict=True)
        await asyncio.gather(*(server.serve_until(self._closing, bound) for server, bound in pairs))

    def stop(self) -> None:
        """Stop listening and break every open connection."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()


class _Server(uvicorn.Server):
    """uvicorn without its polling: it stops at once and lets no client delay that."""

    def __init__(self, application: ASGIApp, tls: tuple[Path, Path] | None) -> None:
        certificate, key = tls or (None, None)
        config = uvicorn.Config(
            application,
            http=_Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            loop="asyncio",
            log_config=None,
            access_log=False,  # the Hub keeps its own log
            server_header=False,
            headers=[("Server", "local-hub")],
            timeout_keep_alive=IDLE_S,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        config.load()
        super().__init__(config)

    async def serve_until(self, closing: asyncio.Event, bound: socket.socket) -> None:
        """Serve what arrives at a listening socket until the event is set."""
        self._closing = closing
        await self.serve(sockets=[bound])

    async def main_loop(self) -> None:
        await self.on_tick(0)  # makes the headers that every answer has
        await self._closing.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=BREAK_S)


class _Connection(H11Protocol):
    """Gives the application its connection, as `request.state.transport`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does it for sockets whose protocol is named, which these inherit as 0: without
        # it a body waits 40 ms for the acknowledgement of its headers.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.app_state = {"transport": transport}


def _application(respond: Respond) -> ASGIApp:
    async def answer_request(scope: Scope, receive: Receive, send: Send) -> None:
        http = HttpRequest(scope, receive)
        target = scope["raw_path"].decode("ascii")
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("ascii")
        request = Request(http.method, target, dict(http.headers), await http.body())
        # In a thread, because a file's first answer needs its hash.
        answer, entry = await run_in_threadpool(respond, request)
        if answer.silence is Silence.NOT_HTTP:
            http.state.transport.write(b"SSH-2.0-not_a_web_server\r\n")
            http.state.transport.close()
        if answer.silence in {Silence.HANG, Silence.NOT_HTTP}:
            await _disconnect(receive)
            return
        if entry is not None:
            entry.status = answer.status
        await _response(answer, entry, http)(scope, receive, send)

    return answer_request


def _response(answer: Answer, entry: HubRequest | None, http: HttpRequest) -> Response:
    headers = {**answer.headers, "Content-Length": str(len(answer.body))}
    if http.method == "HEAD":
        return Response(b"", answer.status, headers)
    if isinstance(answer.body, FilePart):
        cut = answer.silence is Silence.CUT
        content = _counted(answer.body, entry, http, cut=cut)
        return StreamingResponse(content, answer.status, headers)
    if entry is not None:
        entry.bytes_sent = len(answer.body)
    return Response(answer.body, answer.status, headers)


async def _counted(
    part: FilePart, entry: HubRequest | None, http: HttpRequest, *, cut: bool
) -> AsyncIterator[bytes]:
    """Read a part of a file, or half of it before the connection closes."""
    async for chunk in iterate_in_threadpool(_chunks(part, len(part) // 2 if cut else len(part))):
        # Counted first: a client that has read the end must find it in the log.
        if entry is not None:
            entry.bytes_sent += len(chunk)
        yield chunk
    if cut:
        http.state.transport.close()
        await _disconnect(http.receive)


def _chunks(part: FilePart, left: int) -> Iterator[bytes]:
    with part.file.open() as file:
        file.seek(part.start)
        while left and (chunk := file.read(min(left, CHUNK_BYTES))):
            yield chunk
            left -= len(chunk)


async def _disconnect(receive: Receive) -> None:
    """Wait until the connection is closed, by whichever side."""
    while (await receive())["type"] != "http.disconnect":
        pass


def refused_address(*, secure: bool) -> tuple[socket.socket, str]:
    """Hold a port that refuses connections, and return it with its URL.

    A bound socket that does not listen keeps the port from everybody else.
    """
    held = socket.socket()
    held.bind((LOOPBACK, 0))
    return held, _url(held.getsockname()[1], secure=secure)


def _url(port: int, *, secure: bool) -> str:
    return f"{'https' if secure else 'http'}://{LOOPBACK}:{port}"
