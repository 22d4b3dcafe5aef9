"""A steady load of streams, each of which is written down with the way it ended."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import aiohttp

OK = "ok"
END_S = 90.0  # until an answer that does not come counts as lost
STALL_S = 20.0  # without a token, of a stream that had some


@dataclass(frozen=True, slots=True)
class Answer:
    """One request.

    Args:
        began: when it was sent, on the monotonic clock.
        ended: when its last byte came.
        kind: `ok`; `refused` (no connection); `http <status>`; `error event` as the stream's
            end; `cut` (the stream ends without one); with no end within 90 s `slow`, if a token
            came in the last 20 of them, `stalled`, if none did, `waiting`, if none ever came.
        code: the error's code, empty where the answer has none.
    """

    began: float
    ended: float
    kind: str
    code: str = ""


def failures(answers: Iterable[Answer]) -> dict[str, int]:
    """Count those that did not end well, by kind and code."""
    return dict(Counter(f"{a.kind} {a.code}".strip() for a in answers if a.kind != OK))


class Load:
    """Streams that begin at fixed times, whatever becomes of those before.

    Args:
        url: of the service.
        model: its name.
        per_s: how many begin each second.
        tokens: length of each.
    """

    def __init__(self, url: str, model: str, *, per_s: float, tokens: int) -> None:
        self._url = f"{url}/v1/completions"
        self._body = {
            "model": model,
            "prompt": "The quick brown fox",
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        self._pause_s = 1 / per_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.answers: list[Answer] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Begin no more, and wait for those that run."""
        self._stopping.set()
        self._thread.join()

    async def _run(self) -> None:
        asking: list[asyncio.Task[None]] = []
        due = time.monotonic()
        # A connection each, as from many clients: none waits for another's.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            while not self._stopping.is_set():
                asking.append(asyncio.create_task(self._ask(http)))
                due += self._pause_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            await asyncio.gather(*asking)

    async def _ask(self, http: aiohttp.ClientSession) -> None:
        began = time.monotonic()
        seen: list[float] = []
        try:
            async with asyncio.timeout(END_S), http.post(self._url, json=self._body) as response:
                kind, code = await _end_of(response, seen)
        except TimeoutError:
            kind, code = _unended(seen), ""
        except aiohttp.ClientConnectorError:
            kind, code = "refused", ""
        except aiohttp.ClientError:
            kind, code = "cut", ""
        self.answers.append(Answer(began, time.monotonic(), kind, code))


def _unended(seen: list[float]) -> str:
    if not seen:
        return "waiting"
    return "slow" if time.monotonic() - seen[-1] < STALL_S else "stalled"


async def _end_of(response: aiohttp.ClientResponse, seen: list[float]) -> tuple[str, str]:
    if response.status != 200:
        return f"http {response.status}", _code(await response.read())
    last = b""
    async for line in response.content:
        last = line.strip() or last
        seen[:] = [time.monotonic()]
    if last == b"data: [DONE]":
        return OK, ""
    code = _code(last.removeprefix(b"data: "))
    return ("error event", code) if code else ("cut", "")


def _code(body: bytes) -> str:
    try:
        answer: Any = json.loads(body)
        return str(answer["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""
