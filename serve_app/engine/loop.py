"""The engine thread: commands in, one step at a time, updates out.

The thread sleeps in its queue while there is nothing to do. A row whose numbers are not
finite fails its own request; any other exception cannot be attributed to one, so it ends the
engine: every open request fails once and the replica is replaced.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.engine.runner import Runner
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import Row, Sequence, Update
from serve_app.engine.stats import EngineStats

# Finished requests that the drain rate is measured over.
RATE_WINDOW = 64


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop a sequence, wherever it is; one that is over already is not an error."""

    key: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread after the present step."""


class EngineLoop:
    """Runs steps on one thread.

    Args:
        scheduler: chooses the work.
        runner: does it.
        deliver: takes the updates of each step, on the engine thread.
        died: called once, on the engine thread, when a step failed for all.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        deliver: Callable[[list[Update]], None],
        died: Callable[[Exception], None],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._deliver = deliver
        self._died = died
        self._inbox: queue.SimpleQueue[Sequence | Cancel | Stop] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._waiting = 0
        self._steps = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished: deque[float] = deque(maxlen=RATE_WINDOW)

    def start(self) -> None:
        """Start the thread; from here on only it touches the scheduler and the runner."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to end and wait for it; tells whether it did."""
        self._inbox.put(Stop())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def submit(self, sequence: Sequence) -> None:
        """Hand over a new sequence; keys must ascend. Any thread."""
        self._inbox.put(sequence)

    def cancel(self, key: int) -> None:
        """Drop a sequence within one step. Any thread."""
        self._inbox.put(Cancel(key))

    def is_alive(self) -> bool:
        """Tell whether the thread runs. Any thread."""
        return self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Return the present numbers; each is true, they may be a step apart. Any thread."""
        return EngineStats(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting + self._inbox.qsize(),
            kv_tokens_used=self._scheduler.kv_tokens_used,
            kv_tokens_total=self._scheduler.kv_tokens_total,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            preemptions=self._scheduler.preemptions,
        )

    def drain_rate(self) -> float | None:
        """Return the requests finished per second of late; None before two have. Any thread."""
        finished = tuple(self._finished)
        if len(finished) < 2:
            return None
        return len(finished) / max(1e-3, time.monotonic() - finished[0])

    @property
    def waiting(self) -> int:
        """Requests that found no place after the last step was planned. Any thread."""
        return self._waiting

    def run_alone(self, sequence: Sequence) -> list[Update]:
        """Run one sequence to its end on the calling thread; only before `start`."""
        self._scheduler.add(sequence)
        updates: list[Update] = []
        while self._scheduler.running or self._scheduler.waiting:
            updates += self.step()
        return updates

    def step(self) -> list[Update]:
        """Do one forward and account for it."""
        plan = self._scheduler.plan()
        self._waiting = self._scheduler.waiting
        sampled = self._runner.step(plan)
        self._scheduler.commit(plan)
        self._steps += 1
        self._prompt_tokens += sum(
            max(0, min(row.start + row.count, row.sequence.prompt_tokens) - row.start)
            for row in plan.rows
        )
        return [self._account(row, token) for row, token in sampled]

    def _account(self, row: Row, token: int | None) -> Update:
        sequence = row.sequence
        if token is None:
            self._scheduler.remove(sequence.key)
            return Update(sequence.key, fault="The model's output is not a number.")
        self._generation_tokens += 1
        finish_reason = sequence.append(token)
        if finish_reason is not None:
            self._scheduler.remove(sequence.key)
            self._finished.append(time.monotonic())
        return Update(sequence.key, token, finish_reason)

    def _run(self) -> None:
        try:
            self._runner.enter_thread()
            while self._take_commands():
                self._deliver(self.step())
        except Exception as error:  # noqa: BLE001 (the one place: it fails all and marks us dead)
            self._died(error)

    def _take_commands(self) -> bool:
        """Apply what was asked for, waiting if there is nothing to do; False ends the thread."""
        while True:
            idle = not self._scheduler.running and not self._scheduler.waiting
            # A cancel makes room at once; arrivals count when a plan has found no place for them.
            self._waiting = min(self._waiting, self._scheduler.waiting)
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if isinstance(command, Stop):
                return False
            if isinstance(command, Cancel):
                self._scheduler.remove(command.key)
            else:
                self._scheduler.add(command)
