"""Long texts cost their sender: a few at a time, refused by length, never the event loop."""

import asyncio
import threading
import time

import pytest

from serve_app.engine.text import text_work
from serve_app.engine.text.text_work import TextLimit, TextWork
from serve_app.errors import ContextLengthExceeded, EngineDead, InvalidRequest, Overloaded
from serve_app.protocol import ChatPrompt, SamplingParams, TextPrompt
from tests.engine.conftest import GREEDY, run
from tests.models import make_tokenizer

BACKEND = make_tokenizer().backend_tokenizer
LONG = text_work.INLINE_CHARS + 1


async def test_text_work_runs_a_few_at_a_time():
    """As many as there are threads; the others wait their turn."""
    work = TextWork()
    running, most = 0, 0
    lock = threading.Lock()

    def busy():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1

    await asyncio.gather(*(work.run(LONG, busy) for _ in range(8)))
    assert most == text_work.THREADS
    work.close()


async def test_text_work_bounds_what_waits(monkeypatch):
    """More is asked to come back; when the line is empty, any size gets its turn."""
    monkeypatch.setattr(text_work, "MAX_PENDING_CHARS", 3 * LONG)
    work = TextWork()
    go = threading.Event()
    waiting = [asyncio.create_task(work.run(LONG, go.wait, 10)) for _ in range(3)]
    await asyncio.sleep(0.05)
    with pytest.raises(Overloaded) as refused:
        await work.run(LONG, go.wait)
    assert refused.value.details["retry_after_s"]
    assert await work.run(5, lambda: "short") == "short"
    go.set()
    await asyncio.gather(*waiting)
    assert await work.run(100 * LONG, lambda: "alone") == "alone"
    work.close()


async def test_text_work_ends_what_waits_when_closed():
    """Another replica may have it: nothing of it was begun. What runs is not cut off."""
    work = TextWork()
    go = threading.Event()
    tasks = [asyncio.create_task(work.run(LONG, go.wait, 10)) for _ in range(3)]
    await asyncio.sleep(0.05)
    work.close()
    go.set()
    *ran, waited = await asyncio.gather(*tasks, return_exceptions=True)
    assert ran == [True, True]
    with pytest.raises(EngineDead) as late:
        await work.run(LONG, go.wait)
    for dead in (waited, late.value):
        assert dead.details["untouched"]


async def test_text_work_does_not_count_cancelled_and_failed_work(monkeypatch):
    """Whether it had begun or not."""
    monkeypatch.setattr(text_work, "MAX_PENDING_CHARS", 4 * LONG)
    work = TextWork()
    go = threading.Event()
    tasks = [asyncio.create_task(work.run(LONG, go.wait, 10)) for _ in range(4)]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    go.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    with pytest.raises(ZeroDivisionError):
        await work.run(LONG, lambda: 1 / 0)
    async with asyncio.timeout(5):
        while work._pending:
            await asyncio.sleep(0.01)
    work.close()


def test_require_length():
    """Characters that no window of the longest tokens could hold; one less passes."""
    limit = TextLimit(BACKEND, 10)
    longest = max(map(len, BACKEND.get_vocab()))
    factor = 1 if BACKEND.normalizer is None else 4
    limit.require_length(10 * longest * factor, param="prompt")
    with pytest.raises(
        ContextLengthExceeded, match=r"characters, more than so many tokens"
    ) as error:
        limit.require_length(10 * longest * factor + 1, param="messages")
    assert error.value.param == "messages"


def test_require_tokens_stops_at_the_first_pieces():
    """However long the text is, little more than a window of it is encoded."""
    pieces = []

    class Counting:
        normalizer = BACKEND.normalizer
        get_vocab = BACKEND.get_vocab

        def encode_batch_fast(self, texts, **options):
            pieces.append(len(texts[0]))
            return BACKEND.encode_batch_fast(texts, **options)

    limit = TextLimit(Counting(), 5000)
    with pytest.raises(ContextLengthExceeded, match=r"the first .* of the"):
        limit.require_tokens("word " * 400_000, param="prompt")
    assert sum(pieces) < 5 * text_work.PIECE_CHARS
    limit.require_tokens("short", param="prompt")


@pytest.mark.parametrize("text", ["word ", "x", "  ", "\n", "é ", "日本語"])
def test_require_tokens_never_refuses_what_fits(text):
    """The cuts between pieces may add tokens; they are not counted."""
    long = text * (3 * text_work.PIECE_CHARS // len(text))
    (encoding,) = BACKEND.encode_batch_fast([long], add_special_tokens=False)
    TextLimit(BACKEND, len(encoding)).require_tokens(long, param="prompt")


@pytest.mark.timed
@pytest.mark.parametrize(
    "prompt",
    [
        TextPrompt("word " * 400_000),
        TextPrompt("a" * 2_000_000),
        ChatPrompt(tuple({"role": "user", "content": "hi"} for _ in range(70_000))),
    ],
    ids=["words", "one word", "messages"],
)
async def test_text_work_far_over_the_window_costs_its_neighbours_nothing(engine, prompt):
    """Many at once: each is refused, and no stream stands still for it."""
    gaps = []
    last = time.monotonic()

    async def beat():
        nonlocal last
        while True:
            await asyncio.sleep(0.001)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    heart = asyncio.create_task(beat())
    answers = await asyncio.gather(
        *(run(engine, prompt, GREEDY, f"r{number}") for number in range(4)),
        run(engine, [5, 6, 7], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)),
        return_exceptions=True,
    )
    heart.cancel()
    refused = [answer for answer in answers[:-1] if not isinstance(answer, Overloaded)]
    assert refused
    for answer in refused:  # on a busy machine the template's time may be up before its length
        is_slow = isinstance(answer, InvalidRequest) and "takes too long" in answer.message
        assert is_slow or isinstance(answer, ContextLengthExceeded), answer
    assert len(answers[-1][1]) == 50
    # To count four times 70,000 messages takes 0.6 s, and the machine is shared; to render them
    # takes tens of seconds.
    assert max(gaps) < 4


async def test_text_work_limits_tokenize_too(engine, monkeypatch):
    """A text that fits nothing is refused, a full line is a 429, ids of any number are read."""
    with pytest.raises(ContextLengthExceeded):
        await engine.tokenize(TextPrompt("a" * 2_000_000))
    monkeypatch.setattr(text_work, "MAX_PENDING_CHARS", 1)
    results = await asyncio.gather(
        *(engine.tokenize(TextPrompt("word " * 2000)) for _ in range(3)), return_exceptions=True
    )
    assert sum(isinstance(result, Overloaded) for result in results) == 2
    ids = tuple([10, 11, 12] * 20_000)
    text = await engine.detokenize(ids)
    assert (await engine.tokenize(TextPrompt("word"))).token_ids
    assert text == "".join([await engine.detokenize((10, 11, 12))] * 20_000)
