"""Sockets: one thread a connection, answers streamed, everything stoppable at once.

The standard library's server carries it, because a test must be able to hang, to send what is
no HTTP and to refuse connections, which a well-behaved framework does not offer.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from scripts.local_hub.repos import CHUNK_BYTES
from scripts.local_hub.wire import Answer, HubRequest, Origin, Request, Silence

LOOPBACK = "127.0.0.1"
MAX_BODY_BYTES = 1 << 20
HANDSHAKE_TIMEOUT_S = 10
Respond = Callable[[Request], tuple[Answer, HubRequest | None]]


class Server(ThreadingHTTPServer):
    """One origin.

    Args:
        port: 0 takes a free one.
        respond: makes the answer, and the log entry to complete while sending it.
        tls: serves https where given.

    Raises:
        OSError: the port is in use.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(
        self, origin: Origin, port: int, respond: Respond, tls: ssl.SSLContext | None
    ) -> None:
        self.origin = origin
        self.respond = respond
        self.closing = threading.Event()
        self._tls = tls
        self._open: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        super().__init__((LOOPBACK, port), _Connection)

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"{'https' if self._tls else 'http'}://{LOOPBACK}:{self.server_port}"

    def server_bind(self) -> None:
        """Bind without the reverse name look-up that the base class does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    def start(self) -> None:
        """Serve in a background thread."""
        self._accepting.start()

    def _accept(self) -> None:
        while not self.closing.is_set():
            self.handle_request()

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        """Drop the connection that only wakes us up to stop."""
        return not self.closing.is_set()

    def stop(self) -> None:
        """Stop listening and break every open connection."""
        self.closing.set()
        with contextlib.suppress(OSError):
            socket.create_connection((LOOPBACK, self.server_port), timeout=1).close()
        self._accepting.join()
        self.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Shake hands in the connection's own thread, so that a mute client holds up nobody."""
        self._open.add(request)
        connection = request
        try:
            if self._tls is not None:
                request.settimeout(HANDSHAKE_TIMEOUT_S)
                connection = self._tls.wrap_socket(request, server_side=True)
                connection.settimeout(None)
                self._open.add(connection)
            super().process_request_thread(connection, client_address)
        except OSError:  # the client does not trust us, or speaks no TLS
            self.shutdown_request(request)
        finally:
            self._open -= {request, connection}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about clients that went away; show what is a fault of ours."""
        if not isinstance(sys.exception(), (OSError, ValueError)):
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def version_string(self) -> str:
        """Name the server in the Server header."""
        return "local-hub"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write nothing: the Hub keeps its own log."""

    def _serve(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(min(size, MAX_BODY_BYTES))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        answer, entry = self.server.respond(request)
        if answer.silence in {Silence.HANG, Silence.NOT_HTTP}:
            self._fail(answer.silence)
            return
        if entry is not None:
            entry.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(answer, entry)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815

    def _fail(self, silence: Silence | None) -> None:
        if silence is Silence.HANG:
            self.server.closing.wait()
        else:
            self.wfile.write(b"SSH-2.0-not_a_web_server\r\n")
        self.close_connection = True

    def _send_body(self, answer: Answer, entry: HubRequest | None) -> None:
        body = answer.body
        if isinstance(body, bytes):
            self._send(body, entry)
            return
        left = len(body)
        if answer.silence is Silence.CUT:
            left, self.close_connection = left // 2, True
        with body.file.open() as file:
            file.seek(body.start)
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                self._send(chunk, entry)
                left -= len(chunk)

    def _send(self, chunk: bytes, entry: HubRequest | None) -> None:
        # Counted first: a client that has read the end must find it in the log.
        if entry is not None:
            entry.bytes_sent += len(chunk)
        self.wfile.write(chunk)


def refused_address(*, secure: bool) -> tuple[socket.socket, str]:
    """Hold a port that refuses connections, and return it with its URL.

    A bound socket that does not listen keeps the port from everybody else.
    """
    held = socket.socket()
    held.bind((LOOPBACK, 0))
    return held, f"{'https' if secure else 'http'}://{LOOPBACK}:{held.getsockname()[1]}"
