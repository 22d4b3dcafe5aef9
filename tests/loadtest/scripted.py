"""An OpenAI-compatible server of known latencies, in a thread, and samples made by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn

from serve_app.loadtest.client import Sample
from serve_app.loadtest.stage import Stage
from serve_app.loadtest.workers import Ran, Strain

# A step of an answer: seconds to wait, text to send, a status to refuse with, or a word:
# "error" (an error event), "garbage" (no JSON), "cut" (end without the end mark).
Script = Sequence[float | str | int]
GOOD: Script = (0.05, "a", 0.01, "b", 0.01, "c", 0.01, "d")


class Scripted:
    """An ASGI application that plays a script for each request and counts them."""

    def __init__(
        self,
        script: Script | Callable[[int], Script] = GOOD,
        *,
        metrics: str = "",
        places: int | None = None,
        window: int | None = None,
        calibrations: int = 2,
    ) -> None:
        self.script = script
        self.metrics = metrics
        self.window = window
        self._calibrations = calibrations
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.running = self.most_running = 0
        self._places = asyncio.Semaphore(places or 1_000_000)

    async def __call__(self, scope, receive, send):
        """Answer; what the end of the server cancels is no fault to be reported."""
        with contextlib.suppress(asyncio.CancelledError):
            await self._answer(scope, receive, send)

    async def _answer(self, scope, receive, send):
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/v1/models":
            card = {"id": "acme/tiny", "max_model_len": self.window}
            await self._whole(send, 200, json.dumps({"data": [card]}))
        elif scope["path"] == "/metrics":
            await self._whole(send, 200 if self.metrics else 404, self.metrics)
        else:
            await self._generate(scope, json.loads(body), send)

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The requests after those of the calibration, which are answered at once."""
        return self.bodies[self._calibrations :]

    async def _generate(self, scope, body, send):
        index = len(self.bodies) - self._calibrations
        self.bodies.append(body)
        self.headers.append(dict(scope["headers"]))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async with self._places:
                script = self.script if not callable(self.script) else self.script(index)
                await self._play(GOOD if index < 0 else script, body, send)
        finally:
            self.running -= 1

    async def _play(self, script: Script, body, send):
        if isinstance(script[0], int):
            await self._whole(send, script[0], '{"error": {"code": "scripted"}}')
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        tokens = 0
        for step in script:
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif step == "error":
                await self._event(send, {"error": {"message": "scripted"}})
            elif step == "garbage":
                await send(_part(b"data: {nonsense\n\n"))
            elif step != "cut":
                tokens += 1
                await self._event(send, {"choices": [{"delta": {"content": step}}]})
        words = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        usage = {"prompt_tokens": 10 + len(words.split()), "completion_tokens": tokens}
        if "cut" not in script:
            await self._event(send, {"choices": [], "usage": usage})
            await send(_part(b"data: [DONE]\n\n"))
        await send({"type": "http.response.body", "body": b""})

    async def _event(self, send, event):
        await send(_part(b"data: " + json.dumps(event).encode() + b"\n\n"))

    async def _whole(self, send, status, text):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})


def _part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}


@contextlib.contextmanager
def serving(app) -> Iterator[str]:
    """Serve an application on a free loopback port from a thread; yields its URL."""
    # the protocol is named, because asyncio switches Nagle off only where it is
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)


def sample(at_s: float, ttft_s: float = 0.1, gaps: Sequence[float] = (0.01,) * 9, **more) -> Sample:
    """A request that was sent on time and answered one token at a time."""
    first = at_s + ttft_s
    return Sample(
        **{
            "at_s": at_s,
            "sent_s": at_s,
            "first_s": first,
            "end_s": first + sum(gaps),
            "gaps_s": tuple(gaps),
            "prompt_tokens": 100,
            "output_tokens": len(gaps) + 1,
            **more,
        }
    )


def ran(samples, *, duration_s=10.0, warmup_s=0.0, strain=(0.1, 0.001), **more) -> Ran:
    """A stage of an idle client that left these samples."""
    stage = Stage("stage", (), duration_s, warmup_s, rate=1.0)
    strains = [Strain(strain[0], (strain[1],) * 100)]
    return Ran(stage, 0.0, list(samples), strains, **more)
