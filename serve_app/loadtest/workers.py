"""The client processes: the parent hands out a stage and collects, each process sends its part.

Several processes, because one Python event loop parses some ten thousand events a second; the
parent neither sends nor parses, so its progress line costs the measurement nothing.

They speak over a pipe. A process says that it is ready; then assignments and stop marks come in,
and for each assignment go out lists of samples while they come, then one `Strain`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from threading import Event
from types import TracebackType

import aiohttp

from serve_app.loadtest.client import Sample, Target, ask, session
from serve_app.loadtest.stage import Shot, Stage

LEAD_S = 0.3  # between handing out and the start, so that all processes start together
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


@dataclass(slots=True)
class Ran:
    """What came of a stage.

    Args:
        stage: what was offered.
        start: when it started, on the monotonic clock.
        samples: one for each request that was sent, as they ended.
        strains: one for each process.
        stopped_s: seconds after the start at which it was interrupted; None if it was not.
    """

    stage: Stage
    start: float
    samples: list[Sample] = field(default_factory=list)
    strains: list[Strain] = field(default_factory=list)
    stopped_s: float | None = None


Progress = Callable[[Ran], None]


class Workers:
    """Client processes that live as long as the load test; a context manager.

    Args:
        target: whom they ask.
        processes: how many.
        drain_s: how long a stage waits for answers after its last request.
        stop: set by somebody else to end the running stage with what it has.
    """

    def __init__(self, target: Target, *, processes: int, drain_s: float, stop: Event) -> None:
        self._target = target
        self._drain_s = drain_s
        self._stop = stop
        spawn = multiprocessing.get_context("spawn")  # a fork would copy locks held by threads
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(processes):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(theirs,), daemon=True)
            # Blocked until it ignores it: a Ctrl-C while it imports is the parent's, too.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            process.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:  # a process that still imports would send its first requests late
            pipe.recv()

    def run(self, stage: Stage, progress: Progress) -> Ran:
        """Run one stage to its end, or to the stop mark.

        Raises:
            RuntimeError: a client process died.
        """
        ran = Ran(stage, time.monotonic() + LEAD_S)
        for index, pipe in enumerate(self._pipes):
            part = stage.part(index, len(self._pipes))
            pipe.send(Assignment(part, self._target, ran.start, self._drain_s))
        working = set(self._pipes)
        while working:
            ready = set(wait(list(working), timeout=0.25))
            for pipe in [pipe for pipe in working if pipe in ready]:
                if self._collect(pipe, ran):
                    working.discard(pipe)
            if self._stop.is_set() and ran.stopped_s is None:
                ran.stopped_s = max(0.0, time.monotonic() - ran.start)
                for pipe in working:
                    pipe.send(STOP)
            progress(ran)
        return ran

    def _collect(self, pipe: Connection, ran: Ran) -> bool:
        """Take one message; True when it was the process' last."""
        try:
            message = pipe.recv()
        except EOFError:
            raise RuntimeError("a client process died; its words are above") from None
        if isinstance(message, Strain):
            ran.strains.append(message)
            return True
        ran.samples += message
        return False

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes; those that do not end in time are killed."""
        for pipe in self._pipes:
            pipe.close()  # they read the end of the file
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


# In the client process.


def serve(pipe: Connection) -> None:
    """Work off assignments until the pipe closes; the parent alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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
            for shot in stage.shots:  # each at its time, whatever became of those before it
                await asyncio.sleep(assignment.start + shot.at_s - time.monotonic())
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


async def _tick(lags: list[float]) -> None:
    while True:
        due = time.monotonic() + TICK_S
        await asyncio.sleep(TICK_S)
        lags.append(max(0.0, time.monotonic() - due))
