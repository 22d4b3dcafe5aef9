"""One streamed request, and when its parts came.

Owns HTTP. Times are seconds after the stage's start on the machine's monotonic clock, which
all processes share.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from serve_app.errors import ConfigError
from serve_app.loadtest.stage import Prompts, Shot, some_words

CALIBRATION_WORDS = (8, 72)


@dataclass(frozen=True, slots=True)
class Target:
    """The service under test.

    Args:
        url: its root, without a trailing slash.
        model: name in requests.
        chat: ask `/v1/chat/completions`, else `/v1/completions`.
        timeout_s: limit of one request.
        api_key_file: where a key is; its value is read by whoever sends, and never kept.
        prompts: writes the texts.
    """

    url: str
    model: str = ""
    chat: bool = True
    timeout_s: float = 120.0
    api_key_file: Path | None = None
    prompts: Prompts = field(default_factory=Prompts)


@dataclass(frozen=True, slots=True)
class Sample:
    """What became of one request.

    Args:
        at_s: when it was to be sent.
        sent_s: when it was.
        first_s: when its first text came; None if none did.
        end_s: when it ended.
        gaps_s: between arrivals of text. Tokens that arrive in one piece are one arrival:
            counting zeros for them would flatter the server.
        prompt_tokens: by the server's count.
        output_tokens: by the server's count.
        error: its kind; None for a whole answer.
    """

    at_s: float
    sent_s: float
    first_s: float | None
    end_s: float
    gaps_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """From the intended time to the first text."""
        return None if self.first_s is None else self.first_s - self.at_s

    @property
    def e2e_s(self) -> float:
        """From the intended time to the end."""
        return self.end_s - self.at_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first, up to the last text.

        What follows the last text (usage, the end of the stream) is none of the tokens' time.
        None where all of them came at once, so that there is nothing to measure.
        """
        if not self.gaps_s or self.output_tokens < 2:
            return None
        return sum(self.gaps_s) / (self.output_tokens - 1)


def session(target: Target) -> aiohttp.ClientSession:
    """Open connections without a limit, so that no request waits inside the client.

    Raises:
        ConfigError: the file of the API key cannot be read.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        headers=authorization(target.api_key_file),
    )


def authorization(key_file: Path | None) -> dict[str, str]:
    """Return the header that carries the API key; none without a file.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    if key_file is None:
        return {}
    try:
        key = key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file cannot be read: {type(error).__name__}") from None
    if not (key and key.isascii() and key.isprintable()):
        raise ConfigError("--api-key-file must hold one line of printable characters")
    return {"authorization": f"Bearer {key}"}


async def ask(
    http: aiohttp.ClientSession, target: Target, shot: Shot, text: str, *, start: float
) -> Sample:
    """Send one request now and time its answer.

    Args:
        http: an open session.
        target: whom to ask.
        shot: what was to be sent, and when.
        text: the prompt.
        start: the stage's start on the monotonic clock.
    """
    watch = _Watch(start, sent_s=time.monotonic() - start)
    error = "unfinished"  # what a cancelled request was
    try:
        async with asyncio.timeout(target.timeout_s):
            error = await _stream(http, target, _body(target, shot, text), watch)
    except TimeoutError:
        error = "timeout"
    except aiohttp.ClientConnectorError:
        error = "connect"
    except (aiohttp.ClientError, ConnectionError):
        error = "disconnected"
    except (ValueError, TypeError, AttributeError, KeyError):
        error = "malformed"
    except asyncio.CancelledError:
        pass  # the stage is over; the sample is still wanted
    return watch.sample(shot, error)


async def _stream(
    http: aiohttp.ClientSession, target: Target, body: dict[str, Any], watch: _Watch
) -> str:
    """Read an answer to its end; returns the kind of error, "" for none."""
    path = "/v1/chat/completions" if target.chat else "/v1/completions"
    async with http.post(target.url + path, json=body) as response:
        if response.status != 200:
            return f"http_{response.status}"
        async for events in _events(response):
            if any("error" in event for event in events):
                return "stream_error"
            watch.arrived(events)
    return "" if watch.done else "disconnected"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[list[dict[str, Any]]]:
    """Yield the events that arrived together; the end mark is an event named `done`."""
    buffer = b""
    async for chunk in response.content.iter_any():
        *blocks, buffer = (buffer + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        data = [block[len(b"data:") :].strip() for block in blocks if block.startswith(b"data:")]
        if data:
            yield [{"done": True} if each == b"[DONE]" else json.loads(each) for each in data]


@dataclass(slots=True)
class _Watch:
    """The times and counts of an answer that is coming."""

    start: float
    sent_s: float
    first_s: float | None = None
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    texts: int = 0
    done: bool = False

    def arrived(self, events: list[dict[str, Any]]) -> None:
        now = time.monotonic() - self.start
        texts = sum(map(_has_text, events))
        if texts and self.first_s is None:
            self.first_s = now
        elif texts:
            self.gaps_s.append(now - self.last_s)
        if texts:
            self.last_s = now
        self.texts += texts
        for event in events:
            self.usage = event.get("usage") or self.usage
            self.done = self.done or "done" in event

    def sample(self, shot: Shot, error: str) -> Sample:
        return Sample(
            at_s=shot.at_s,
            sent_s=self.sent_s,
            first_s=self.first_s,
            end_s=time.monotonic() - self.start,
            gaps_s=tuple(self.gaps_s),
            prompt_tokens=self.usage.get("prompt_tokens", 0),
            # a server without usage: each event of text is one token
            output_tokens=self.usage.get("completion_tokens", self.texts),
            error=error or None,
        )


def _has_text(event: dict[str, Any]) -> bool:
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        if choice.get("text") or any(delta.get(k) for k in ("content", "reasoning_content")):
            return True
    return False


def _body(target: Target, shot: Shot, text: str) -> dict[str, Any]:
    question = (
        {"messages": [{"role": "user", "content": text}]} if target.chat else {"prompt": text}
    )
    return {
        "model": target.model,
        **question,
        "max_tokens": shot.output_tokens,
        "ignore_eos": True,  # else the model and not the plan decides the length
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def find_model(http: aiohttp.ClientSession, url: str) -> tuple[str, int | None]:
    """Return the name of the service's first model and its window in tokens, if it says.

    Raises:
        ConfigError: no list of models comes back.
    """
    try:
        async with asyncio.timeout(30), http.get(url + "/v1/models") as response:
            if response.status != 200:
                raise ConfigError(f"{url}/v1/models answered {response.status}")
            card = (await response.json(content_type=None))["data"][0]
            return str(card["id"]), card.get("max_model_len")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ConfigError(f"{url} cannot be reached: {type(error).__name__}") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{url}/v1/models is not a list of models") from None


async def calibrate(http: aiohttp.ClientSession, target: Target) -> Prompts:
    """Measure how many tokens the template and a word cost.

    Raises:
        ConfigError: the service does not answer these two requests.
    """
    pairs: list[tuple[int, int]] = []
    for words in CALIBRATION_WORDS:
        text = " ".join(some_words(words, f"calibration/{words}"))
        shot = Shot(0.0, words, 1)
        sample = await ask(http, target, shot, text, start=time.monotonic())
        if sample.error:
            raise ConfigError(f"{target.url}: the first request failed ({sample.error})")
        pairs.append((words, sample.prompt_tokens))
    return Prompts.fitted(*pairs)
