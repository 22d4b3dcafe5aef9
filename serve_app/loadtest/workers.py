"""The client processes, seen from the parent: start, hand out, collect, end.

Several processes, because one Python event loop parses some ten thousand events a second; the
parent neither sends nor parses, so its progress line costs the measurement nothing.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from threading import Event
from types import TracebackType

from serve_app.loadtest.client import Sample, Target
from serve_app.loadtest.stage import Stage
from serve_app.loadtest.worker import STOP, Assignment, Strain, serve

LEAD_S = 0.3  # between handing out and the start, so that all processes start together


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


class Crew:
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
            process.start()
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

    def __enter__(self) -> Crew:
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
