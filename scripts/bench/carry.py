"""Time what carries tokens: proxy, ingress and replica around an engine that computes nothing.

Each stream gets a token every `--interval-ms`, all of them at the same time, as from the steps of
a batch. A token's text is when it was made, so the client, on the same machine, knows its age.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import aiohttp
import ray
from ray import serve

from scripts.bench.report import cpu_features
from scripts.local_hub.model import build_demo_model, default_cache_dir
from serve_app import app
from serve_app.access.preflight import preflight
from serve_app.config import AppConfig, parse_args
from serve_app.deployments.server import LLMServer
from serve_app.engine.admission import Limits
from serve_app.errors import Overloaded
from serve_app.protocol import FinishReason, GenerationRequest, TokenDelta, Usage
from serve_app.telemetry import logs

RUNNING = 16  # and as many wait, where refusals are measured


class PacedEngine:
    """Gives each request a token at every tick of one clock; refuses what is over its limit."""

    max_context_tokens = 1_000_000

    def __init__(self, interval_s: float, limit: int) -> None:
        self._interval_s = interval_s
        self._limit = limit
        self._open = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Yield `max_tokens` deltas, one a tick; the text is the monotonic time in seconds.

        Raises:
            Overloaded: as many as the limit are open.
        """
        if self._open >= self._limit:
            raise Overloaded("The limit is reached.", retry_after_s=1)
        self._open += 1
        try:
            async for delta in self._paced(request):
                yield delta
        finally:
            self._open -= 1

    async def _paced(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        wanted = request.sampling.max_tokens or 1
        tick = int(time.monotonic() / self._interval_s)
        for made in range(1, wanted + 1):
            # Of the tick's own number: a sleep may end a little early, and would be repeated.
            due = (tick + made) * self._interval_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            yield TokenDelta(
                text=f"{time.monotonic():.6f} ",
                token_ids=(made,),
                usage=Usage(1, made),
                finish_reason=FinishReason.LENGTH if made == wanted else None,
            )

    def check(self) -> None:
        """Do nothing: it always runs."""

    async def ready(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Do nothing."""


class PacedServer(LLMServer):
    """The server deployment around a `PacedEngine`."""

    async def __init__(self, config: AppConfig, _commit: str | None) -> None:  # type: ignore[misc]
        logs.configure_serve(config.logging)
        self._engine = PacedEngine(  # type: ignore[assignment]
            float(os.environ["BENCH_INTERVAL_S"]), Limits.of(config.engine, config.api).open
        )
        self._carry_tokens(config)

    async def _record_first_answer(self, asked_at: float, ttft_s: float) -> None:
        """Keep nothing: there was no start to complete."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of one turn.

    Args:
        items_s: tokens a second, of all streams, while all of them ran.
        asked_s: how many the engine made in a second.
        events_s: server-sent events a second: tokens that were ready together share one.
        age_ms: of each token when the client had read it.
        ttft_ms: from the request to its first event, of each stream.
    """

    items_s: float
    asked_s: float
    events_s: float
    age_ms: list[float]
    ttft_ms: list[float]


def main() -> int:
    """Serve, take turns, print a table."""
    args = _arguments()
    os.environ["BENCH_INTERVAL_S"] = str(args.interval_ms / 1000)
    model = build_demo_model(default_cache_dir())
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": args.port})
        config = parse_args(
            {
                "model": {"path": str(model), "served_name": "m"},
                "replica": {"num_gpus": 0, "num_cpus": 1},
                "engine": {"max_running_requests": RUNNING if args.refuse else max(args.streams)},
                "api": {"max_queued_requests": RUNNING} if args.refuse else {},
            }
        )
        with patch.object(app, "LLMServer", PacedServer):
            serve.run(app.bind(config, preflight(config)), name="carry")
        report = asyncio.run(_refusals(args)) if args.refuse else None
        report = report or markdown(asyncio.run(_measure(args)), args)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    print(report)
    if args.out:
        args.out.write_text(report, encoding="utf-8")
    return 0


async def _measure(args: argparse.Namespace) -> dict[int, list[Turn]]:
    await _turn(args, streams=8)
    found: dict[int, list[Turn]] = {}
    for number in range(args.rounds):
        for streams in args.streams:
            turn = await _turn(args, streams=streams)
            found.setdefault(streams, []).append(turn)
            print(f"round {number + 1}, {streams} streams: {turn.items_s:.0f} items/s", flush=True)
    return found


async def _refusals(args: argparse.Namespace) -> str:
    """Send more at once than there is room for; returns one line about those refused."""
    tokens = round(1000 * args.seconds / args.interval_ms)
    body = {"model": "m", "prompt": "a", "max_tokens": tokens, "stream": True}
    url = f"http://127.0.0.1:{args.port}/v1/completions"
    waits: list[float] = []
    answered = 0

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal answered
        asked = time.monotonic()
        async with session.post(url, json=body) as answer:
            if answer.status == 429 and "Retry-After" in answer.headers:
                await answer.read()
                waits.append(1000 * (time.monotonic() - asked))
                return
            answer.raise_for_status()
            text = await answer.text()
            answered += "data: [DONE]" in text

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session) for _ in range(8)))
        answered = 0
        for _ in range(args.rounds):
            await asyncio.gather(*(one(session) for _ in range(args.refuse)))
    cuts = statistics.quantiles(waits, n=100)
    return (
        f"{args.refuse} streams at once against limits of {2 * RUNNING}, {args.rounds} rounds, "
        f"{args.label}: {answered} answered whole, {len(waits)} got 429 with Retry-After, after "
        f"{cuts[49]:.0f} ms at the median, {cuts[98]:.0f} at p99.\n"
    )


async def _turn(args: argparse.Namespace, streams: int) -> Turn:
    tokens = round(1000 * args.seconds / args.interval_ms)
    seen = await asyncio.gather(*(_read(args.port, tokens) for _ in range(streams)))
    items = [pair for _, pairs in seen for pair in pairs]
    began = max(pairs[0][1] for _, pairs in seen)
    ended = max(items, key=lambda pair: pair[1])[1]
    # The rate of what all streams together made after the last of them began.
    counted = [read for made, read in items if read >= began]
    events = {(stream, read) for stream, (_, pairs) in enumerate(seen) for _, read in pairs}
    return Turn(
        items_s=len(counted) / (ended - began),
        asked_s=streams * 1000 / args.interval_ms,
        events_s=sum(read >= began for _, read in events) / (ended - began),
        age_ms=[1000 * (read - made) for made, read in items],
        ttft_ms=[1000 * (pairs[0][1] - asked) for asked, pairs in seen],
    )


async def _read(port: int, tokens: int) -> tuple[float, list[tuple[float, float]]]:
    """Stream one completion; returns when it was asked for, and when each token was made and read.

    Raises:
        ValueError: some tokens are missing.
    """
    body = json.dumps({"model": "m", "prompt": "a", "max_tokens": tokens, "stream": True})
    asked = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
        b"content-type: application/json\r\n"
        + f"content-length: {len(body)}\r\n\r\n{body}".encode()
    )
    seen: list[tuple[float, float]] = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            now = time.monotonic()
            made = json.loads(line[6:])["choices"][0]["text"].split()
            seen += [(float(each), now) for each in made]
    writer.close()
    if len(seen) != tokens:
        raise ValueError(f"{len(seen)} of {tokens} tokens came")
    return asked, seen


def markdown(turns: dict[int, list[Turn]], args: argparse.Namespace) -> str:
    """Return the table, medians of the rounds."""
    lines = [
        "# What carries tokens",
        "",
        f"{', '.join(cpu_features())}; {os.cpu_count()} cores that the client shares, "
        f"{datetime.now(UTC):%Y-%m-%d}, ray {version('ray')}; a token for each stream every "
        f"{args.interval_ms:g} ms, medians of {args.rounds} rounds of {args.seconds:g} s, "
        f"{args.label}.",
        "",
        "| streams | made, 1/s | arrived, 1/s | events, 1/s | age p50, ms | p99 | ttft p50, ms |",
        "|---" * 7 + "|",
    ]
    for streams, own in turns.items():
        middle = statistics.median
        ages = [statistics.quantiles(turn.age_ms, n=100) for turn in own]
        lines.append(
            f"| {streams} | {own[0].asked_s:.0f} | {middle(turn.items_s for turn in own):.0f} "
            f"| {middle(turn.events_s for turn in own):.0f} "
            f"| {middle(each[49] for each in ages):.1f} | {middle(each[98] for each in ages):.1f} "
            f"| {middle(middle(turn.ttft_ms) for turn in own):.1f} |"
        )
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench_carry", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--interval-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--refuse", type=int, help="instead: so many at once, where half of 32 run and half wait"
    )
    parser.add_argument("--port", type=int, default=18_400)
    parser.add_argument("--label", default="Ray's own proxy", help="what the table says of it")
    parser.add_argument("--out", type=Path, help="write the table there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
