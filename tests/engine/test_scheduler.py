"""The scheduler against a simulated cache: right contents, fair order, progress, no leak."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.cache.allocator import BLOCK_TOKENS
from serve_app.engine.scheduler import SCORED_TOKENS, SCORED_TOKENS_STREAMING, Scheduler
from serve_app.engine.sequence import SamplingPlan, Sequence
from serve_app.protocol import Priority

PLAN = SamplingPlan(
    temperature=0, top_p=1, top_k=0, seed=0, stop_token_ids=frozenset({-1})
)  # fmt: skip


def sequence(key: int, prompt: int, max_tokens: int) -> Sequence:
    return Sequence(key, [1] * prompt, prompt, max_tokens, PLAN)


class Simulation:
    """Does what the engine thread does; a list is the cache, an entry all ids up to it."""

    def __init__(self, kv_tokens: int, **settings: int) -> None:
        self.scheduler = Scheduler(kv_tokens=kv_tokens, **settings)
        self.max_batch_tokens = settings["max_batch_tokens"]
        self.cache: list[tuple[int, ...] | None] = [None] * kv_tokens
        self.finished: list[int] = []
        self.copied = 0

    def step(self) -> None:
        decoding = {s.key for s in self.scheduler._running.values() if s.missing == 1}
        plan = self.scheduler.plan()
        assert 0 < sum(row.count for row in plan.rows) <= self.max_batch_tokens
        for move in plan.moves:
            assert abs(move.source - move.target) >= move.length > 0
            assert move.source % BLOCK_TOKENS == move.target % BLOCK_TOKENS == 0
            part = self.cache[move.source : move.source + move.length]
            self.cache[move.target : move.target + move.length] = part
            self.copied += move.length
        planned = {row.sequence.key for row in plan.rows}
        if any(row.sequence.suspect for row in plan.rows):
            assert len(plan.rows) == 1
        else:
            assert decoding & set(self.scheduler._running) <= planned, "a stream was stalled"
        for row in plan.rows:
            tokens, region = row.sequence.tokens, row.sequence.region
            assert row.start == row.sequence.computed
            assert row.start + row.count <= region.length
            for token in range(row.start, row.start + row.count):
                self.cache[region.start + token] = tuple(tokens[: token + 1])
        for row in plan.rows:  # what attention would read
            start, end = row.sequence.region.start, row.start + row.count
            seen = self.cache[start : start + end]
            assert seen == [tuple(row.sequence.tokens[: token + 1]) for token in range(end)]
        waiting = list(self.scheduler._waiting)
        assert self.scheduler.waiting == len(waiting)
        oldest = min((s.key for s in waiting if s.suspect), default=None)
        assert getattr(self.scheduler._waiting.oldest_suspect(), "key", None) == oldest
        self.scheduler.commit(plan)
        for row in plan.rows:
            if row.kept and row.sequence.append(1 + row.sequence.key % 3) is not None:
                self.finished.append(row.sequence.key)
                assert self.scheduler.remove(row.sequence.key) is row.sequence

    def run(self) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            self.step()


def family(requests: list[tuple[int, int, int, bool]]) -> list[Sequence]:
    """Make sequences of few kinds of beginnings; some are completions of the one before."""
    made: list[Sequence] = []
    for key, (prompt, more, kind, child) in enumerate(requests):
        one = sequence(key, prompt, more)
        one.tokens = [kind] * (prompt // 2) + [kind % 2] * (prompt - prompt // 2)
        one.client = "ab"[kind % 2]
        one.priority = Priority(kind % 3)
        if child and made:
            one.parent, one.request = made[-1], made[-1].request
            one.client, one.priority = made[-1].client, made[-1].priority
            one.tokens, one.prompt_tokens = list(made[-1].tokens), made[-1].prompt_tokens
        made.append(one)
    return made


def disturb(scheduler: Scheduler, chance: random.Random, keys: int) -> int:
    """Cancel, break numbers or fail a step, at times; return how many sequences are gone."""
    gone = 0
    if chance.random() < 0.02:
        gone += scheduler.remove(chance.randrange(keys)) is not None
    if chance.random() < 0.01:
        scheduler.restart(isolate=chance.random() < 0.5)
    if chance.random() < 0.01 and scheduler._running:
        scheduler.discard(chance.choice(list(scheduler._running)))
        gone += 1
    return gone


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 140), st.integers(1, 100), st.integers(0, 3), st.booleans()),
        min_size=1,
        max_size=15,
    ),
    batch=st.integers(2, 48),
    chunk=st.integers(1, 48),
    running=st.integers(1, 8),
    reserve=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_scheduler_ends_every_request_with_its_own_keys(
    requests, batch, chunk, running, reserve, seed
):
    """Random arrivals, cancels, faults and common beginnings: right contents, ends, no leak."""
    chance = random.Random(seed)
    simulation = Simulation(
        320,
        max_batch_tokens=batch,
        max_running_requests=running,
        reserve_tokens=reserve,
        prefill_chunk_tokens=chunk,
    )
    scheduler = simulation.scheduler
    pending = family(requests)
    gone = 0
    for _ in range(20_000):
        if pending and (chance.random() < 0.3 or not (scheduler.running or scheduler.waiting)):
            scheduler.add(pending.pop(0))
        gone += disturb(scheduler, chance, len(requests))
        if scheduler.running or scheduler.waiting:
            simulation.step()
        elif not pending:
            break
    assert len(simulation.finished) + gone == len(requests)
    assert scheduler.cache.used_tokens == scheduler.running_tokens == scheduler.waiting_tokens == 0
    assert scheduler.running == scheduler.waiting == 0
    cached = scheduler.cache._cached.values()
    assert scheduler.cache.cached_tokens == sum(holding.region.length for holding in cached)
    scheduler.cache.clear()
    assert not scheduler.cache._holders
    assert scheduler.cache.place(320), "a region leaked"


def test_scheduler_is_first_come_first_served():
    """With room for one after the other, requests end in the order of their arrival."""
    simulation = Simulation(32, max_batch_tokens=8, max_running_requests=4, reserve_tokens=40)
    for key in range(5):
        simulation.scheduler.add(sequence(key, 20, 10))
    simulation.run()
    assert simulation.finished == [0, 1, 2, 3, 4]
    assert simulation.scheduler.preemptions == 0


def test_scheduler_does_not_stall_a_stream_for_a_long_prompt():
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


def test_scheduler_gives_at_first_a_region_as_long_as_needed():
    """A request that sets no limit does not take the whole window; a short one takes its sum."""
    scheduler = Scheduler(
        kv_tokens=9000, max_batch_tokens=512, max_running_requests=4, reserve_tokens=256
    )
    scheduler.add(sequence(0, 100, 8000))
    scheduler.add(sequence(1, 100, 20))
    scheduler.plan()
    assert scheduler.cache.used_tokens == 384 + 128  # whole blocks


def test_scheduler_puts_the_youngest_back_and_the_oldest_gets_on():
    """When the cache is full, the last to come waits with its tokens kept."""
    simulation = Simulation(192, max_batch_tokens=64, max_running_requests=4, reserve_tokens=5)
    old, young = sequence(0, 40, 140), sequence(1, 40, 140)
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
    simulation.run()
    assert simulation.finished == [0, 1]


def test_scheduler_refuses_what_can_never_fit():
    """A sequence longer than the cache would wait for ever."""
    scheduler = Scheduler(kv_tokens=70, max_batch_tokens=16, max_running_requests=4)
    with pytest.raises(ValueError, match="never fit"):
        scheduler.add(sequence(0, 30, 35))
    scheduler.add(sequence(1, 30, 34))


def test_scheduler_starves_no_stream_for_more_requests_than_a_step_holds():
    """The batch is never larger than a step, whatever is configured."""
    simulation = Simulation(1000, max_batch_tokens=4, max_running_requests=64, reserve_tokens=50)
    for key in range(12):
        simulation.scheduler.add(sequence(key, 3, 20))
    while simulation.scheduler.running or simulation.scheduler.waiting:
        simulation.step()
        assert simulation.scheduler.running <= 4


def spacious(**settings: int) -> Simulation:
    sizes = {"max_batch_tokens": 512, "max_running_requests": 8, "reserve_tokens": 32}
    return Simulation(4096, **{**sizes, **settings})


def test_scheduler_copies_a_prompt_seen_before_but_for_its_last_token():
    """Whole blocks come from the finished sequence; the counters say how many tokens."""
    simulation = spacious()
    simulation.scheduler.add(sequence(0, 100, 5))
    simulation.run()
    again = sequence(1, 96, 5)
    simulation.scheduler.add(again)
    assert simulation.scheduler.plan().rows[0].count == 96 - 64
    assert again.cached == simulation.scheduler.hit_tokens == 64
    assert simulation.scheduler.queried_tokens == 100 + 96


def test_scheduler_goes_on_in_place_with_a_conversation():
    """A prompt that continues all that is cached takes the region over and copies nothing."""
    simulation = spacious()
    first = sequence(0, 60, 40)
    simulation.scheduler.add(first)
    simulation.run()
    second = sequence(1, 100, 5)
    second.tokens = list(first.tokens)
    simulation.scheduler.add(second)
    simulation.run()
    assert second.cached == 96
    assert simulation.copied == 0
    assert simulation.scheduler.cache.cached_tokens == 96


def test_scheduler_shares_what_a_running_sequence_has_computed():
    """Nobody has to finish first."""
    simulation = spacious()
    long, short = sequence(0, 100, 500), sequence(1, 70, 5)
    simulation.scheduler.add(long)
    simulation.step()
    simulation.scheduler.add(short)
    simulation.step()
    assert short.cached == 64


def test_scheduler_computes_the_prompt_of_several_completions_once():
    """The others wait for the first one's prompt, then copy all but its last token."""
    simulation = spacious(max_batch_tokens=64)
    first = sequence(0, 150, 9)
    rest = [sequence(key, 150, 9) for key in (1, 2, 3)]
    for one in (first, *rest):
        one.parent = None if one is first else first
        simulation.scheduler.add(one)
    for _ in range(2):
        simulation.step()
        assert simulation.scheduler.running == 1
    simulation.step()
    plan = simulation.scheduler.plan()
    assert [row.count for row in plan.rows] == [1] * 4
    assert [move.length for move in plan.moves] == [149] * 3
    assert [one.cached for one in rest] == [149] * 3


def test_scheduler_does_not_let_completions_wait_for_a_first_one_that_is_gone():
    """Cancelling it leaves the others to compute the prompt themselves."""
    simulation = spacious(max_batch_tokens=64)
    first, second = sequence(0, 150, 9), sequence(1, 150, 9)
    second.parent = first
    for one in (first, second):
        simulation.scheduler.add(one)
    simulation.step()
    simulation.scheduler.remove(0)
    simulation.run()
    assert simulation.finished == [1]


def test_scheduler_never_lets_a_request_wait_for_what_is_cached():
    """A full cache of others' blocks goes for whoever needs the room."""
    simulation = spacious()
    for key in range(40):
        one = sequence(key, 400, 20)
        one.tokens = [key] * 400
        simulation.scheduler.add(one)
    simulation.run()
    assert simulation.scheduler.cache.cached_tokens > 3500
    big = sequence(99, 4000, 96)
    simulation.scheduler.add(big)
    simulation.step()
    assert big.region is not None
    assert simulation.scheduler.cache.cached_tokens == 0


def test_scheduler_reads_nothing_cached_where_every_logit_is_asked_for():
    """A request for the prompt's log probabilities computes all of it; others may use that."""
    simulation = spacious()
    for key in range(2):
        one = sequence(key, 100, 5)
        one.reuse = key == 0
        simulation.scheduler.add(one)
        simulation.run()
    assert one.cached == 0


def test_scheduler_forgets_broken_numbers():
    """What a sequence with NaN computed, or copied, is forgotten."""
    simulation = spacious()
    for key in range(2):
        simulation.scheduler.add(sequence(key, 100, 50))
        simulation.step()
    simulation.scheduler.remove(0)
    simulation.scheduler.discard(1)
    simulation.scheduler.add(third := sequence(2, 100, 5))
    simulation.run()
    assert third.cached == 0


def test_scheduler_runs_suspects_alone_oldest_first_after_a_restart():
    """Each is computed whole and samples once before the next one's turn; then all together."""
    simulation = spacious()
    for key in range(3):
        simulation.scheduler.add(sequence(key, 40, 50))
    simulation.step()
    simulation.scheduler.restart(isolate=True)
    simulation.scheduler.add(sequence(3, 40, 50))
    alone = []
    for _ in range(3):
        plan = simulation.scheduler.plan()
        alone.append([row.sequence.key for row in plan.rows])
        simulation.scheduler.commit(plan)
        plan.rows[0].sequence.append(1)
    assert alone == [[0], [1], [2]]
    together = simulation.scheduler.plan()
    assert {row.sequence.key for row in together.rows} == {0, 1, 2, 3}


def test_scheduler_shrinks_steps_to_a_floor_and_grows_them_again():
    """After memory ran out a step has half the tokens, then one more after each good step."""
    simulation = spacious(max_batch_tokens=64)
    assert simulation.scheduler.shrink()
    assert simulation.scheduler.shrink()
    assert not simulation.scheduler.shrink()
    simulation.scheduler.add(sequence(0, 500, 1))
    counts = []
    while simulation.scheduler.running or simulation.scheduler.waiting:
        plan = simulation.scheduler.plan()
        counts.append(plan.rows[0].count)
        simulation.scheduler.commit(plan)
        if plan.rows[0].kept:
            simulation.scheduler.remove(0)
    assert counts[:5] == [16, 17, 18, 19, 20]


def test_scheduler_cuts_prompts_short_while_anybody_streams():
    """The chunk counts all prompts of a step together; with nobody streaming it is off."""
    simulation = spacious(prefill_chunk_tokens=48)
    simulation.scheduler.add(sequence(0, 300, 50))
    plan = simulation.scheduler.plan()
    assert [row.count for row in plan.rows] == [300]
    simulation.scheduler.commit(plan)
    plan.rows[0].sequence.append(1)
    for key in (1, 2):
        one = sequence(key, 30, 50)
        one.tokens = [7 + key] * 30
        simulation.scheduler.add(one)
    assert [row.count for row in simulation.scheduler.plan().rows] == [1, 30, 18]


def of_request(request: int, keys: range, *, client: str = "", prompt: int = 20) -> list[Sequence]:
    """Make the completions of one request."""
    made: list[Sequence] = []
    for key in keys:
        one = sequence(key, prompt, 100)
        one.request, one.client = request, client
        one.tokens = [request] * prompt
        one.parent = made[0] if made else None
        made.append(one)
    return made


def test_scheduler_makes_room_for_another_among_many_completions_of_one_request():
    """It begins at the next step, though every place is taken; the others get on and end."""
    simulation = Simulation(4096, max_batch_tokens=64, max_running_requests=8)
    scheduler = simulation.scheduler
    for one in of_request(0, range(32)):
        scheduler.add(one)
    while scheduler.running < 8:
        simulation.step()
    late = sequence(32, 20, 10)
    scheduler.add(late)
    simulation.step()
    assert late.key in scheduler._running
    assert scheduler.running == 8
    assert scheduler.preemptions == 1
    simulation.run()
    assert sorted(simulation.finished) == list(range(33))
    assert simulation.finished[0] == 32
    assert scheduler.preemptions == 1  # what was put back waited its turn


def test_scheduler_gives_a_burst_of_one_client_no_more_than_its_share():
    """Twenty requests of one client and one of another: it runs at once, as one of two."""
    simulation = Simulation(4096, max_batch_tokens=64, max_running_requests=4)
    scheduler = simulation.scheduler
    for key in range(20):
        burst = sequence(key, 20, 50)
        burst.client = "burst"
        scheduler.add(burst)
    for _ in range(4):
        simulation.step()
    assert scheduler.running == 4
    for key in (20, 21, 22):
        other = sequence(key, 20, 50)
        other.client = "other"
        scheduler.add(other)
    simulation.step()
    running = [s.client for s in scheduler._running.values()]
    assert sorted(running) == ["burst", "burst", "other", "other"]
    simulation.run()
    assert len(simulation.finished) == 23


def test_scheduler_shares_room_in_the_cache_as_places():
    """Few long completions fill the cache: a short request of somebody else gets its part."""
    simulation = Simulation(512, max_batch_tokens=64, max_running_requests=8, reserve_tokens=100)
    scheduler = simulation.scheduler
    for one in of_request(0, range(4), prompt=32):
        scheduler.add(one)
    while scheduler.running < 3:
        simulation.step()
    late = sequence(9, 40, 60)
    scheduler.add(late)
    for _ in range(3):
        simulation.step()
    assert late.key in scheduler._running
    simulation.run()
    assert sorted(simulation.finished) == [0, 1, 2, 3, 9]


def test_scheduler_never_puts_back_one_completion_each_for_another():
    """Nobody has more than a share, so all wait their turn."""
    simulation = Simulation(4096, max_batch_tokens=64, max_running_requests=4)
    for key in range(12):
        simulation.scheduler.add(sequence(key, 20, 30))
    simulation.run()
    assert simulation.scheduler.preemptions == 0
    assert simulation.finished == sorted(simulation.finished)


def test_scheduler_lets_a_short_prompt_overtake_a_long_one():
    """It ends in the step's second half; the long one gets on with the first."""
    scheduler = Scheduler(kv_tokens=4096, max_batch_tokens=64, max_running_requests=8)
    long, short, also_long = sequence(0, 2000, 5), sequence(1, 30, 5), sequence(2, 500, 5)
    scheduler.add(long)
    scheduler.commit(scheduler.plan())
    scheduler.add(short)
    scheduler.add(also_long)
    plan = scheduler.plan()
    counts = {row.sequence.key: row.count for row in plan.rows}
    assert counts == {0: 34, 1: 30}
    scheduler.commit(plan)
    short.append(1)
    counts = {row.sequence.key: row.count for row in scheduler.plan().rows}
    assert counts == {0: 63, 1: 1}


def test_scheduler_counts_a_known_prompt_by_what_is_missing():
    """The next turn of a conversation is short, however long its beginning is."""
    scheduler = Scheduler(kv_tokens=8192, max_batch_tokens=64, max_running_requests=8)
    talk = sequence(0, 20 * BLOCK_TOKENS, 5)
    talk.tokens = [7] * len(talk.tokens)
    scheduler.add(talk)
    while talk.missing > 1:
        plan = scheduler.plan()
        scheduler.commit(plan)
        if plan.rows[0].kept:
            talk.append(3)
    scheduler.remove(0)
    scheduler.add(sequence(1, 2000, 5))
    scheduler.commit(scheduler.plan())
    again = sequence(2, 20 * BLOCK_TOKENS + 10, 5)
    again.tokens = [7] * len(again.tokens)
    scheduler.add(again)
    assert {row.sequence.key for row in scheduler.plan().rows} == {1, 2}


def test_scheduler_computes_scored_prompts_slowly_while_anybody_streams():
    """Each of their tokens takes a vocabulary; alone they go at full speed."""
    plan = replace(PLAN, prompt_logprobs=1)
    scheduler = Scheduler(kv_tokens=4096, max_batch_tokens=512, max_running_requests=8)
    for key in range(3):
        scheduler.add(Sequence(key, [1] * 600, 600, 5, plan))
    rows = scheduler.plan().rows
    assert sum(row.kept for row in rows) == SCORED_TOKENS
    stream = sequence(9, 1, 50)
    stream.client = "other"
    scheduler.add(stream)
    rows = scheduler.plan().rows
    scored = [row for row in rows if row.sequence.wants_scores]
    assert sum(row.kept for row in scored) == SCORED_TOKENS_STREAMING
    assert stream.key in {row.sequence.key for row in rows}


def test_scheduler_begins_nobody_while_a_suspect_finds_no_room():
    """Others would run beside it, or it would never run: it has its own step before they begin."""
    simulation = Simulation(160, max_batch_tokens=160, max_running_requests=4, reserve_tokens=4)
    scheduler = simulation.scheduler
    for key in range(2):
        scheduler.add(sequence(key, 60, 30))
    for _ in range(4):
        simulation.step()
    scheduler.restart(isolate=True)  # each wants 96 tokens now
    other = sequence(2, 20, 4)  # wants 32, and it is the turn of this client
    other.client = "other"
    scheduler.add(other)
    began = []
    while scheduler.running or scheduler.waiting:
        simulation.step()
        began += [key for key in scheduler._running if key not in began]
    assert began == [0, 1, 2]
    assert sorted(simulation.finished) == [0, 1, 2]


def of_class(priority: Priority, keys: range, *, prompt: int = 20, more: int = 40):
    """Make requests of one class, each with a prompt of its own."""
    made = [sequence(key, prompt, more) for key in keys]
    for one in made:
        one.priority = priority
        one.tokens = [one.key] * prompt
    return made


def test_scheduler_begins_a_higher_class_first():
    """Whoever came first, and whoever runs less."""
    simulation = Simulation(4096, max_batch_tokens=64, max_running_requests=1)
    for priority, key in ((Priority.LOW, 0), (Priority.NORMAL, 1), (Priority.HIGH, 2)):
        simulation.scheduler.add(of_class(priority, range(key, key + 1))[0])
    simulation.run()
    assert simulation.finished == [2, 1, 0]
    assert simulation.scheduler.preemptions == 0


def test_scheduler_gives_places_to_a_higher_class_and_fails_nobody():
    """The youngest of the lowest goes back with its tokens, and gets on when there is room."""
    simulation = Simulation(4096, max_batch_tokens=64, max_running_requests=4)
    scheduler = simulation.scheduler
    low, normal = of_class(Priority.LOW, range(2)), of_class(Priority.NORMAL, range(2, 4))
    for one in (*low, *normal):
        scheduler.add(one)
    while min(one.generated for one in low) < 5:
        simulation.step()
    high = of_class(Priority.HIGH, range(4, 7))
    for one in high:
        scheduler.add(one)
    kept = low[1].generated
    simulation.step()
    assert set(scheduler._running) == {2, 4, 5, 6}
    assert all(one.generated >= kept for one in low)
    simulation.run()
    assert sorted(simulation.finished) == list(range(7))
    assert simulation.finished.index(0) > simulation.finished.index(6)
    assert scheduler.preemptions == 3


def test_scheduler_puts_back_the_lowest_class_when_the_cache_is_full():
    """Though the higher one came later."""
    simulation = Simulation(192, max_batch_tokens=64, max_running_requests=4, reserve_tokens=5)
    (low,) = of_class(Priority.LOW, range(1), prompt=40, more=140)
    (high,) = of_class(Priority.HIGH, range(1, 2), prompt=40, more=140)
    simulation.scheduler.add(low)
    simulation.step()
    simulation.scheduler.add(high)
    simulation.run()
    assert simulation.finished == [1, 0]
    assert low.generated == 140
    assert simulation.scheduler.preemptions > 0


def test_scheduler_lets_a_burst_of_prompts_take_turns_with_another_client():
    """Its first prompt is next, though many came before; all that it sends have half."""
    simulation = Simulation(
        40_000, max_batch_tokens=256, max_running_requests=16, prefill_chunk_tokens=32
    )
    burst = of_class(Priority.NORMAL, range(16), prompt=1000, more=900)
    for one in burst:
        one.client = "burst"
        simulation.scheduler.add(one)
    while not burst[0].generated:
        simulation.step()

    def steps_of(key):
        (other,) = of_class(Priority.NORMAL, range(key, key + 1), prompt=100, more=1)
        other.client = "other"
        simulation.scheduler.add(other)
        count = 0
        while key not in simulation.finished:
            simulation.step()
            count += 1
        return count

    def known():
        return sum(min(one.computed, 1000) for one in burst)

    assert known() >= 1000
    assert steps_of(16) <= 5  # its prompt alone is four chunks
    before = known()
    steps = sum(steps_of(key) for key in range(17, 60))  # one after the other: it runs no more
    assert known() - before > 43 * 100 - 1500
    assert steps < 43 * 8 + 1
