"""The scheduler against a simulated cache: right contents, fair order, progress, no leak."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import SamplingPlan, Sequence

PLAN = SamplingPlan(
    temperature=0, top_p=1, top_k=0, seed=0, stop_token_ids=frozenset({-1})
)  # fmt: skip


def sequence(key: int, prompt: int, max_tokens: int) -> Sequence:
    return Sequence(key, [1] * prompt, prompt, max_tokens, PLAN)


class Simulation:
    """Does what the engine thread does, with a list for the cache: who wrote which token."""

    def __init__(self, kv_tokens: int, **settings: int) -> None:
        self.scheduler = Scheduler(kv_tokens=kv_tokens, **settings)
        self.max_batch_tokens = settings["max_batch_tokens"]
        self.cache: list[tuple[int, int] | None] = [None] * kv_tokens
        self.finished: list[int] = []

    def step(self) -> None:
        decoding = {s.key for s in self.scheduler._running.values() if s.missing == 1}
        plan = self.scheduler.plan()
        assert 0 < sum(row.count for row in plan.rows) <= self.max_batch_tokens
        for move in plan.moves:
            assert abs(move.source - move.target) >= move.length
            part = self.cache[move.source : move.source + move.length]
            self.cache[move.target : move.target + move.length] = part
        planned = {row.sequence.key for row in plan.rows}
        assert decoding & set(self.scheduler._running) <= planned, "a stream was stalled"
        for row in plan.rows:
            region = row.sequence.region
            assert row.start == row.sequence.computed
            assert row.start + row.count <= region.length
            for token in range(row.start, row.start + row.count):
                self.cache[region.start + token] = (row.sequence.key, token)
        for row in plan.rows:  # what attention would read
            start, end = row.sequence.region.start, row.start + row.count
            seen = self.cache[start : start + end]
            assert seen == [(row.sequence.key, token) for token in range(end)]
        self.scheduler.commit(plan)
        for row in plan.rows:
            if row.kept and row.sequence.append(1) is not None:
                self.finished.append(row.sequence.key)
                assert self.scheduler.remove(row.sequence.key) is row.sequence


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=15),
    batch=st.integers(2, 24),
    running=st.integers(1, 8),
    reserve=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_every_request_ends_with_its_own_keys(requests, batch, running, reserve, seed):
    """Random arrivals and cancels in a small cache: contents are right, all end, none leaks."""
    chance = random.Random(seed)
    simulation = Simulation(
        100, max_batch_tokens=batch, max_running_requests=running, reserve_tokens=reserve
    )
    scheduler = simulation.scheduler
    pending = [sequence(key, *request) for key, request in enumerate(requests)]
    cancelled = 0
    for _ in range(20_000):
        if pending and (chance.random() < 0.3 or not (scheduler.running or scheduler.waiting)):
            scheduler.add(pending.pop(0))
        if chance.random() < 0.02:
            cancelled += scheduler.remove(chance.randrange(len(requests))) is not None
        if scheduler.running or scheduler.waiting:
            simulation.step()
        elif not pending:
            break
    assert len(simulation.finished) + cancelled == len(requests)
    assert scheduler.kv_tokens_used == 0
    assert scheduler.running == scheduler.waiting == 0


def test_first_come_first_served():
    """With room for one after the other, requests end in the order of their arrival."""
    simulation = Simulation(40, max_batch_tokens=8, max_running_requests=4, reserve_tokens=40)
    for key in range(5):
        simulation.scheduler.add(sequence(key, 20, 10))
    while simulation.scheduler.running or simulation.scheduler.waiting:
        simulation.step()
    assert simulation.finished == [0, 1, 2, 3, 4]
    assert simulation.scheduler.preemptions == 0


def test_a_long_prompt_does_not_stall_a_stream():
    """Each step holds the running stream's token and one chunk of the long prompt."""
    scheduler = Scheduler(kv_tokens=1000, max_batch_tokens=16, max_running_requests=4)
    stream, long = sequence(0, 4, 50), sequence(1, 100, 5)
    scheduler.add(stream)
    scheduler.commit(scheduler.plan())
    stream.append(1)
    scheduler.add(long)
    for _ in range(6):
        plan = scheduler.plan()
        assert [(row.sequence.key, row.count) for row in plan.rows] == [(0, 1), (1, 15)]
        scheduler.commit(plan)
        stream.append(1)


def test_a_region_is_as_long_as_needed_at_first():
    """A request that sets no limit does not take the whole window; a short one takes its sum."""
    scheduler = Scheduler(
        kv_tokens=9000, max_batch_tokens=512, max_running_requests=4, reserve_tokens=256
    )
    scheduler.add(sequence(0, 100, 8000))
    scheduler.add(sequence(1, 100, 20))
    scheduler.plan()
    assert scheduler.kv_tokens_used == 100 + 256 + 100 + 20


def test_the_youngest_is_put_back_and_the_oldest_gets_on():
    """When the cache is full, the last to come waits with its tokens kept."""
    simulation = Simulation(60, max_batch_tokens=32, max_running_requests=4, reserve_tokens=5)
    old, young = sequence(0, 10, 45), sequence(1, 10, 45)
    simulation.scheduler.add(old)
    simulation.scheduler.add(young)
    computed = generated = 0
    while simulation.scheduler.running or simulation.scheduler.waiting:
        simulation.step()
        assert old.computed > computed, "the oldest lost its work or made none"
        assert young.generated >= generated, "sampled tokens were lost"
        computed, generated = old.computed, young.generated
        if simulation.finished:
            break
    assert simulation.scheduler.preemptions > 0
    while simulation.scheduler.running or simulation.scheduler.waiting:
        simulation.step()
    assert simulation.finished == [0, 1]


def test_what_can_never_fit_is_refused():
    """A sequence longer than the cache would wait for ever."""
    scheduler = Scheduler(kv_tokens=50, max_batch_tokens=16, max_running_requests=4)
    with pytest.raises(ValueError, match="never fit"):
        scheduler.add(sequence(0, 30, 21))
    scheduler.add(sequence(1, 30, 20))


def test_more_requests_than_a_step_holds_never_starve_a_stream():
    """The batch is never larger than a step, whatever is configured."""
    simulation = Simulation(1000, max_batch_tokens=4, max_running_requests=64, reserve_tokens=50)
    for key in range(12):
        simulation.scheduler.add(sequence(key, 3, 20))
    while simulation.scheduler.running or simulation.scheduler.waiting:
        simulation.step()
        assert simulation.scheduler.running <= 4
