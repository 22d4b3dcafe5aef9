"""A load test that runs: one target, its client processes, and the stages so far.

Ctrl-C and SIGTERM end the running stage with what it has; a second one ends the process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from threading import Event
from urllib.parse import urlsplit

from serve_app import __version__
from serve_app.errors import ConfigError
from serve_app.loadtest import report, stage
from serve_app.loadtest.client import Target, authorization, calibrate, find_model, session
from serve_app.loadtest.scrape import Scraper
from serve_app.loadtest.stage import Lengths, Span, Stage, parse_length
from serve_app.loadtest.summary import Json, Slo, summarise
from serve_app.loadtest.traces import read_lengths
from serve_app.loadtest.workers import Ran, Workers

WARMUP_SHARE = 0.2
MIN_REQUESTS = 30  # of a stage on average; a slow rate lasts longer instead of guessing
BAR = 30


@dataclass(slots=True)
class Bench:
    """What stages need, and what they left.

    Args:
        options: of the command line.
        target: whom to ask.
        window: of the model in tokens, if the service says.
        slo: limits of a good request, if there are some.
        lengths: of prompts and completions.
        workers: the client processes.
        scraper: the server's own view.
        stop: set when the user wants to end.
    """

    options: argparse.Namespace
    target: Target
    window: int | None
    slo: Slo | None
    lengths: Lengths
    workers: Workers
    scraper: Scraper
    stop: Event
    stages: list[Json] = field(default_factory=list)
    search: Json | None = None
    started: float = field(default_factory=time.monotonic)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def poisson(self, rate: float, *, seed: int = 0) -> Json:
        """Measure an open loop at this rate; long enough to count some requests."""
        least = MIN_REQUESTS / rate / (1 - WARMUP_SHARE)
        span = self.span(max(self.options.duration, least))
        return self.measure(stage.poisson(rate, self.lengths, span, seed=self.options.seed + seed))

    def span(self, duration_s: float) -> Span:
        """Return how long a stage lasts, and which part of it warms up."""
        warmup_s = self.options.warmup
        if warmup_s is None:
            warmup_s = duration_s * WARMUP_SHARE
        if warmup_s >= duration_s:
            raise ConfigError("--warmup leaves nothing of --duration to count")
        return Span(duration_s, warmup_s)

    def measure(self, offered: Stage) -> Json:
        """Run a stage and keep its numbers.

        Raises:
            ConfigError: none of its requests fits the model's window.
        """
        fitting = offered.shots
        if self.window is not None:
            window = self.window
            fitting = tuple(s for s in fitting if s.prompt_tokens + s.output_tokens <= window)
        if offered.shots and not fitting:
            raise ConfigError(f"no request fits the model's window of {self.window} tokens")
        ran = self.workers.run(replace(offered, shots=fitting), _show)
        if sys.stderr.isatty():
            sys.stderr.write("\n")  # below the progress bar
        measured = summarise(ran, self.slo)
        measured["left_out"] = len(offered.shots) - len(fitting)
        measured["start_s"] = round(ran.start - self.started, 3)
        self.stages.append(measured)
        return measured

    def report(self) -> Json:
        """Return the whole document as it stands."""
        options = self.options
        about: Json = {
            "created": self.created,
            "version": __version__,
            "target": self.target.url,
            "model": self.target.model,
            "load": {
                "endpoint": "completions" if options.completions else "chat",
                "prompt_tokens": options.prompt_tokens,
                "output_tokens": options.output_tokens,
                "lengths": options.lengths and options.lengths.name,
                "trace": getattr(options, "trace", None) and options.trace.name,
                "speed": getattr(options, "speed", 1.0),
            },
            "seed": options.seed,
            "slo": self.slo and self.slo.to_json(),
            "interrupted": self.stop.is_set(),
        }
        timeline = self.scraper.timeline(self.started)
        return report.document(about, self.stages, timeline=timeline, search=self.search)


@contextlib.contextmanager
def bench(options: argparse.Namespace, url: str) -> Iterator[Bench]:
    """Get to know the service, start the client, and end it again.

    Raises:
        ConfigError: an option is wrong, or the service does not answer.
    """
    slo = Slo.parse(options.slo) if options.slo else None
    pairs = read_lengths(options.lengths) if options.lengths else ()
    lengths = Lengths(
        parse_length(options.prompt_tokens), parse_length(options.output_tokens), pairs
    )
    target = Target(
        checked_url(url),
        options.model or "",
        chat=not options.completions,
        timeout_s=options.timeout,
        api_key_file=options.api_key_file,
    )
    metrics_url = checked_url(options.metrics_url or f"{target.url}/metrics")
    own = urlsplit(metrics_url).netloc == urlsplit(target.url).netloc
    headers = authorization(options.api_key_file) if own else {}  # the key is for the service
    target, window = asyncio.run(_introduced(target))
    with (
        _stopping() as stop,
        Scraper(metrics_url, headers) as scraper,
        Workers(target, processes=options.processes, drain_s=options.timeout, stop=stop) as workers,
    ):
        yield Bench(options, target, window, slo, lengths, workers, scraper, stop)


def checked_url(url: str) -> str:
    """Return a URL without a trailing slash.

    Raises:
        ConfigError: not http, or credentials, a query or a fragment in it: the report names it.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("the URL must begin with http:// or https://")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError("the URL must hold no credentials; hand a key over with --api-key-file")
    return url.rstrip("/").removesuffix("/v1")


async def _introduced(target: Target) -> tuple[Target, int | None]:
    async with session(target) as http:
        model, window = await find_model(http, target.url)
        target = replace(target, model=target.model or model)
        return replace(target, prompts=await calibrate(http, target)), window


@contextlib.contextmanager
def _stopping() -> Iterator[Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; the second is what it always was."""
    stop = Event()
    kinds: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)

    def ask_to_stop(kind: int, _frame: object) -> None:
        stop.set()
        signal.signal(kind, before[kind])

    before = {kind: signal.signal(kind, ask_to_stop) for kind in kinds}
    try:
        yield stop
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])


def _show(ran: Ran) -> None:
    """Draw the progress of a stage over the last line of a terminal."""
    if not sys.stderr.isatty():
        return
    gone = min(1.0, max(0.0, (time.monotonic() - ran.start) / ran.stage.duration_s))
    failed = sum(sample.error is not None for sample in ran.samples)
    bar = "#" * round(gone * BAR)
    text = (
        f"{ran.stage.name:<14} [{bar:<{BAR}}] {gone:4.0%} {len(ran.samples)} done, {failed} failed"
    )
    sys.stderr.write(f"\r{text}\033[K")
    sys.stderr.flush()
