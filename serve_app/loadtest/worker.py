"""A client process: sends its part of a stage and watches itself while it does.

Speaks with its parent over a pipe. It says that it is ready; then assignments and stop marks
come in, and for each assignment go out lists of samples while they come, then one `Strain`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import aiohttp

from serve_app.loadtest.client import Sample, Target, ask, session
from serve_app.loadtest.stage import Shot, Stage

TICK_S = 0.01
FLUSH_S = 0.2
READY, STOP = "ready", "stop"


@dataclass(frozen=True, slots=True)
class Assignment:
    """One process' part of a stage.

    Args:
        stage: the part.
        target: whom to ask.
        start: when the stage starts, on the monotonic clock.
        drain_s: how long to wait for answers after the last request was offered.
    """

    stage: Stage
    target: Target
    start: float
    drain_s: float


@dataclass(frozen=True, slots=True)
class Strain:
    """How busy the client itself was.

    Args:
        cpu_share: CPU seconds of this process per second, 0 to 1 for one thread.
        lags_s: by how much each of the event loop's 10 ms ticks came late.
    """

    cpu_share: float
    lags_s: tuple[float, ...]


def serve(pipe: Connection) -> None:
    """Work off assignments until the pipe closes; the parent alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(READY)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            assignment = pipe.recv()
            if isinstance(assignment, Assignment):  # a stop mark may come after the end
                asyncio.run(_work(assignment, pipe))


async def _work(assignment: Assignment, pipe: Connection) -> None:
    done: list[Sample] = []
    lags: list[float] = []
    async with session(assignment.target) as http:
        await asyncio.sleep(assignment.start - time.monotonic())
        cpu, wall = time.process_time(), time.monotonic()
        offering = asyncio.create_task(_offer(assignment, http, done))
        ticking = asyncio.create_task(_tick(lags))
        while not offering.done():
            await asyncio.wait((offering,), timeout=FLUSH_S)
            pipe.send(done[:])
            done.clear()
            if pipe.poll():
                pipe.recv()
                offering.cancel()
                await asyncio.wait((offering,))
        ticking.cancel()
        strain = Strain((time.process_time() - cpu) / (time.monotonic() - wall), tuple(lags))
    if not offering.cancelled():
        offering.result()
    pipe.send(done)
    pipe.send(strain)


async def _offer(assignment: Assignment, http: aiohttp.ClientSession, done: list[Sample]) -> None:
    """Send everything, then wait for the answers; what is cancelled leaves its sample too."""
    stage, tasks, over = assignment.stage, set[asyncio.Task[None]](), asyncio.Event()

    async def send(shot: Shot) -> None:
        text = assignment.target.prompts.text(shot, stage.seed)
        done.append(await ask(http, assignment.target, shot, text, start=assignment.start))

    async def client(index: int, of: int) -> None:
        for serial in itertools.count(index, of):
            at_s = time.monotonic() - assignment.start
            if over.is_set() or at_s >= stage.duration_s:
                return
            shot = stage.shots[serial % len(stage.shots)]
            unique = shot.serial + serial // len(stage.shots) * 1_000_000
            await send(replace(shot, at_s=at_s, serial=unique))

    try:
        if stage.concurrency is None:
            async for shot in _due(stage, assignment.start):
                tasks.add(asyncio.create_task(send(shot)))
        else:
            clients = stage.concurrency
            tasks |= {asyncio.create_task(client(i, clients)) for i in range(clients)}
        if tasks:
            left = assignment.start + stage.duration_s + assignment.drain_s - time.monotonic()
            await asyncio.wait(tasks, timeout=max(0.0, left))
    finally:
        over.set()  # a cancelled request ends as a sample, so its client would go on
        await _end(tasks)


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


async def _due(stage: Stage, start: float) -> AsyncIterator[Shot]:
    """Yield each request at its time, whatever became of those before it."""
    for shot in stage.shots:
        await asyncio.sleep(start + shot.at_s - time.monotonic())
        yield shot


async def _tick(lags: list[float]) -> None:
    while True:
        due = time.monotonic() + TICK_S
        await asyncio.sleep(TICK_S)
        lags.append(max(0.0, time.monotonic() - due))
