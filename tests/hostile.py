"""A Hub that means ill: it answers what a test asks it to, on two origins, and writes all down.

Unlike the loopback Hub it keeps no rule: listings name what they like, answers never end, come a
byte at a time, or send elsewhere. Loopback only, every answer bounded in bytes and time.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

COMMIT = "0" * 39 + "1"
REPO = "evil/model"
ENDLESS_BYTES = 512 << 20  # what "endless" stops at, so that a failing test ends, too


def git_hash(content: bytes) -> str:
    """Return a content's Git object id."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def entry(path: object, content: bytes = b"{}", **changes: object) -> dict[str, object]:
    """Return an honest entry of a listing, but for the changes."""
    described: dict[str, object] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": git_hash(content),
    }
    if str(path).endswith(".safetensors"):
        oid = hashlib.sha256(content).hexdigest()
        described["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return described | changes


@dataclass
class Page:
    """One answer.

    Args:
        body: sent whole, or by `drip_s` a byte, or again and again without an end.
        status: of HTTP.
        headers: a content length is added unless they say otherwise.
        drip_s: seconds between two bytes of the body.
        headers_drip_s: seconds between two bytes of the headers.
        is_endless: repeats the body up to `ENDLESS_BYTES`.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drip_s: float = 0.0
    headers_drip_s: float = 0.0
    is_endless: bool = False


@dataclass(frozen=True)
class Seen:
    """One request."""

    port: int
    path: str
    authorization: str | None


class HostileHub:
    """Two servers; the first one is the endpoint.

    Args:
        files: content by path.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.listing: Any = [entry(path, content) for path, content in files.items()]
        self.pages: dict[str, Page] = {}  # by a part of the path, before anything else
        self.next_link = ""
        self.seen: list[Seen] = []
        self.sent_bytes = 0
        self._closing = threading.Event()
        self._servers = [self._make() for _ in range(2)]

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def elsewhere(self) -> str:
        """Another origin."""
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def tokens_elsewhere(self) -> list[str]:
        """Return the credentials that reached the other origin."""
        port = self._servers[1].server_port
        return [
            seen.authorization for seen in self.seen if seen.port == port and seen.authorization
        ]

    def answer(self, path: str) -> Page:
        """Return what is sent for a path."""
        for part, page in self.pages.items():
            if part in path:
                return page
        if "/tree/" in path:
            links = {"link": f'<{self.next_link}>; rel="next"'} if self.next_link else {}
            return Page(json.dumps(self.listing).encode(), headers=links)
        if "/revision/" in path:
            names = [{"rfilename": item.get("path")} for item in self.listing]
            return Page(json.dumps({"sha": COMMIT, "siblings": names}).encode())
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if name not in self.files:
            return Page(b"Entry not found", 404, {"x-error-code": "EntryNotFound"})
        content = self.files[name]
        return Page(content, headers={"etag": f'"{git_hash(content)}"', "x-repo-commit": COMMIT})

    def _make(self) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Write nothing."""

            def do_GET(self) -> None:
                port = self.server.server_address[1]
                hub.seen.append(Seen(port, self.path, self.headers.get("authorization")))
                try:
                    hub._send(self, hub.answer(self.path))
                except OSError:
                    self.close_connection = True

            do_HEAD = do_GET  # noqa: N815

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        return server

    def _send(self, handler: BaseHTTPRequestHandler, page: Page) -> None:
        headers = {"content-length": str(len(page.body)), **page.headers}
        if page.is_endless and "content-length" not in page.headers:
            headers.pop("content-length")
            handler.close_connection = True
        head = f"HTTP/1.1 {page.status} X\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        self._write(handler, [head.encode()], page.headers_drip_s)
        if handler.command != "HEAD":
            self._write(handler, self._chunks(page), page.drip_s)

    def _chunks(self, page: Page) -> Iterator[bytes]:
        yield page.body
        sent = len(page.body)
        while page.is_endless and sent < ENDLESS_BYTES:
            yield page.body
            sent += len(page.body)

    def _write(
        self, handler: BaseHTTPRequestHandler, chunks: Iterator[bytes] | list[bytes], drip_s: float
    ) -> None:
        for chunk in chunks:
            pieces = [bytes([byte]) for byte in chunk] if drip_s else [chunk]
            for piece in pieces:
                if self._closing.is_set():
                    raise OSError("closing")
                handler.wfile.write(piece)
                handler.wfile.flush()
                self.sent_bytes += len(piece)
                if drip_s:
                    time.sleep(drip_s)
