"""The engine as its callers see it: streams, ends, faults, limits."""

import asyncio
import math
import threading
import time
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from serve_app.engine.drain import DrainRate
from serve_app.engine.model.native.forward import NativeForward
from serve_app.engine.model.runner import Runner
from serve_app.engine.sequence import Update
from serve_app.engine.stream import Stream
from serve_app.errors import (
    ContextLengthExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
    Overloaded,
)
from serve_app.protocol import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from tests.engine.conftest import (
    GREEDY,
    Reference,
    collect,
    drained,
    load_engine,
    random_prompts,
    run,
)
from tests.models import VOCAB, make_tokenizer

PROMPT = list(range(10, 30))
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
TOKENIZER = make_tokenizer()


async def begun(engine, sampling=LONG, request_id="r"):
    """Start a stream and return it after its first delta."""
    stream = engine.generate(GenerationRequest(request_id, TokenPrompt(tuple(PROMPT)), sampling))
    await anext(stream)
    return stream


async def test_generate_streams_text_to_one_end(engine):
    """Deltas join to the decoding of their ids, usage runs, only the last has a reason."""
    prompt = ChatPrompt(({"role": "user", "content": "Hello"},))
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    deltas = await collect(engine, GenerationRequest("r", prompt, sampling))
    ids = [token for delta in deltas for token in delta.token_ids]
    text = "".join(delta.text for delta in deltas)
    assert len(ids) == 30
    assert text == TOKENIZER.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
    counts = [delta.usage.completion_tokens for delta in deltas]
    assert counts == sorted(counts)
    assert counts[-1] == 30
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert len(deltas) > 1


async def test_generate_ends_at_eos_without_a_text(engine, model_dir):
    """Any id can be an end: it is counted and not shown; `ignore_eos` spares only the model's."""
    _, ids, reason, _ = await run(engine, PROMPT, LONG)
    assert reason is FinishReason.LENGTH
    end = next(token for token in ids[3:] if token not in ids[:3])
    at = ids.index(end)
    text, stopped, reason, usage = await run(
        engine,
        PROMPT,
        SamplingParams(temperature=0, max_tokens=400, stop_token_ids=frozenset({end})),
    )
    assert stopped == ids[: at + 1]
    assert reason is FinishReason.STOP
    assert usage.completion_tokens == at + 1
    expected = TOKENIZER.decode([*PROMPT, *ids[:at]], skip_special_tokens=True)
    assert expected.rstrip("\ufffd").endswith(text)
    assert text


async def test_generate_stops_before_a_stop_string_across_tokens(engine):
    """Any part of the text works as a stop string; ids after it are not counted."""
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    text, ids, _, _ = await run(engine, PROMPT, sampling)
    cuts = [n for n in range(3, len(text) - 4, 5) if "\ufffd" not in text[n : n + 4]]
    assert len(cuts) > 3
    for cut in cuts:
        stop = text[cut : cut + 4]
        stopping = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop=(stop,))
        shown, used, reason, usage = await run(engine, PROMPT, stopping)
        assert shown == text[: text.index(stop)]
        assert reason is FinishReason.STOP
        assert used == ids[: len(used)]
        assert usage.completion_tokens == len(used) < 60
    assert (await drained(engine)).kv_tokens_used == 0


async def test_generate_ends_the_work_at_a_stop_string(engine):
    """The sequence leaves the batch when its reader sees the end, not at its limit."""
    text, _, _, _ = await run(engine, PROMPT, SamplingParams(temperature=0, max_tokens=20))
    before = (await drained(engine)).generation_tokens
    await run(engine, PROMPT, SamplingParams(temperature=0, max_tokens=400, stop=(text[2:4],)))
    assert (await drained(engine)).generation_tokens - before < 100


async def test_generate_repeats_by_seed_whatever_runs_beside(engine):
    """The same seed gives the same ids alone and in a crowd; another seed gives others."""
    seeded = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=32, seed=11, ignore_eos=True)
    _, alone, _, _ = await run(engine, PROMPT, seeded)
    crowd = [
        run(engine, prompt, SamplingParams(temperature=1.1, max_tokens=20 + i, seed=i))
        for i, prompt in enumerate(random_prompts(12, VOCAB, seed=9))
    ]
    (_, beside, _, _), *_ = await asyncio.gather(run(engine, PROMPT, seeded), *crowd)
    assert beside == alone
    other = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=32, seed=12, ignore_eos=True)
    assert (await run(engine, PROMPT, other))[1] != alone


async def test_generate_without_a_seed_differs_each_time(engine):
    """Two unseeded requests draw their own noise."""
    hot = SamplingParams(temperature=1.5, max_tokens=32, ignore_eos=True)
    first, second = await asyncio.gather(run(engine, PROMPT, hot), run(engine, PROMPT, hot))
    assert first[1] != second[1]


async def test_generate_frees_its_place_when_the_iterator_is_closed(engine):
    """The region is free within a step, and the work stops."""
    stream = await begun(engine)
    assert engine.stats().running == 1
    steps = engine.stats().steps
    await stream.aclose()
    stats = await drained(engine)
    assert stats.kv_tokens_used == 0
    assert stats.steps - steps <= 50


async def test_generate_frees_its_place_when_the_reading_task_is_cancelled(engine):
    """A client that hangs up is a cancelled task."""
    task = asyncio.create_task(run(engine, PROMPT, LONG))
    while not engine.stats().running:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await drained(engine)).kv_tokens_used == 0


async def test_engine_keeps_nothing_of_a_thousand_random_cancels(load):
    """Waiting, prefilling or streaming: whatever is cancelled, no region stays."""
    engine = load(max_running_requests=16, max_batch_tokens=64, queued=2000)
    prompts = random_prompts(1000, VOCAB, longest=40, seed=1)
    finished = []

    async def some(index):
        stream = engine.generate(
            GenerationRequest(str(index), TokenPrompt(tuple(prompts[index])), GREEDY)
        )
        wanted = index * 7919 % 5
        async for _ in stream:
            wanted -= 1
            if wanted < 0:
                break
        else:
            finished.append(index)
        await stream.aclose()

    async def hasty(index):
        task = asyncio.create_task(some(index))
        await asyncio.sleep((index * 31 % 17) / 4000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for start in range(0, 1000, 100):
        await asyncio.gather(
            *(hasty(i) if i % 3 == 0 else some(i) for i in range(start, start + 100))
        )
    stats = await drained(engine)
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    assert not engine._streams
    assert (await run(engine, PROMPT))[1] == (await run(engine, PROMPT))[1]


async def test_engine_puts_back_and_loses_nothing_when_the_cache_is_full(model_dir):
    """Requests that outgrow a small cache are preempted and still equal `generate`."""
    engine = load_engine(
        model_dir("llama"), kv_cache_cpu_gib=800 * 960 / 2**30, max_context_tokens=400
    )
    try:
        assert engine.stats().kv_tokens_total == 800
        reference = Reference(model_dir("llama"))
        prompts = random_prompts(8, VOCAB, longest=30, seed=8)
        long = SamplingParams(temperature=0, max_tokens=330)
        results = await asyncio.gather(*(run(engine, prompt, long) for prompt in prompts))
        for prompt, (_, ids, _, _) in zip(prompts, results, strict=True):
            assert ids == reference.greedy(prompt, 330)
        assert engine.stats().preemptions > 0
    finally:
        engine.close()


async def test_engine_moves_a_completion_that_outgrows_its_place(load, model_dir):
    """Neighbours block growth in place; moved keys and values still equal `generate`."""
    engine = load(max_context_tokens=400)
    reference = Reference(model_dir("llama"))
    prompts = random_prompts(3, VOCAB, longest=30, seed=4)
    long = SamplingParams(temperature=0, max_tokens=330)
    moved = []
    move = NativeForward.move
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeForward, "move", lambda self, m: (moved.extend(m), move(self, m)))
        results = await asyncio.gather(*(run(engine, prompt, long) for prompt in prompts))
    for prompt, (_, ids, _, _) in zip(prompts, results, strict=True):
        assert ids == reference.greedy(prompt, 330)
    assert moved
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize(
    ("prompt", "sampling", "error"),
    [
        (TextPrompt(""), GREEDY, InvalidRequest),
        (TokenPrompt((VOCAB,)), GREEDY, InvalidRequest),
        (TokenPrompt((5,)), SamplingParams(top_p=0), InvalidRequest),
        (TokenPrompt((5,) * 512), GREEDY, ContextLengthExceeded),
        (TokenPrompt((5,)), SamplingParams(max_tokens=512), ContextLengthExceeded),
    ],
)
async def test_engine_refuses_a_bad_request_without_harm_to_others(engine, prompt, sampling, error):
    """It is refused before any work while a neighbour streams on."""
    stream = await begun(engine)
    with pytest.raises(error):
        await run(engine, prompt, sampling)
    assert engine.stats().waiting == 0
    assert await anext(stream)
    await stream.aclose()
    await drained(engine)


async def test_engine_takes_a_prompt_as_long_as_the_window_allows(engine):
    """511 tokens and one new one fit a window of 512."""
    _, ids, reason, _ = await run(engine, [7] * 511, SamplingParams(temperature=0))
    assert len(ids) == 1
    assert reason in {FinishReason.LENGTH, FinishReason.STOP}


async def test_engine_answers_overload_with_a_time(load):
    """Beyond the queue's bound a request is refused at once, and taken again when it drains."""
    engine = load(max_running_requests=2, queued=3)
    for _ in range(2):
        await run(engine, PROMPT)
    running = [await begun(engine), await begun(engine)]
    waiting = [asyncio.create_task(run(engine, PROMPT)) for _ in range(3)]
    while engine.stats().waiting < 3:
        await asyncio.sleep(0.001)
    with pytest.raises(Overloaded, match="3 waiting") as caught:
        await run(engine, PROMPT)
    assert caught.value.details["retry_after_s"] >= 1
    for stream in running:
        await stream.aclose()
    for task in waiting:
        assert len((await task)[1]) <= 16
    assert (await run(engine, PROMPT))[1]


async def test_engine_counts_few_long_requests_as_overload_too(load):
    """What waits is bounded in tokens; alone, a request of any size gets its turn."""
    engine = load(max_running_requests=1, queued=100, queued_tokens=600)
    long = SamplingParams(max_tokens=400, temperature=0)
    for _ in range(2):
        await run(engine, PROMPT)
    stream = await begun(engine)
    assert engine.stats().waiting == 0
    waiting = [asyncio.create_task(run(engine, PROMPT, long))]
    while engine.stats().waiting < 1:
        await asyncio.sleep(0.001)
    with pytest.raises(Overloaded, match="600 waiting tokens") as caught:
        await run(engine, PROMPT, replace(long, max_tokens=480))
    assert caught.value.details["retry_after_s"] >= 1
    waiting.append(asyncio.create_task(run(engine, PROMPT, replace(long, max_tokens=2))))
    await stream.aclose()
    await asyncio.gather(*waiting)
    assert (await run(engine, PROMPT, replace(long, max_tokens=480)))[1]


async def test_engine_does_not_count_a_burst_into_idleness_as_overload(load):
    """Free places in the batch do not count as a queue."""
    engine = load(max_running_requests=16, queued=1)
    results = await asyncio.gather(*(run(engine, PROMPT) for _ in range(16)))
    assert len({tuple(ids) for _, ids, _, _ in results}) == 1


async def test_engine_gives_the_room_of_cancelled_waiters_to_others(load):
    """A queue that was full and then left is not full."""
    engine = load(max_running_requests=1, queued=2)
    stream = await begun(engine)
    waiting = [asyncio.create_task(run(engine, PROMPT)) for _ in range(2)]
    while engine.stats().waiting < 2:
        await asyncio.sleep(0.001)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await stream.aclose()
    await drained(engine)
    assert (await run(engine, PROMPT))[1]


async def test_engine_ends_with_every_request_once_after_an_exception_in_a_step(load, monkeypatch):
    """Open requests fail with one error, later ones find it dead, nothing hangs.

    Those that it was computing may be at fault; the others may go elsewhere.
    """
    engine = load(max_running_requests=3)
    tasks = [asyncio.create_task(run(engine, PROMPT, LONG)) for _ in range(6)]
    while engine.stats().running < 3:
        await asyncio.sleep(0.001)

    def broken(self, plan):
        raise RuntimeError("secret detail of a kernel")

    monkeypatch.setattr(Runner, "step", broken)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert {type(result) for result in results} == {EngineError, EngineDead}
    assert all("secret" not in result.message for result in results)
    assert not await engine.ready()
    with pytest.raises(EngineDead) as caught:
        engine.check()
    assert caught.value.details["cause"] == "RuntimeError: secret detail of a kernel"
    assert "secret" not in caught.value.message
    with pytest.raises(EngineDead):
        await run(engine, PROMPT)
    engine.close()


async def test_engine_fails_a_row_of_nan_alone(load, monkeypatch):
    """One sequence's numbers break; its neighbours and the engine go on."""
    engine = load()
    _, expected, _, _ = await run(engine, PROMPT)
    forward = NativeForward.logits

    def poisoned(self, rows):
        logits = forward(self, rows)
        sampled = [row for row in rows if row.kept]
        for index, row in enumerate(sampled):
            if row.sequence.tokens[0] == 99 and row.sequence.generated == 3:
                logits[index] = math.nan
        return logits

    monkeypatch.setattr(NativeForward, "logits", poisoned)
    bad, *good = await asyncio.gather(
        run(engine, [99, *PROMPT]), *(run(engine, PROMPT) for _ in range(3)), return_exceptions=True
    )
    assert type(bad) is EngineError
    assert [ids for _, ids, _, _ in good] == [expected] * 3
    assert await engine.ready()
    assert (await drained(engine)).kv_tokens_used == 0


async def test_engine_close_ends_open_requests_and_the_thread(load):
    """Nothing hangs; closing again and asking again are safe."""
    engine = load()
    task = asyncio.create_task(run(engine, PROMPT, LONG))
    while not engine.stats().running:
        await asyncio.sleep(0.001)
    await asyncio.to_thread(engine.close)
    with pytest.raises(EngineError):
        await asyncio.wait_for(task, 5)
    engine.close()
    assert not engine.alive
    with pytest.raises(EngineDead):
        await run(engine, PROMPT)
    assert not [t for t in threading.enumerate() if t is engine._loop._thread]


async def test_engine_uses_no_cpu_when_idle(engine):
    """The thread sleeps in its queue: it takes no processor time at all."""
    await run(engine, PROMPT)
    await drained(engine)
    await asyncio.sleep(0.05)
    steps, before = engine.stats().steps, time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - before < 0.1
    assert engine.stats().steps == steps


async def test_engine_does_not_mix_equal_request_ids(engine):
    """Two requests under one id are two requests."""
    one, two = await asyncio.gather(run(engine, PROMPT), run(engine, PROMPT[::-1]))
    assert one[3].prompt_tokens == two[3].prompt_tokens == 20
    assert (await run(engine, PROMPT))[1] == one[1]
    assert (await run(engine, PROMPT[::-1]))[1] == two[1]


def test_engine_serves_readers_on_several_event_loops(engine):
    """Updates go to the loop that asked; a loop that is closed stops nobody."""
    results = {}

    def ask(name):
        results[name] = asyncio.run(run(engine, PROMPT))[1]

    def leave():
        loop = asyncio.new_event_loop()
        loop.run_until_complete(begun(engine))
        loop.close()

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
    threads.append(threading.Thread(target=leave))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 3
    assert results[0] == results[1] == results[2]
    asyncio.run(drained(engine))


async def test_engine_coalesces_deltas_for_a_slow_reader(engine):
    """What was ready together comes as one delta, with nothing lost."""
    _, expected, _, _ = await run(engine, PROMPT, LONG)
    stream = engine.generate(GenerationRequest("slow", TokenPrompt(tuple(PROMPT)), LONG))
    ids = []
    count = 0
    async for delta in stream:
        ids += delta.token_ids
        count += 1
        await asyncio.sleep(0.05)
    assert ids == expected
    assert count < 100


async def test_engine_stats_add_up(load):
    """Prompt and generation tokens are those of the requests."""
    engine = load()
    before = engine.stats()
    await asyncio.gather(
        *(run(engine, [5] * 30, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
          for _ in range(4))
    )  # fmt: skip
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == 120
    assert after.generation_tokens - before.generation_tokens == 40
    assert after.steps - before.steps >= 10


@pytest.mark.parametrize("fraction", [0.25, 2.0])
async def test_engine_time_to_retry_follows_the_drain_rate(load, monkeypatch, fraction):
    """Waiting requests over requests finished per second, rounded up, at least 1."""
    engine = load(max_running_requests=1, queued=1)
    stream = await begun(engine)
    waiting = asyncio.create_task(run(engine, PROMPT))
    while engine.stats().waiting < 1:
        await asyncio.sleep(0.001)
    monkeypatch.setattr(engine._loop, "drain_rate", lambda: DrainRate(fraction, 1e9))
    with pytest.raises(Overloaded) as caught:
        await run(engine, PROMPT)
    assert caught.value.details["retry_after_s"] == max(1, math.ceil(1 / fraction))
    await stream.aclose()
    await waiting


async def test_stream_deltas_wait_their_turn_and_ends_do_not():
    """What comes before a stream's turn goes along with the next delta; the last never waits."""
    stream = Stream(asyncio.get_running_loop(), lambda: 0.05)
    started = time.monotonic()
    stream.push(Update(1, 5))
    assert await stream.updates() == [Update(1, 5)]
    assert time.monotonic() - started < 0.04, "the first one waited"
    stream.push(Update(1, 6))
    asyncio.get_running_loop().call_later(0.01, stream.push, Update(1, 7))
    assert await stream.updates() == [Update(1, 6), Update(1, 7)]
    assert time.monotonic() - started >= 0.05
    last = Update(1, 8, FinishReason.LENGTH)
    asked = time.monotonic()
    stream.push(last)
    assert await stream.updates() == [last]
    assert time.monotonic() - asked < 0.04, "the last one waited"


async def test_stream_waits_with_one_timer(monkeypatch):
    """However many tokens come before a stream's turn: 256 streams of a fast device are a crowd."""
    loop, timers = asyncio.get_running_loop(), []
    real = loop.call_at
    monkeypatch.setattr(loop, "call_at", lambda *args: timers.append(args) or real(*args))
    stream = Stream(loop, lambda: 0.05)
    stream.push(Update(1, 5))
    await stream.updates()
    for token in range(6, 9):
        stream.push(Update(1, token))
    assert [update.token for update in await stream.updates()] == [6, 7, 8]
    assert len(timers) == 1
    stream.push(Update(1, 9))  # and for the next turn there is another
    assert [update.token for update in await stream.updates()] == [9]
    assert len(timers) == 2


async def choices(engine, n, sampling, prompt=PROMPT):
    """Return each completion's ids and last delta, by index; each ends once."""
    request = GenerationRequest("r", TokenPrompt(tuple(prompt)), sampling, n=n)
    ids = {index: [] for index in range(n)}
    last = {}
    for delta in await collect(engine, request):
        assert delta.index not in last, "a delta after the end"
        ids[delta.index] += delta.token_ids
        if delta.finish_reason is not None:
            last[delta.index] = delta
    assert sorted(last) == list(range(n))
    return ids, last


@pytest.mark.parametrize("prefix_cache", [True, False])
async def test_completions_of_a_seeded_request_are_those_of_its_seeds(load, prefix_cache):
    """Completion i is what a request with seed + i gets; the prompt is computed once."""
    engine = load(prefix_cache=prefix_cache)
    prompt = random_prompts(1, VOCAB, seed=4)[0] * 3
    sampling = SamplingParams(temperature=1.2, seed=2**64 - 2, max_tokens=20, ignore_eos=True)
    before = engine.stats().prompt_tokens
    ids, last = await choices(engine, 4, sampling, prompt)
    assert engine.stats().prompt_tokens - before == len(prompt) + 3
    for index in range(4):
        seeded = replace(sampling, seed=(2**64 - 2 + index) % 2**64)
        assert ids[index] == (await run(engine, prompt, seeded))[1]
        assert last[index].usage.completion_tokens == 20
        assert last[index].usage.cached_tokens == 0
    assert len({tuple(some) for some in ids.values()}) == 4


async def test_completions_count_against_the_limits_one_by_one(load):
    """More than there can ever be are refused, more than there is room for have to wait."""
    engine = load(max_running_requests=2, queued=2)
    with pytest.raises(InvalidRequest) as caught:
        await choices(engine, 5, GREEDY)
    assert caught.value.param == "n"
    await choices(engine, 4, GREEDY)
    stream = await begun(engine)
    with pytest.raises(Overloaded):
        await choices(engine, 4, GREEDY)
    await stream.aclose()


async def test_completions_all_end_when_the_reader_leaves(engine):
    """Closing the iterator frees every one of them."""
    request = GenerationRequest("r", TokenPrompt(tuple(PROMPT)), LONG, n=5)
    stream = engine.generate(request)
    await anext(stream)
    await stream.aclose()
    assert (await drained(engine)).kv_tokens_used == 0
    assert not engine._streams


async def test_completions_error_is_the_requests(load, monkeypatch):
    """It comes once, as the end; the others leave the batch."""
    engine = load()
    forward = NativeForward.logits

    def poisoned(self, rows):
        logits = forward(self, rows)
        for index, row in enumerate(row for row in rows if row.kept):
            if row.sequence.generated == 3 and row.sequence.key % 3 == 2:
                logits[index] = math.nan
        return logits

    monkeypatch.setattr(NativeForward, "logits", poisoned)
    with pytest.raises(EngineError):
        await choices(engine, 3, LONG)
    assert (await drained(engine)).kv_tokens_used == 0
    assert not engine._streams


async def test_usage_counts_what_was_cached(load):
    """Whole blocks of an equal prompt, on every delta; nothing where all logits are asked for."""
    engine = load()
    prompt = random_prompts(1, VOCAB, seed=4)[0] * 3
    results = [await run(engine, prompt) for _ in range(2)]
    assert results[0][1] == results[1][1]
    whole = (len(prompt) - 1) // 32 * 32
    assert [usage.cached_tokens for *_, usage in results] == [0, whole]
    stats = engine.stats()
    assert stats.prefix_cache_hits == whole
    assert stats.kv_tokens_cached >= whole
    usage = (await run(engine, prompt, replace(GREEDY, prompt_logprobs=0)))[3]
    assert usage.cached_tokens == 0


async def test_timing_adds_up_to_the_whole(load):
    """Queue, prefill and decode are what the client waited for; decode grows with tokens."""
    engine = load(max_running_requests=1)
    first = asyncio.create_task(run(engine, PROMPT, LONG))
    await asyncio.sleep(0)
    started = time.monotonic()
    request = GenerationRequest("r", TokenPrompt(tuple(PROMPT)), LONG)
    deltas = await collect(engine, request)
    elapsed = time.monotonic() - started
    await first
    timings = [delta.timing for delta in deltas]
    last = timings[-1]
    assert 0.8 * elapsed < last.queue_s + last.prefill_s + last.decode_s <= elapsed
    assert last.queue_s > last.prefill_s > 0
    assert {timing.queue_s for timing in timings} == {last.queue_s}
    assert [t.decode_s for t in timings] == sorted(t.decode_s for t in timings)


async def test_engine_fails_a_request_that_breaks_a_step_alone(load, monkeypatch):
    """The engine finds it, and its neighbours' tokens are what they would have been."""
    engine = load()
    _, expected, _, _ = await run(engine, PROMPT, LONG)
    forward = NativeForward.logits

    def broken(self, rows):
        for row in rows:
            if row.sequence.tokens[0] == 99 and row.sequence.generated == 5:
                raise RuntimeError("a kernel")
        return forward(self, rows)

    monkeypatch.setattr(NativeForward, "logits", broken)
    bad, *good = await asyncio.gather(
        run(engine, [99, *PROMPT], LONG),
        *(run(engine, PROMPT, LONG) for _ in range(3)),
        return_exceptions=True,
    )
    assert type(bad) is EngineError
    assert [ids for _, ids, _, _ in good] == [expected] * 3
    assert await engine.ready()


async def test_engine_leaks_nothing_over_300_mixed_requests(load):
    """Clients that leave, several completions, small cache: all comes back."""
    engine = load(kv_cache_cpu_gib=0.0006, max_running_requests=8, queued=400)
    prompts = random_prompts(150, VOCAB, seed=8)
    prompts = [prompts[0] + some for some in prompts]

    async def ask(index):
        sampling = SamplingParams(temperature=index % 2, max_tokens=1 + index % 30)
        request = GenerationRequest("r", TokenPrompt(tuple(prompts[index])), sampling, n=2)
        stream = engine.generate(request)
        async for _ in stream:
            if index % 5 == 0:
                break
        await stream.aclose()

    await asyncio.gather(*(ask(index) for index in range(150)))
    stats = await drained(engine)
    assert stats.kv_tokens_used == stats.running_tokens == stats.waiting_tokens == 0
    assert stats.prefix_cache_hits > 0
    assert not engine._streams


async def test_engine_ends_with_every_request_when_a_step_hangs(load, monkeypatch):
    """A forward that sleeps is noticed within the limit; the log says what it was doing."""
    engine = load(step_timeout_s=0.5)
    assert await engine.ready()
    compute = engine._loop._runner._forward.logits
    asleep = threading.Event()

    def sleeping(rows):
        if len(rows) > 1:
            asleep.wait(20)
        return compute(rows)

    monkeypatch.setattr(engine._loop._runner._forward, "logits", sleeping)
    started = time.monotonic()
    with capture_logs() as logs:
        answers = await asyncio.gather(
            *(run(engine, [5, 6, 7 + n]) for n in range(4)), return_exceptions=True
        )
    assert time.monotonic() - started < 10
    assert {type(answer) for answer in answers} == {EngineDead}
    assert not await engine.ready()
    with pytest.raises(EngineDead, match="internal error"):
        engine.check()
    (line,) = [line for line in logs if line["event"] == "engine.hung"]
    assert (line["phase"], line["rows"]) == ("compute", 4)
    assert "asleep.wait(20)" in line["stack"]
    started = time.monotonic()
    engine.close()  # does not wait for a thread that does not come back
    assert time.monotonic() - started < 5
    asleep.set()
