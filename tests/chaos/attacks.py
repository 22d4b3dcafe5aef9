"""One client that does what it should not, beside others that must not notice.

Each attack runs beside a steady probe: a short chat every second, whose first token is timed, a
stream that never pauses, and `/health`. The same probe alone comes first.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from scripts.local_hub.model import build_demo_model, default_cache_dir
from tests.chaos.nodes import Setup
from tests.chaos.stage import Stage, stage_for

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
ALONE_S = 20.0
AFTER_S = 3.0
PROBE_TIMEOUT_S = 120.0
ATTACKER_ADDRESS = "127.0.0.2"  # so that it is a client of its own, as on a network


@dataclass(frozen=True, slots=True)
class Answer:
    """What the attacker got: a status, or what happened instead, and after how long."""

    status: str
    seconds: float


@dataclass(slots=True)
class Probe:
    """What others saw meanwhile."""

    url: str
    ttft_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    async def run(self, session: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        """Ask until `stop` is set, and read every answer to its end."""
        asking: list[asyncio.Task[None]] = []
        steady = [asyncio.create_task(work(session, stop)) for work in (self._health, self._stream)]
        while not stop.is_set():
            asking.append(asyncio.create_task(self._chat(session)))
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1.0)
        await asyncio.gather(*asking, *steady)

    async def _chat(self, session: aiohttp.ClientSession) -> None:
        text = f"Say hi {random.random()}"
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 4,
            "temperature": 0,
            "stream": True,
        }
        began, first = time.monotonic(), None
        try:
            async with session.post(self.url + CHAT, json=body) as response:
                async for line in response.content:
                    if first is None and b'"content":"' in line.replace(b'"content":""', b""):
                        first = time.monotonic() - began
                    if b'"error"' in line:
                        self.faults["error event"] += 1
                if response.status != 200:
                    self.faults[f"http {response.status}"] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self.faults[type(error).__name__] += 1
        self.ttft_s.append(time.monotonic() - began if first is None else first)

    async def _health(self, session: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        while not stop.is_set():
            began = time.monotonic()
            try:
                async with session.get(f"{self.url}/health") as response:
                    await response.read()
                    if response.status != 200:
                        self.faults[f"/health {response.status}"] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                self.faults[f"/health {type(error).__name__}"] += 1
            self.health_s.append(time.monotonic() - began)
            await asyncio.sleep(0.1)

    async def _stream(self, session: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        body = {"prompt": "Count: 1 2 3", "max_tokens": 300, "ignore_eos": True, "stream": True}
        while not stop.is_set():
            try:
                async with session.post(self.url + TEXT, json=body) as response:
                    last = time.monotonic()
                    async for line in response.content:
                        if line.startswith(b"data"):
                            self.gaps_s.append(time.monotonic() - last)
                            last = time.monotonic()
                        if b'"error"' in line:
                            self.faults["stream's error event"] += 1
                        if stop.is_set():
                            return
            except (aiohttp.ClientError, TimeoutError) as error:
                self.faults[f"stream's {type(error).__name__}"] += 1
                await asyncio.sleep(0.5)

    def facts(self) -> dict[str, Any]:
        """Return the numbers of the table, in seconds."""
        return {
            "chats": len(self.ttft_s),
            "ttft_p50_s": _quantile(self.ttft_s, 0.5),
            "ttft_p99_s": _quantile(self.ttft_s, 0.99),
            "health_p99_s": _quantile(self.health_s, 0.99),
            "gap_p99_s": _quantile(self.gaps_s, 0.99),
            "gap_max_s": round(max(self.gaps_s, default=0.0), 3),
            "faults": dict(self.faults),
        }


class Attacker:
    """What an attack may use."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._session = session

    async def post(self, path: str, body: Any, timeout_s: float = 60.0) -> Answer:
        """Send a body, an object or bytes, and read the answer to its end."""
        began = time.monotonic()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            async with self._session.post(
                self.url + path,
                data=data,
                headers={"content-type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                await response.read()
                status = str(response.status)
        except TimeoutError:
            status = "timeout"
        except aiohttp.ClientError as error:
            status = type(error).__name__
        return Answer(status, time.monotonic() - began)

    async def many(self, count: int, path: str, body: Callable[[int], Any]) -> list[Answer]:
        """Send many bodies at once."""
        return list(await asyncio.gather(*(self.post(path, body(n)) for n in range(count))))

    async def get(self, path: str) -> Answer:
        """Get a path."""
        began = time.monotonic()
        try:
            async with self._session.get(self.url + path) as response:
                await response.read()
                status = str(response.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            status = type(error).__name__
        return Answer(status, time.monotonic() - began)

    def connect(self) -> socket.socket:
        """Open a bare connection."""
        parts = urlsplit(self.url)
        return socket.create_connection(
            (parts.hostname or "", parts.port or 80),
            timeout=5,
            source_address=(ATTACKER_ADDRESS, 0),
        )


Attack = Callable[[Attacker], Awaitable[list[Answer]]]


def _structured(**fields: Any) -> dict[str, Any]:
    return {"messages": HI, "max_tokens": 40} | fields


async def divisor(attacker: Attacker) -> list[Answer]:
    """A JSON schema of 43 bytes: an integer that a large prime divides."""
    schema = {"type": "integer", "multipleOf": 99_999_989}
    return await attacker.many(4, CHAT, lambda _: _structured(guided_json=schema))


async def slow_schemas(attacker: Attacker) -> list[Answer]:
    """Sixty different schemas that each take all the time that compiling may take."""
    parts = [{"multipleOf": 9973}, {"multipleOf": 9967}]
    return await attacker.many(
        60,
        CHAT,
        lambda n: _structured(guided_json={"type": "integer", "allOf": parts, "title": str(n)}),
    )


async def chained_rules(attacker: Attacker) -> list[Answer]:
    """A grammar of 113 KB whose rules are a chain, which overflows its compiler's stack."""
    rules = "\n".join(f'r{n}: "w" r{n + 1} | "e"' for n in range(5000))
    grammar = f'start: r0\n{rules}\nr5000: "z"'
    return await attacker.many(8, CHAT, lambda _: _structured(guided_grammar=grammar))


async def complete_too_early(attacker: Attacker) -> list[Answer]:
    """Expressions that are complete before `min_tokens`."""
    return await attacker.many(
        12, CHAT, lambda _: _structured(guided_regex="[ab]{12}", min_tokens=40, temperature=0)
    )


async def endless_grammars(attacker: Attacker) -> list[Answer]:
    """Grammars that fail, or slow down, while they are walked."""
    grammars = [
        'start: "a" start',
        'start: ((("a"?){1,300}){1,300}){1,300}',
        'start: a\na: a b | b a | "x"\nb: a b a | "y" | ',
    ]
    return await attacker.many(24, CHAT, lambda n: _structured(guided_grammar=grammars[n % 3]))


async def long_texts(attacker: Attacker) -> list[Answer]:
    """48 texts of 2 MB to tokenize at once."""
    text = "The quick brown fox jumps over the lazy dog. " * 44_000
    return await attacker.many(48, "/tokenize", lambda _: {"prompt": text})


async def long_prompts(attacker: Attacker) -> list[Answer]:
    """Prompts of 2 MB, and conversations of 70,000 messages."""
    text = "The quick brown fox jumps over the lazy dog. " * 44_000
    messages = HI * 45_000
    bodies = ({"messages": messages}, {"messages": [{**HI[0], "content": text}]})
    return await attacker.many(12, CHAT, lambda n: bodies[n % 2])


async def many_ids(attacker: Attacker) -> list[Answer]:
    """A million ids to detokenize, eight times."""
    ids = [200] * 400_000
    return await attacker.many(8, "/detokenize", lambda _: {"tokens": ids})


async def wrong_lists(attacker: Attacker) -> list[Answer]:
    """2 MB of messages, and of prompts, that are all wrong."""
    messages = b'{"messages":[' + b",".join([b"1"] * 1_000_000) + b"]}"
    prompts = b'{"prompt":[' + b",".join([b"[]"] * 600_000) + b"]}"
    return list(
        await asyncio.gather(
            *(attacker.post(CHAT, messages) for _ in range(8)),
            *(attacker.post(TEXT, prompts) for _ in range(8)),
        )
    )


async def open_bodies(attacker: Attacker) -> list[Answer]:
    """1,300 connections that announce a body and send one byte of it, for 25 s."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    head += b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
    began, ends = time.monotonic(), Counter[str]()
    sockets = []
    for number in range(1300):
        with suppress(OSError):
            one = attacker.connect()
            one.sendall(head)
            one.settimeout(0)
            sockets.append(one)
        if number % 50 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(25)
    for one in sockets:
        try:
            ends[one.recv(64).decode(errors="replace").split(" ")[1] if one else ""] += 1
        except (OSError, IndexError):
            ends["open"] += 1
        one.close()
    seconds = time.monotonic() - began
    return [Answer(status, seconds) for status, count in ends.items() for _ in range(count)]


async def scored_prompt(attacker: Attacker) -> list[Answer]:
    """A prompt over the whole window, every token of it scored."""
    body = {"prompt": "word " * 7_900, "max_tokens": 1, "echo": True, "logprobs": 5}
    return [await attacker.post(TEXT, body, timeout_s=300)]


async def many_completions(attacker: Attacker) -> list[Answer]:
    """One request with 128 completions of 200 tokens."""
    body = {"messages": HI, "n": 128, "max_tokens": 200, "ignore_eos": True}
    return [await attacker.post(CHAT, body, timeout_s=300)]


async def burst(attacker: Attacker) -> list[Answer]:
    """150 requests at once."""
    return await attacker.many(
        150, CHAT, lambda n: {"messages": [{**HI[0], "content": f"Tell {n}"}], "max_tokens": 64}
    )


async def nonsense_numbers(attacker: Attacker) -> list[Answer]:
    """Penalties near zero."""
    return await attacker.many(
        4, CHAT, lambda n: {"messages": HI, "repetition_penalty": (1e-45, 1e-300)[n % 2]}
    )


async def many_looks(attacker: Attacker) -> list[Answer]:
    """500 GETs of what is computed for each, at once."""
    paths = ("/metrics", "/status", "/ready", "/access", "/v1/models")
    return list(await asyncio.gather(*(attacker.get(paths[n % 5]) for n in range(500))))


async def unread_streams(attacker: Attacker) -> list[Answer]:
    """24 streams of four completions that nobody reads, for 30 s."""
    fields = _structured(n=4, ignore_eos=True, stream=True, max_tokens=1500)
    body = json.dumps(fields).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    sockets = []
    for _ in range(24):
        one = attacker.connect()
        one.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        sockets.append(one)
    await asyncio.sleep(30)
    for one in sockets:
        one.close()
    return [Answer("left", 30.0)] * 24


ATTACKS: dict[str, Attack] = {
    attack.__name__.replace("_", " "): attack
    for attack in (
        divisor, slow_schemas, chained_rules, complete_too_early, endless_grammars, long_texts,
        long_prompts, many_ids, wrong_lists, open_bodies, scored_prompt, many_completions, burst,
        nonsense_numbers, many_looks, unread_streams,
    )
}  # fmt: skip


def attacks() -> dict[str, Any]:
    """Let every attack happen to one service, one after the other."""
    setup = Setup(nodes=("a",), replicas=1, native=True)
    with stage_for(setup, build_demo_model(default_cache_dir())) as stage:
        stage.deploy(engine={"max_context_tokens": 8192, "kv_cache_cpu_gib": 1.0})
        rounds = [asyncio.run(_beside(stage, name, attack)) for name, attack in ATTACKS.items()]
    return {"attacks": rounds}


async def _beside(stage: Stage, name: str, attack: Attack) -> dict[str, Any]:
    url = stage.service.url
    before = {replica.pid for replica in stage.replicas()}
    alone, _, _ = await _probe(url, asyncio.sleep(ALONE_S))
    with _memory(before) as peak:
        start = _rss_mib(before)
        connector = aiohttp.TCPConnector(limit=0, local_addr=(ATTACKER_ADDRESS, 0))
        async with aiohttp.ClientSession(connector=connector) as session:
            beside, answers, seconds = await _probe(url, attack(Attacker(url, session)))
    await asyncio.sleep(AFTER_S)
    row = {
        "attack": name,
        "what": " ".join((attack.__doc__ or "").split()),
        "seconds": round(seconds, 1),
        "answers": dict(Counter(answer.status for answer in answers)),
        "slowest_answer_s": round(max(answer.seconds for answer in answers), 1),
        "alone": alone.facts(),
        "beside": beside.facts(),
        "ttft_p99_ratio": round(
            (_quantile(beside.ttft_s, 0.99) or 0) / (_quantile(alone.ttft_s, 0.99) or 1), 2
        ),
        "memory_mib": [start, peak[0], _rss_mib(before)],
        "same_processes": {replica.pid for replica in stage.replicas()} == before,
    }
    print(json.dumps(row), flush=True)
    return row


async def _probe(url: str, work: Awaitable[Any]) -> tuple[Probe, Any, float]:
    """Probe while something is done; returns what that came to and the seconds that it took."""
    probe, stop = Probe(url), asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        running = asyncio.create_task(probe.run(session, stop))
        await asyncio.sleep(2)
        began = time.monotonic()
        result = await work
        seconds = time.monotonic() - began
        await asyncio.sleep(2)
        stop.set()
        await running
    return probe, result, seconds


@contextmanager
def _memory(pids: set[int]) -> Iterator[list[int]]:
    """Watch the memory of processes; yields a list that holds the most of it, in MiB."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            peak[0] = max(peak[0], _rss_mib(pids))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _rss_mib(pids: set[int]) -> int:
    pages = 0
    for pid in pids:
        with suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def _quantile(values: list[float], share: float) -> float | None:
    if not values:
        return None
    if len(values) < 3:
        return round(max(values), 3)
    return round(statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1], 3)
