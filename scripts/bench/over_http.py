"""Time whole services over HTTP on this machine's CPU: both engines here, and `vllm serve`.

All three are up at once and take turns, so the two that wait cost each what they cost at rest. Each
gets all cores, the same prompts as token ids, and as many places in its batch as there are streams.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
from tokenizers import Tokenizer

from scripts.bench.report import cpu_features
from scripts.bench.worker import (
    ROOT,
    Contender,
    Setup,
    bound_cores,
    preloading,
    recommended_by_vllm,
)
from scripts.bench.workload import LENGTHS, Request, make, window_of
from scripts.local_hub.model import build_demo_model, default_cache_dir

WINDOW = window_of(LENGTHS)
KV_GIB = 1
START_S = 300
PLAIN = "vllm serve"  # what the others are measured against
ALONE = "the builtin engine without HTTP"
PROXY = "HAProxy" if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else "Ray's own proxy"
ENGINES = {"serve-app, builtin": "builtin", "serve-app, vllm": "vllm"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of one service's turn.

    Args:
        tok_s: completion tokens a second, of all streams.
        ttft_s: of each request.
    """

    tok_s: float
    ttft_s: tuple[float, ...]


def main() -> int:
    """Start the services, let them take turns, write what came out."""
    args = _arguments()
    model_dir = build_demo_model(default_cache_dir())
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    text = tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8")).ids
    cores = os.cpu_count() or 1
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bound_cores(cores)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(KV_GIB)
    setup = Setup(str(model_dir), "bfloat16", "cpu", cores, max(args.streams), WINDOW, "")
    with contextlib.ExitStack() as stack:
        urls = stack.enter_context(ours(model_dir, max(args.streams), args.port))
        urls[PLAIN] = stack.enter_context(plain(model_dir, max(args.streams), args.port + 1))
        alone = Contender(
            ALONE, "ours:load", sys.executable, setup, Path(tempfile.mkdtemp()) / "engine.log"
        )
        stack.callback(alone.close)
        turns = asyncio.run(measure(urls, alone, text, args))
    report = markdown(turns, args, cores)
    print(report)
    if args.out:
        name = f"{args.out.name}-{(cpu_features() or ['cpu'])[0]}.md"
        args.out.with_name(name).write_text(report, encoding="utf-8")
    return 0


@contextlib.contextmanager
def ours(model_dir: Path, streams: int, port: int) -> Iterator[dict[str, str]]:
    """Serve the model twice, by each engine; yields the base URLs by name."""
    import ray  # noqa: PLC0415 - beside a log that it would fill
    from ray import serve  # noqa: PLC0415

    from serve_app.app import build_app  # noqa: PLC0415

    cores = os.cpu_count() or 1
    ray.init("local", num_cpus=4 * cores, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        for backend in ENGINES.values():
            args = {
                "model": {"path": str(model_dir), "served_name": "m"},
                "replica": {"num_gpus": 0, "num_cpus": cores},
                "engine": {
                    "backend": backend,
                    "max_context_tokens": WINDOW,
                    "max_running_requests": streams,
                    "kv_cache_cpu_gib": KV_GIB,
                    "prefix_cache": False,
                },
            }
            serve.run(build_app(args), name=backend, route_prefix=f"/{backend}")
        yield {name: f"http://127.0.0.1:{port}/{backend}" for name, backend in ENGINES.items()}
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


@contextlib.contextmanager
def plain(model_dir: Path, streams: int, port: int) -> Iterator[str]:
    """Run `vllm serve` of the same settings; yields its base URL."""
    command = [
        # What `vllm serve` runs; vllm-cpu's own command looks for a package of another name.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m"),
        *("--max-model-len", str(WINDOW), "--max-num-seqs", str(streams)),
        *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
    ]
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile(
        prefix="bench-vllm-serve-", suffix=".log", delete=False
    ) as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | preloading(recommended_by_vllm(sys.executable)),
        )
    try:
        asyncio.run(_until_up(url, server, log.name))
        yield url
    finally:
        server.terminate()
        server.wait(timeout=60)


async def _until_up(url: str, server: subprocess.Popen[bytes], log: str) -> None:
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise SystemExit(f"vllm serve did not come up; see {log}")


async def measure(
    urls: Mapping[str, str], alone: Contender, text: list[int], args: argparse.Namespace
) -> dict[tuple[str, int], list[Turn]]:
    """Let the services take turns; who begins changes with the round."""
    names = [*urls, ALONE]
    found: dict[tuple[str, int], list[Turn]] = {}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
    ) as session:
        for url in urls.values():
            await take_turn(session, url, make(text, streams=8, turn=1), together=True)
        plan = [(number, streams) for number in range(args.rounds) for streams in args.streams]
        for turn, (number, streams) in enumerate(plan, start=2):
            requests = make(text, streams=streams, turn=turn)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                together = streams > 1
                if name == ALONE:
                    one = without_http(alone, requests, together=together)
                else:
                    one = await take_turn(session, urls[name], requests, together=together)
                found.setdefault((name, streams), []).append(one)
                print(f"round {number + 1}, {streams} streams, {name}: {one.tok_s:.1f} tok/s")
    return found


async def take_turn(
    session: aiohttp.ClientSession, url: str, requests: Sequence[Request], *, together: bool
) -> Turn:
    """Send requests at once, or one after the other."""
    began = time.perf_counter()
    if together:
        ttft = list(await asyncio.gather(*(ask(session, url, each) for each in requests)))
    else:
        ttft = [await ask(session, url, each) for each in requests]
    tokens = sum(request.max_tokens for request in requests)
    return Turn(tokens / (time.perf_counter() - began), tuple(ttft))


def without_http(alone: Contender, requests: list[Request], *, together: bool) -> Turn:
    """Run requests in the engine's own process; all services wait meanwhile."""
    results = alone.run(requests, together=together)["results"]
    seconds = sum(max(stream["times"][-1] for stream in result) for result in results)
    return Turn(
        sum(request.max_tokens for request in requests) / seconds,
        tuple(stream["times"][0] for result in results for stream in result),
    )


async def ask(session: aiohttp.ClientSession, url: str, request: Request) -> float:
    """Stream one completion; returns the seconds to its first text.

    Raises:
        ValueError: it has another number of tokens than it was asked for.
    """
    body: dict[str, Any] = {
        "model": "m",
        "prompt": list(request.prompt),
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, tokens = time.perf_counter(), None, 0
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            first = first or time.perf_counter() - began
            tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", tokens)
    if first is None or tokens != request.max_tokens:
        raise ValueError(f"{url} made {tokens} of {request.max_tokens} tokens")
    return first


def markdown(
    turns: Mapping[tuple[str, int], Sequence[Turn]], args: argparse.Namespace, cores: int
) -> str:
    """Return a table for each number of streams; a ratio is the median of the rounds' ratios."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "vllm-cpu"))
    lines = [
        "# The demo model over HTTP",
        "",
        f"{', '.join(cpu_features())}; {cores} cores, {datetime.now(UTC):%Y-%m-%d}, {versions}; "
        f"medians of {args.rounds} interleaved rounds, bfloat16, prompts as token ids, "
        f"{PROXY}, vLLM bound to "
        f"cores {os.environ['VLLM_CPU_OMP_THREADS_BIND']} both times; `vllm serve` with "
        f"{', '.join(path.name for path in recommended_by_vllm(sys.executable)) or 'nothing'} "
        "preloaded.",
    ]
    for streams in args.streams:
        lines += ["", f"## Streams: {streams}", ""]
        lines += [f"| | tok/s | of {PLAIN} | ttft p50 s | of {PLAIN} |", "|---" * 5 + "|"]
        others = turns[PLAIN, streams]
        for name in (*ENGINES, PLAIN, ALONE):
            own = turns[name, streams]
            pairs = list(zip(own, others, strict=True))
            rate = statistics.median(a.tok_s / b.tok_s for a, b in pairs)
            wait = statistics.median(_ttft(a) / _ttft(b) for a, b in pairs)
            lines.append(
                f"| {name} | {statistics.median(turn.tok_s for turn in own):.1f} | {rate:.2f} x "
                f"| {statistics.median(map(_ttft, own)):.3f} | {wait:.2f} x |"
            )
    return "\n".join(lines) + "\n"


def _ttft(turn: Turn) -> float:
    return statistics.median(turn.ttft_s)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench_http", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, len(LENGTHS)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18_300, help="and the one after it")
    parser.add_argument("--out", type=Path, help="write OUT-CLASS.md, by the class of processor")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
