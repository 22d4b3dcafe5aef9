"""What holds for every implementation of the protocol, a model behind it or not."""

import asyncio

import pytest

from serve_app.errors import InvalidRequest
from serve_app.protocol import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from tests.engine.conftest import collect

IDS = tuple(range(10, 30))
PROMPTS = [
    TokenPrompt(IDS),
    TextPrompt("Hello, how are you"),
    ChatPrompt(({"role": "user", "content": "Hello"},)),
]
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize("prompt", PROMPTS, ids=["ids", "text", "chat"])
async def test_generate_has_one_end_and_running_totals(any_engine, prompt):
    """Only the last delta has a reason; usage counts what came."""
    deltas = await collect(any_engine, GenerationRequest("r", prompt, SHORT))
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert isinstance(deltas[-1].finish_reason, FinishReason)
    counts = [d.usage.completion_tokens for d in deltas]
    assert counts == sorted(counts)
    assert counts[-1] == sum(len(d.token_ids) for d in deltas)
    assert {d.usage.prompt_tokens for d in deltas} == {deltas[0].usage.prompt_tokens}
    assert all(d.usage.cached_tokens <= d.usage.prompt_tokens for d in deltas)


async def test_generate_ends_n_completions_once_each(any_engine):
    """Each index has its own end; the iterator ends with the last."""
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=6)
    deltas = await collect(any_engine, GenerationRequest("r", PROMPTS[0], sampling, n=3))
    ends = [d.index for d in deltas if d.finish_reason is not None]
    assert sorted(ends) in ([0, 1, 2], [2])  # the double ends all of them at once
    assert {d.index for d in deltas} == {0, 1, 2}
    assert deltas[-1].finish_reason is not None


async def test_generate_gives_logprobs_with_their_tokens(any_engine):
    """One for each id, as many alternatives as were asked for, and for the prompt likewise."""
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2)
    deltas = await collect(any_engine, GenerationRequest("r", PROMPTS[0], sampling))
    for delta in deltas:
        assert len(delta.logprobs) == len(delta.token_ids)
        for token, found in zip(delta.token_ids, delta.logprobs, strict=True):
            assert found.chosen.token_id == token
            assert found.chosen.logprob <= 0
            assert len(found.top) == 3
    prompt = [found for delta in deltas for found in delta.prompt_logprobs]
    assert prompt[0].chosen is None
    assert [found.chosen.token_id for found in prompt[1:]] == list(IDS[1:])
    assert all(len(found.top) == 2 for found in prompt[1:])
    plain = await collect(any_engine, GenerationRequest("r", PROMPTS[0], SHORT))
    assert not any(delta.logprobs or delta.prompt_logprobs for delta in plain)


async def test_generate_reports_the_prompts_ids_once(any_engine):
    """On the first delta, where they were asked for."""
    sampling = SamplingParams(temperature=0, max_tokens=4, return_prompt_ids=True)
    deltas = await collect(any_engine, GenerationRequest("r", PROMPTS[0], sampling))
    assert deltas[0].prompt_token_ids
    assert not any(delta.prompt_token_ids for delta in deltas[1:])


async def test_tokenize_without_generating(any_engine):
    """Ids of a prompt, text of ids, the vocabulary's words, the tokenizer's settings."""
    tokens = await any_engine.tokenize(PROMPTS[0])
    assert tokens.token_ids == IDS
    assert tokens.max_context_tokens == 512
    assert await any_engine.detokenize((10, 11))
    assert len(await any_engine.token_strings((10, 11))) == 2
    assert "chat_template" in await any_engine.tokenizer_info()
    assert await any_engine.ready()


async def test_generate_is_cancelled_by_closing(any_engine):
    """A reader that leaves early is no error, and the engine answers the next one."""
    stream = any_engine.generate(GenerationRequest("r", PROMPTS[0], SHORT))
    await anext(stream)
    await stream.aclose()
    results = await asyncio.gather(
        *(collect(any_engine, GenerationRequest(f"r{i}", PROMPTS[0], SHORT)) for i in range(3))
    )
    assert all(deltas[-1].finish_reason is not None for deltas in results)


async def test_generate_refuses_before_any_delta(running, kind):
    """And names the parameter."""
    engine = running(kind)
    for sampling, param in (
        (SamplingParams(top_p=0), "top_p"),
        (SamplingParams(logprobs=21), "logprobs"),
        (SamplingParams(stop=("",)), "stop"),
        (SamplingParams(logit_bias=((9999, 1.0),)), "logit_bias"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await collect(engine, GenerationRequest("r", PROMPTS[0], sampling))
        assert caught.value.param == param
