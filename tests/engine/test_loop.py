"""The engine thread's loop, driven by hand over a runner that samples a constant."""

import random
import threading
from collections import Counter

import pytest
import torch

from serve_app.engine.loop import EngineLoop, Stop
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import Sampled, SamplingPlan, Sequence
from serve_app.protocol import FinishReason

PLAN = SamplingPlan(temperature=0, top_p=1, top_k=0, seed=0, stop_token_ids=frozenset({0}))


class Constant:
    """Samples `token` for every row that samples."""

    token: int | None = 1

    def enter_thread(self):
        pass

    def step(self, plan):
        return [
            Sampled(row, (self.token,)) if self.token is not None else Sampled(row, broken=True)
            for row in plan.rows
            if row.kept
        ]


def sequence(key, prompt=4, max_tokens=3):
    return Sequence(key, [1] * prompt, prompt, max_tokens, PLAN)


def loop(*, running=1, deliver=lambda _: None, died=lambda _: None, step_timeout_s=60.0):
    scheduler = Scheduler(kv_tokens=100, max_batch_tokens=8, max_running_requests=running)
    return EngineLoop(
        scheduler, Constant(), deliver=deliver, died=died, step_timeout_s=step_timeout_s
    )


def test_loop_lets_commands_wait_for_no_step():
    """Arrivals count as waiting once a plan has found no place; a cancel makes room at once."""
    some = loop()
    for key in range(3):
        some.submit(sequence(key))
    assert some.stats().waiting == 3
    assert some._take_commands()
    assert some.waiting == 0
    some.step()
    assert some.waiting == some.stats().waiting == 2
    for key in range(3):
        some.cancel(key)
    some._inbox.put(Stop())
    assert not some._take_commands()
    assert some.waiting == 0
    assert some.stats().kv_tokens_used == 0


def test_loop_ignores_a_cancel_of_nobody():
    """The sequence may have ended while the cancel was on its way."""
    some = loop()
    some.submit(sequence(0))
    some.cancel(7)
    assert some._take_commands()
    assert some.stats().waiting == 1


@pytest.mark.parametrize(
    ("token", "reason", "count"), [(1, FinishReason.LENGTH, 3), (0, FinishReason.STOP, 1)]
)
def test_loop_updates_carry_tokens_and_one_end(token, reason, count):
    """Only the last update has the reason; the place is free then."""
    some = loop()
    some._runner.token = token
    updates = some.run_alone(sequence(5))
    assert [update.token for update in updates] == [token] * count
    assert [update.finish_reason for update in updates] == [None] * (count - 1) + [reason]
    assert some.stats().kv_tokens_used == 0
    assert some.stats().generation_tokens == count


def test_loop_counts_prompt_tokens_once():
    """A prompt in chunks, then its completion: only the prompt is counted."""
    some = loop()
    some.run_alone(sequence(0, prompt=30, max_tokens=9))
    assert some.stats().prompt_tokens == 30
    assert some.stats().steps == 4 + 8


def test_loop_ends_a_sequence_without_a_number():
    """The sequence leaves with a sentence and without a token."""
    some = loop()
    some._runner.token = None
    (update,) = some.run_alone(sequence(0))
    assert update.fault
    assert update.token is update.finish_reason is None
    assert some.stats().kv_tokens_used == some.stats().generation_tokens == 0


def test_loop_reports_a_failing_delivery_like_a_failing_step():
    """Whatever breaks on the thread ends it once, with the cause; it does not hang afterwards."""
    errors: list[Exception] = []

    def deliver(updates):
        raise OSError("reader")

    some = loop(deliver=deliver, died=errors.append, step_timeout_s=0.2)
    some.start()
    some.submit(sequence(0))
    some._thread.join(5)
    assert not some.is_alive()
    some._watchdog._thread.join(5)
    assert not some._watchdog._thread.is_alive()
    assert [str(error) for error in errors] == ["reader"]


def test_loop_stop_ends_a_sleeping_thread():
    """The idle thread wakes up to end; stopping twice is safe."""
    some = loop()
    some.start()
    assert some.stop(5)
    assert some.stop(5)
    assert some._thread not in threading.enumerate()


def test_loop_drain_rate_needs_two_finished_requests():
    """Requests and tokens per second over the last finished ones; unknown before."""
    some = loop()
    some.run_alone(sequence(0))
    assert some.drain_rate() is None
    some.run_alone(sequence(1))
    rate = some.drain_rate()
    assert rate.requests > 0
    assert rate.tokens == pytest.approx(7 * rate.requests)


class Failing(Constant):
    """Fails each step that `broken` names, and counts how often it was asked."""

    def __init__(self, broken):
        self.broken = broken
        self.asked = 0

    def step(self, plan):
        self.asked += 1
        if error := self.broken(plan):
            raise error
        return super().step(plan)


def failing(broken, *, batch=64, count=5, died=lambda _: None):
    scheduler = Scheduler(kv_tokens=1600, max_batch_tokens=batch, max_running_requests=8)
    some = EngineLoop(
        scheduler, Failing(broken), deliver=lambda _: None, died=died, step_timeout_s=60.0
    )
    for key in range(count):
        some.submit(sequence(key, prompt=20, max_tokens=6))
    return some


def finish(some):
    """Advance to the end; return the sampled tokens and the faults by key."""
    tokens, faults = Counter(), Counter()
    while not some._inbox.empty():
        some._scheduler.add(some._inbox.get())
    while some._scheduler.running or some._scheduler.waiting:
        for update in some.advance():
            tokens[update.key] += update.token is not None
            faults[update.key] += update.fault is not None
    return tokens, +faults


def poisoned(*keys, at=0):
    def broken(plan):
        for row in plan.rows:
            if row.sequence.key in keys and row.sequence.generated >= at:
                return IndexError("index out of range")
        return None

    return broken


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("keys", [(0,), (2,), (4,), (1, 3), (0, 1, 2, 3, 4)])
def test_loop_fails_only_a_request_that_fails_alone(keys, at):
    """Its neighbours go on with the tokens they had; several at fault are found one by one."""
    some = failing(poisoned(*keys, at=at))
    if len(keys) == 5:
        with pytest.raises(IndexError):
            finish(some)
        return
    tokens, faults = finish(some)
    assert faults == dict.fromkeys(keys, 1)
    assert tokens == {key: at if key in keys else 6 for key in range(5)}
    assert some.stats().kv_tokens_used == some.stats().running_tokens == 0


def test_loop_fails_nobody_for_a_failure_that_does_not_come_again():
    """All that ran is computed again."""
    errors = [RuntimeError("once")]
    tokens, faults = finish(failing(lambda _: errors.pop() if errors else None))
    assert not faults
    assert tokens == dict.fromkeys(range(5), 6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_loop_shrinks_steps_until_memory_suffices(error):
    """Nobody fails while shorter steps can help."""
    some = failing(lambda plan: error if sum(row.count for row in plan.rows) > 20 else None)
    tokens, faults = finish(some)
    assert not faults
    assert tokens == dict.fromkeys(range(5), 6)


def test_loop_ends_the_engine_when_memory_never_suffices():
    """A handful of steps, each request one answer, no endless loop."""
    errors: list[Exception] = []
    some = failing(lambda _: torch.OutOfMemoryError("CUDA"), died=errors.append)
    some.start()
    some._thread.join(10)
    assert [type(error) for error in errors] == [torch.OutOfMemoryError]
    assert some._runner.asked < 12


def test_loop_leaks_nothing_over_10_000_requests():
    """Prompts that begin alike, cancels, faults, failing steps: every place comes back."""
    chance = random.Random(5)
    some = failing(
        lambda plan: (
            RuntimeError("at times") if len(plan.rows) > 1 and chance.random() < 0.003 else None
        ),
        count=0,
    )
    ended: Counter[int] = Counter()
    cancelled = 0
    for key in range(10_000):
        one = sequence(key, prompt=chance.randint(1, 100), max_tokens=chance.randint(1, 4))
        one.tokens = [key % 7] * one.prompt_tokens
        some._scheduler.add(one)
        if chance.random() < 0.05:
            cancelled += some._scheduler.remove(chance.randint(0, key)) is not None
        while some._scheduler.waiting > 8:
            some._runner.token = None if chance.random() < 0.002 else 1
            ended.update(u.key for u in some.advance() if u.finish_reason or u.fault)
    some._runner.token = 1
    while some._scheduler.running or some._scheduler.waiting:
        ended.update(u.key for u in some.advance() if u.finish_reason or u.fault)
    assert set(ended.values()) == {1}
    assert len(ended) + cancelled == 10_000
    stats = some.stats()
    assert stats.kv_tokens_used == stats.running_tokens == stats.waiting_tokens == 0
    assert 0 < stats.prefix_cache_hits < stats.prefix_cache_queries
    some._scheduler.cache.clear()
    assert some._scheduler.cache.place(1600) is not None
    assert not some._scheduler.cache._holders
