"""The HTTP application over a scripted engine: in process, raw ASGI, and on a socket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp, Message

from serve_app.api.app import RequestRecord, create_app
from serve_app.config import ApiConfig
from tests.fakes import FakeEngine

MODEL = "acme/tiny-llama"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}

API_KEY = "key-" + "k" * 20


def hashed(key: str) -> str:
    """Return a key as a file of keys has it."""
    return hashlib.sha256(key.encode()).hexdigest()


class Service:
    """An application, its engine and the records it left."""

    def __init__(self, engine: FakeEngine | None = None, **options: Any) -> None:
        api = {name: options.pop(name) for name in list(options) if name in ApiConfig.model_fields}
        self.engine = engine or FakeEngine()
        self.records: list[RequestRecord] = []
        self.app = create_app(
            self.engine,
            **{
                "model_name": MODEL,
                "api": ApiConfig(**api),
                "created": 1_700_000_000,
                "version": "1.2.3",
                "on_finished": self.records.append,
                **options,
            },
        )

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send one request in process."""
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Post a JSON body."""
        return await self.request("POST", path, json=body, **options)

    async def chat(self, **fields: Any) -> httpx.Response:
        """Ask the smallest chat question, with more fields."""
        return await self.post(CHAT, HELLO | fields)

    async def complete(self, **fields: Any) -> httpx.Response:
        """Ask the smallest completion, with more fields."""
        return await self.post(COMPLETIONS, {"prompt": "Once"} | fields)

    async def post_raw(self, path: str, body: bytes, **headers: str) -> httpx.Response:
        """Post any bytes as JSON."""
        return await self.request(
            "POST", path, content=body, headers={"content-type": "application/json", **headers}
        )


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the inner object of an error envelope, after a look at its shape."""
    body = response.json()
    assert response.status_code == status, body
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return body["error"]


def events(response: httpx.Response) -> list[Any]:
    """Parse a stream; `[DONE]` stays a string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    payloads = [block.removeprefix("data: ") for block in blocks]
    return [text if text == "[DONE]" else json.loads(text) for text in payloads]


class Connection:
    """One ASGI connection driven by hand: what the client sends, and when it goes away."""

    def __init__(self, path: str, body: bytes = b"", headers: Mapping[str, str] = {}) -> None:
        given = {"content-type": "application/json", **headers}
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.arrived = asyncio.Event()
        self.broken = False
        if body:
            self.feed(body)

    @classmethod
    def json(cls, path: str, body: Any, headers: Mapping[str, str] = {}) -> Connection:
        """Send a whole JSON body."""
        return cls(path, json.dumps(body).encode(), headers)

    def feed(self, body: bytes, *, more: bool = False) -> None:
        """Send (a part of) the body."""
        self.incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def disconnect(self) -> None:
        """Go away."""
        self.incoming.put_nowait({"type": "http.disconnect"})

    def run(self, app: ASGIApp) -> asyncio.Task[None]:
        """Start the application on this connection."""
        return asyncio.create_task(app(self.scope, self.incoming.get, self._send))

    @property
    def body(self) -> bytes:
        """Everything that was sent to the client."""
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def status(self) -> int:
        """The status that was sent; the first message."""
        return self.sent[0]["status"]

    async def _send(self, message: Message) -> None:
        if self.broken:
            raise OSError("nobody listens")
        self.sent.append(message)
        if message.get("body"):
            self.arrived.set()


@contextlib.asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[str]:
    """Serve an application on a free loopback port; yields its base URL."""
    # the protocol is named, because asyncio switches Nagle off only where it is
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            app, log_level="warning", lifespan="on", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        async with asyncio.timeout(10):
            while not server.started:
                await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            await running


async def until(condition: Any, seconds: float = 5) -> None:
    """Wait until something holds, or fail."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
