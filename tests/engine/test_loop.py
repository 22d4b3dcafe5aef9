"""The engine thread's loop, driven by hand over a runner that samples a constant."""

import threading

import pytest

from serve_app.engine.loop import EngineLoop, Stop
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import SamplingPlan, Sequence
from serve_app.protocol import FinishReason

PLAN = SamplingPlan(temperature=0, top_p=1, top_k=0, seed=0, stop_token_ids=frozenset({0}))


class Constant:
    """Samples `token` for every row that samples."""

    token: int | None = 1

    def enter_thread(self):
        pass

    def step(self, plan):
        return [(row, self.token) for row in plan.rows if row.kept]


def sequence(key, prompt=4, max_tokens=3):
    return Sequence(key, [1] * prompt, prompt, max_tokens, PLAN)


def loop(*, running=1, deliver=lambda _: None, died=lambda _: None):
    scheduler = Scheduler(kv_tokens=100, max_batch_tokens=8, max_running_requests=running)
    return EngineLoop(scheduler, Constant(), deliver=deliver, died=died)


def test_commands_wait_for_no_step():
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


def test_a_cancel_of_nobody_is_nothing():
    """The sequence may have ended while the cancel was on its way."""
    some = loop()
    some.submit(sequence(0))
    some.cancel(7)
    assert some._take_commands()
    assert some.stats().waiting == 1


@pytest.mark.parametrize(
    ("token", "reason", "count"), [(1, FinishReason.LENGTH, 3), (0, FinishReason.STOP, 1)]
)
def test_updates_carry_tokens_and_one_end(token, reason, count):
    """Only the last update has the reason; the place is free then."""
    some = loop()
    some._runner.token = token
    updates = some.run_alone(sequence(5))
    assert [update.token for update in updates] == [token] * count
    assert [update.finish_reason for update in updates] == [None] * (count - 1) + [reason]
    assert some.stats().kv_tokens_used == 0
    assert some.stats().generation_tokens == count


def test_prompt_tokens_count_the_prompt_once():
    """A prompt in chunks, then its completion: only the prompt is counted."""
    some = loop()
    some.run_alone(sequence(0, prompt=30, max_tokens=9))
    assert some.stats().prompt_tokens == 30
    assert some.stats().steps == 4 + 8


def test_no_number_is_a_fault_of_its_sequence():
    """The sequence leaves with a sentence and without a token."""
    some = loop()
    some._runner.token = None
    (update,) = some.run_alone(sequence(0))
    assert update.fault
    assert update.token is update.finish_reason is None
    assert some.stats().kv_tokens_used == some.stats().generation_tokens == 0


def test_a_failing_delivery_is_told_like_a_failing_step():
    """Whatever breaks on the thread ends it once, with the cause."""
    errors: list[Exception] = []

    def deliver(updates):
        raise OSError("reader")

    some = loop(deliver=deliver, died=errors.append)
    some.start()
    some.submit(sequence(0))
    some._thread.join(5)
    assert not some.is_alive()
    assert [str(error) for error in errors] == ["reader"]


def test_stop_ends_a_sleeping_thread():
    """The idle thread wakes up to end; stopping twice is safe."""
    some = loop()
    some.start()
    assert some.stop(5)
    assert some.stop(5)
    assert some._thread not in threading.enumerate()


def test_the_drain_rate_needs_two_finished_requests():
    """Requests per second over the last finished ones; unknown before."""
    some = loop()
    some.run_alone(sequence(0))
    assert some.drain_rate() is None
    some.run_alone(sequence(1))
    assert some.drain_rate() > 0
