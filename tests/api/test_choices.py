"""Choices run side by side, merge what is ready, and leave nothing behind."""

import asyncio

import pytest

from serve_app.api.choices import Choices, Piece
from serve_app.errors import EngineError, Overloaded, RequestCancelled
from serve_app.protocol import FinishReason, GenerationRequest, TextPrompt, Usage
from tests.fakes import FakeEngine, Pause


def asked(count, n=1):
    return [GenerationRequest(f"r{index}", TextPrompt("a"), n=n) for index in range(count)]


async def drain(choices):
    batches = []
    while pieces := await choices.next():
        batches.append(pieces)
    return batches


async def test_choices_merge_deltas_that_are_ready_together():
    """Three deltas without a pause come as one text."""
    async with Choices(FakeEngine(["a", "b", "c"]), asked(1)) as choices:
        assert await drain(choices) == [[Piece(0, "abc", FinishReason.STOP, token_ids=(1, 2, 3))]]


async def test_choices_pass_deltas_with_time_between_as_they_are():
    """Nothing is held back for the sake of merging."""
    engine = FakeEngine(["a", Pause(0.01), "b"])
    async with Choices(engine, asked(1)) as choices:
        a = Piece(0, "a", token_ids=(1,))
        b = Piece(0, "b", FinishReason.STOP, token_ids=(2,))
        assert await drain(choices) == [[a], [b]]


async def test_choices_run_at_the_same_time():
    """Each waits for all others, which only works if none waits for its turn."""
    together = asyncio.Barrier(3)

    class Meeting(FakeEngine):
        async def generate(self, request):
            await together.wait()
            async for delta in super().generate(request):
                yield delta

    async with Choices(Meeting(["a"]), asked(3)) as choices:
        batches = await asyncio.wait_for(drain(choices), 5)
    assert sorted(piece.index for batch in batches for piece in batch) == [0, 1, 2]


async def test_choices_count_a_prompt_once_and_all_completions():
    """Usage of two prompts with two choices each."""
    async with Choices(FakeEngine(["a", "b"], prompt_tokens=7), asked(2, n=2)) as choices:
        await drain(choices)
        assert choices.usage == Usage(prompt_tokens=14, completion_tokens=8, cached_tokens=4)


async def test_choices_are_made_of_each_completion_of_a_request():
    """Choice `prompt * n + i`, as OpenAI numbers them, each with its own end."""
    async with Choices(FakeEngine(["a", Pause(0.001), "b"]), asked(2, n=3)) as choices:
        pieces = [piece for batch in await drain(choices) for piece in batch]
    texts = {}
    for piece in pieces:
        texts[piece.index] = texts.get(piece.index, "") + piece.text
    assert texts == dict.fromkeys(range(6), "ab")
    assert sorted(piece.index for piece in pieces if piece.finish_reason) == list(range(6))


async def test_choices_take_an_end_before_the_last_completions_end_as_an_error():
    """One finished completion of two does not look like a finished answer."""

    class Half(FakeEngine):
        async def generate(self, request):
            async for delta in super().generate(request):
                if delta.index == 0:
                    yield delta

    async with Choices(Half(["a"]), asked(1, n=2)) as choices:
        with pytest.raises(EngineError):
            await drain(choices)


async def test_choices_show_nothing_that_was_not_asked_for():
    """With `prompt_only`, text, tokens and their count stay away; the end is a length's."""
    async with Choices(FakeEngine(["a", "b"]), asked(1), prompt_only=True) as choices:
        assert await drain(choices) == [[Piece(0, "", FinishReason.LENGTH)]]
        assert choices.usage == Usage(prompt_tokens=5, completion_tokens=0, cached_tokens=2)


async def test_choices_all_end_with_the_first_error():
    """One refused choice refuses the request, and the running ones are let go."""
    engine = FakeEngine(
        lambda request: [Overloaded("full")] if request.request_id == "r1" else ["a", Pause(), "b"]
    )
    with pytest.raises(Overloaded):
        async with Choices(engine, asked(3)) as choices:
            await drain(choices)
    assert not engine.running
    assert sorted(engine.closed_early) == ["r0", "r2"]


async def test_choices_close_every_generation_when_left_early():
    """Whoever stops reading frees the engine at once."""
    engine = FakeEngine(["a", Pause(), "b"])
    async with Choices(engine, asked(2)) as choices:
        await choices.next()
        assert len(engine.running) == 2
    assert not engine.running
    assert len(engine.closed_early) == 2


async def test_choices_take_an_end_without_a_reason_as_an_error():
    """An engine that just stops does not look like a finished answer."""
    async with Choices(FakeEngine(["a"], finish_reason=None), asked(1)) as choices:
        with pytest.raises(EngineError):
            await drain(choices)


async def test_choices_do_not_hang_when_a_generation_is_cancelled_from_inside():
    """A cancelled reader is reported as an error instead of being waited for."""
    async with Choices(FakeEngine([asyncio.CancelledError()]), asked(1)) as choices:
        with pytest.raises(RequestCancelled):
            await asyncio.wait_for(choices.next(), 5)


async def test_choices_need_no_aclose_of_an_iterator():
    """The protocol asks for an async iterator, not for a generator."""

    class Plain(FakeEngine):
        def generate(self, request):
            inner = super().generate(request)

            class Iterator:
                def __aiter__(self):
                    return self

                async def __anext__(self):
                    return await anext(inner)

            return Iterator()

    async with Choices(Plain(["a"]), asked(1)) as choices:
        assert await drain(choices) == [[Piece(0, "a", FinishReason.STOP, token_ids=(1,))]]


async def test_choices_close_a_finished_generation_too():
    """Its iterator is closed by us, not some day by the garbage collector."""
    kept = []

    class Kept(FakeEngine):
        def generate(self, request):
            kept.append(super().generate(request))
            return kept[-1]

    engine = Kept(["a"])
    async with Choices(engine, asked(1)) as choices:
        await drain(choices)
    assert not engine.running
    assert len(kept) == 1
