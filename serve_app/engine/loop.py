"""The engine thread: commands in, one step at a time, updates out.

The thread sleeps in its queue while there is nothing to do. A row whose numbers are not
finite fails its own request. After an exception in a step all that ran is computed again: in
shorter steps if memory was short, else one request at a time, so that only the one at fault
fails. Exceptions in a row, and any outside a step, end the engine: every open request fails
once and the replica is replaced.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import structlog
import torch

from serve_app.engine.drain import DrainMeter, DrainRate
from serve_app.engine.grammar import matcher as grammars
from serve_app.engine.model.runner import Runner
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import Sampled, Sequence, StepPlan, Update
from serve_app.engine.stats import EngineStats
from serve_app.watchdog import Watchdog, stack_of

log = structlog.get_logger()

# What torch and the code around it raise; an interrupt or an exit is none of them.
STEP_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    OSError,
)
# Failed steps without a good one between them before the engine itself is at fault. The first
# is of a whole batch, the others of one request each.
MAX_FAILURES = 4
# Where all sequences wait for masks, commands are looked at so often.
IDLE_WAIT_S = 0.01


@dataclass(frozen=True, slots=True)
class Activity:
    """What the engine's thread is doing.

    Args:
        round: number of the thread's present round, so that two of them differ.
        phase: of it: plan, compute (the forward and the sampling) or deliver.
        rows: of its batch; 0 while it is planned.
        tokens: that its rows compute.
    """

    round: int
    phase: Literal["plan", "compute", "deliver"]
    rows: int = 0
    tokens: int = 0


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
        died: called once, on some thread, when a step failed for all, or hangs.
        step_timeout_s: a step that takes longer hangs.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        deliver: Callable[[list[Update]], None],
        died: Callable[[Exception], None],
        step_timeout_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._deliver = deliver
        self._died = died
        self._inbox: queue.SimpleQueue[Sequence | Cancel | Stop] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._activity: Activity | None = None  # None while the thread sleeps
        self._watchdog = Watchdog(
            "engine-watchdog",
            working=lambda: self._activity,
            limit_s=step_timeout_s,
            alarm=self._hangs,
        )
        self._is_hung = False
        self._waiting = 0  # of its own: admission reads it while a plan is being made
        self._failures = 0  # since the last good step
        self._steps = 0
        self._round = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._drain = DrainMeter()

    def start(self) -> None:
        """Start the thread; from here on only it touches the scheduler and the runner."""
        self._thread.start()
        self._watchdog.start()

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to end after its step and wait for it, unless the step hangs.

        Returns:
            Whether it has ended.
        """
        self._watchdog.stop()
        self._inbox.put(Stop())
        if not self._is_hung:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def submit(self, sequence: Sequence) -> None:
        """Hand over a new sequence; keys must ascend. Any thread."""
        self._inbox.put(sequence)

    def cancel(self, key: int) -> None:
        """Drop a sequence within one step. Any thread."""
        self._inbox.put(Cancel(key))

    def is_alive(self) -> bool:
        """Return whether the thread runs. Any thread."""
        return self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Return the present numbers; each is true, they may be a step apart. Any thread."""
        return EngineStats(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting + self._inbox.qsize(),
            kv_tokens_used=self._scheduler.cache.used_tokens,
            kv_tokens_total=self._scheduler.cache.size,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            preemptions=self._scheduler.preemptions,
            kv_tokens_cached=self._scheduler.cache.cached_tokens,
            prefix_cache_queries=self._scheduler.queried_tokens,
            prefix_cache_hits=self._scheduler.hit_tokens,
            waiting_tokens=self._scheduler.waiting_tokens,
            running_tokens=self._scheduler.running_tokens,
        )

    def drain_rate(self) -> DrainRate | None:
        """Return how fast requests finish; None before two have. Any thread."""
        return self._drain.rate()

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
        """Do one forward and account for it; an error in it is the caller's."""
        plan = self._plan()
        return self._accounts(plan, self._runner.step(plan))

    def advance(self) -> list[Update]:
        """Do one forward, or make ready to do it in another way after it failed.

        Raises:
            Exception: one of STEP_ERRORS, when no way is left.
        """
        self._activity = Activity(self._round, "plan")
        plan = self._plan()
        if not plan.rows and not plan.moves:
            self._wait_for_masks()
            return []
        tokens = sum(row.count for row in plan.rows)
        self._activity = Activity(self._round, "compute", len(plan.rows), tokens)
        try:
            sampled = self._runner.step(plan)
        except STEP_ERRORS as error:
            return self._recover(plan, error)
        self._failures = 0
        return self._accounts(plan, sampled)

    def _plan(self) -> StepPlan:
        plan = self._scheduler.plan()
        self._waiting = self._scheduler.waiting
        return plan

    def _recover(self, plan: StepPlan, error: Exception) -> list[Update]:
        """Put all back; fail the request that failed alone; raise what nothing helps against."""
        short = _is_memory(error) and self._scheduler.shrink()
        alone = len(plan.rows) == 1 and not short
        self._failures += not short
        cause = f"{type(error).__name__}: {error}"
        log.warning("engine.step_failed", cause=cause, rows=len(plan.rows), out_of_memory=short)
        if self._failures >= MAX_FAILURES:
            raise error
        updates: list[Update] = []
        if alone:
            key = plan.rows[0].sequence.key
            self._drop(key, trusted=False)
            updates.append(Update(key, fault="The model cannot compute this request."))
        # Some layers, or some moves, may be done and others not: nothing in the cache is sure.
        self._scheduler.restart(isolate=not (alone or short))
        # What torch keeps of the long step's tensors is in blocks that short ones cannot use.
        if short and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return updates

    def _accounts(self, plan: StepPlan, sampled: list[Sampled]) -> list[Update]:
        wrong = {
            each.row.sequence.key: len(each.row.drafts) + 1 - len(each.tokens)
            for each in sampled
            if each.late or (each.row.drafts and each.tokens)
        }
        self._scheduler.commit(plan, wrong)
        self._steps += 1
        self._prompt_tokens += sum(
            max(0, min(row.start + row.count, row.sequence.prompt_tokens) - row.start)
            for row in plan.rows
        )
        now = time.monotonic()
        return [update for each in sampled for update in self._account(each, now)]

    def _account(self, sampled: Sampled, now: float) -> Iterator[Update]:
        sequence = sampled.row.sequence
        if sampled.broken:
            self._drop(sequence.key, trusted=False)
            yield Update(sequence.key, fault="The model's output is not a number.")
            return
        if sampled.refused is not None:
            self._drop(sequence.key)
            yield Update(sequence.key, fault=sampled.refused, refused=True)
            return
        sequence.scored += len(sampled.prompt)
        if not sampled.tokens:
            if sampled.prompt:
                yield Update(sequence.key, prompt=sampled.prompt)
            return
        sequence.first_s = sequence.first_s or now
        sequence.latest_s = now
        for token in sampled.tokens:  # several, where guesses were right; none behind the end
            self._generation_tokens += 1
            finish_reason = sequence.append(token)
            yield Update(
                sequence.key, token, finish_reason, score=sampled.score, prompt=sampled.prompt
            )
            if finish_reason is None and sequence.matcher is not None:
                sequence.matcher.advance(token)  # its mask comes while others do their work
            if finish_reason is not None:
                self._drop(sequence.key)
                self._drain.note(sequence.limit)
                return

    def _wait_for_masks(self) -> None:
        """Sleep until one of the running sequences has its mask; all of them wait for one."""
        matchers = [s.matcher for s in self._scheduler.sequences if s.matcher is not None]
        grammars.wait(matchers, IDLE_WAIT_S, until_all=False)

    def _drop(self, key: int, *, trusted: bool = True) -> None:
        """Take a sequence out, wherever it is.

        Args:
            key: of the sequence; one that is not here is no error.
            trusted: whether others may find what was computed of it.
        """
        gone = self._scheduler.remove(key) if trusted else self._scheduler.discard(key)
        if gone is not None and gone.matcher is not None:
            gone.matcher.close()

    def _run(self) -> None:
        try:
            self._runner.enter_thread()
            while self._take_commands():
                self._round += 1
                updates = self.advance()
                self._activity = Activity(self._round, "deliver", len(updates))
                self._deliver(updates)
                self._activity = None
        except Exception as error:  # noqa: BLE001 (the one place: it fails all and marks us dead)
            self._died(error)
        finally:
            self._watchdog.stop()  # a thread that has ended does not hang

    def _hangs(self, seconds: float) -> None:
        """Give up on a step; on the watchdog's thread, since the engine's does not come back."""
        self._is_hung = True
        activity = self._activity or Activity(self._round, "deliver")
        log.error(
            "engine.hung",
            seconds=round(seconds, 1),
            phase=activity.phase,
            rows=activity.rows,
            tokens=activity.tokens,
            stack=stack_of(self._thread.ident),
        )
        self._inbox.put(Stop())  # should it come back after all
        self._died(TimeoutError(f"a step hangs for {seconds:.0f} s ({activity.phase})"))

    def _take_commands(self) -> bool:
        """Apply what was asked for, waiting if there is nothing to do; False ends the thread."""
        while True:
            idle = not self._scheduler.running and not self._scheduler.waiting
            # A cancel makes room at once; arrivals count when a plan has found no place for them.
            self._waiting = min(self._waiting, self._scheduler.waiting)
            try:
                command = self._inbox.get(block=idle)  # between two steps every token is due
            except queue.Empty:
                return True
            if isinstance(command, Stop):
                return False
            if isinstance(command, Cancel):
                self._drop(command.key)
            else:
                self._scheduler.add(command)


def _is_memory(error: Exception) -> bool:
    """Return whether memory ran out: torch has a type for it on GPUs, and a sentence on CPUs."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text
