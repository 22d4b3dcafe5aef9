"""What engines with a model answer: the same ids and texts, whoever computes them."""

import asyncio
import json
import re
from dataclasses import replace

import jsonschema
import pytest

from serve_app.errors import ContextLengthExceeded, InvalidRequest
from serve_app.protocol import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Structure,
    TextPrompt,
    TokenPrompt,
)
from tests.engine.conftest import GREEDY, Reference, collect, random_prompts, run
from tests.models import START, VOCAB

PROMPT = list(range(10, 30))
FREE = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def reference(directory):
    """Transformers' own answers."""
    return Reference(directory)


async def test_greedy_ids_are_those_of_generate(model_engine, reference):
    """A batch of mixed lengths, in float32."""
    prompts = random_prompts(12, VOCAB, longest=120)
    answers = await asyncio.gather(*(run(model_engine, prompt) for prompt in prompts))
    for prompt, (_, ids, _, _) in zip(prompts, answers, strict=True):
        expected = reference.greedy(prompt, GREEDY.max_tokens)
        assert ids == expected


async def test_text_is_that_of_the_builtin_engine(running, model_engine):
    """Deltas are cut elsewhere, the whole is the same; so is a chat's."""
    for prompt in (
        PROMPT,
        TextPrompt("Hello, how are"),
        ChatPrompt(({"role": "user", "content": "你好 😀"},)),
    ):
        assert await run(model_engine, prompt, FREE) == await run(running("builtin"), prompt, FREE)


async def test_stop_strings_and_ids_end_at_the_same_place(running, model_engine):
    """Across tokens, shown or not; a special token's name; an id that is counted."""
    text, ids, _, _ = await run(model_engine, PROMPT, FREE)
    end = next(token for token in ids[3:] if token not in ids[:3])
    cut = next(n for n in range(4, len(text) - 4) if "\ufffd" not in text[n : n + 3])
    for changes in (
        {"stop": (text[cut : cut + 3],)},
        {"stop": (text[cut : cut + 3],), "include_stop": True},
        {"stop_token_ids": frozenset({end})},
        {"stop_token_ids": frozenset({end}), "include_stop": True},
        {"stop_token_ids": frozenset({end}), "min_tokens": 12},
        {"stop": (START,), "logit_bias": ((1, 400.0),)},
        {"stop": (START,), "logit_bias": ((1, 400.0),), "include_stop": True},
    ):
        sampling = replace(FREE, **changes)
        found = await run(model_engine, PROMPT, sampling)
        assert found == await run(running("builtin"), PROMPT, sampling), changes


FIELDS = [
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "frequency_penalty": 1.5, "presence_penalty": -1.0},
    {"temperature": 1.0, "repetition_penalty": 1.4},
    {"temperature": 1.0, "logit_bias": ((40, -100.0), (41, 5.0))},
    {"temperature": 1.0, "min_tokens": 8, "ignore_eos": False},
    {"temperature": 1.0, "skip_special_tokens": False, "keep_special_tokens": (START,)},
    {"temperature": 2.0, "logprobs": 20, "seed": 2**63 - 1},
]


@pytest.mark.parametrize("fields", FIELDS, ids="-".join)
async def test_sampling_fields_are_all_taken_and_a_seed_repeats(model_engine, fields):
    """Alone, and beside others that are sampled otherwise."""
    sampling = SamplingParams(**{"seed": 7, "max_tokens": 16, "ignore_eos": True} | fields)
    others = [SamplingParams(temperature=1.1, max_tokens=12, seed=i) for i in range(3)]
    _, alone, _, _ = await run(model_engine, PROMPT, sampling)
    (_, beside, _, _), *_ = await asyncio.gather(
        run(model_engine, PROMPT, sampling), *(run(model_engine, PROMPT, each) for each in others)
    )
    assert beside == alone


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 1.5},
        {"logit_bias": ((40, 3.0), (41, -100.0))},
        {"min_tokens": 10, "ignore_eos": False, "stop_token_ids": frozenset(range(100, 300))},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_logits_are_changed_alike(running, model_engine, fields):
    """Greedy, so that the ids can be compared."""
    sampling = replace(FREE, **fields)
    expected = await run(running("builtin"), PROMPT, sampling)
    assert (await run(model_engine, PROMPT, sampling)) == expected


async def test_requests_without_a_seed_are_all_different(model_engine):
    """Two unseeded requests draw their own noise, and so do two completions of one."""
    hot = SamplingParams(temperature=1.5, max_tokens=24, ignore_eos=True)
    first, second = await asyncio.gather(
        run(model_engine, PROMPT, hot), run(model_engine, PROMPT, hot)
    )
    assert first[1] != second[1]
    request = GenerationRequest("r", TokenPrompt(tuple(PROMPT)), replace(hot, seed=3), n=2)
    deltas = await collect(model_engine, request)
    ids = [[t for d in deltas if d.index == i for t in d.token_ids] for i in (0, 1)]
    assert ids[0] != ids[1]
    assert ids[1] == (await run(model_engine, PROMPT, replace(hot, seed=4)))[1]


async def test_logprobs_are_the_models_own(running, model_engine):
    """Before temperature and penalties; of the prompt as well; to three digits."""
    sampling = replace(FREE, logprobs=4, prompt_logprobs=3, repetition_penalty=1.5)
    request = GenerationRequest("r", TokenPrompt(tuple(PROMPT)), sampling)

    async def numbers(engine):
        deltas = await collect(engine, request)
        scores = [each for delta in deltas for each in (*delta.prompt_logprobs, *delta.logprobs)]
        named = [(each.chosen, *each.top) for each in scores if each.chosen is not None]
        return [n for row in named for each in row for n in (each.token_id, each.logprob)]

    found, expected = await numbers(model_engine), await numbers(running("builtin"))
    assert len(found) == 2 * (4 * (len(PROMPT) - 1) + 5 * 24)
    assert found == pytest.approx(expected, abs=1e-3)


STRUCTURES = [
    (Structure("json_object"), lambda text: isinstance(json.loads(text), dict)),
    (
        Structure("json_schema", json.dumps(SCHEMA), strict=True),
        lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None,
    ),
    (Structure("regex", "[a-z]{3,8} [0-9]{2}"), re.compile("[a-z]{3,8} [0-9]{2}").fullmatch),
    (Structure("choice", '["yes", "no", "perhaps"]'), {"yes", "no", "perhaps"}.__contains__),
    (
        Structure("grammar", 'start: WORD ("," WORD)*\nWORD: /[a-f]{2,4}/'),
        re.compile("[a-f]{2,4}(,[a-f]{2,4})*").fullmatch,
    ),
]


@pytest.mark.parametrize(("structure", "holds"), STRUCTURES, ids=lambda x: getattr(x, "kind", ""))
async def test_structures_are_kept(model_engine, structure, holds):
    """Of five kinds, by a random model at temperature 1, several at a time."""
    answers = await asyncio.gather(
        *(
            run(
                model_engine,
                PROMPT,
                SamplingParams(seed=seed, max_tokens=300, structure=structure),
            )
            for seed in range(4)
        )
    )
    whole = [text for text, _, reason, _ in answers if reason is FinishReason.STOP]
    assert whole or structure.kind in ("json_object", "grammar")  # which may go on for ever
    for text in whole:
        assert holds(text), text


async def test_json_is_spelled_the_same(running, model_engine):
    """With the separators that models have learnt, and no other white space."""
    structure = Structure("json_schema", json.dumps(SCHEMA), strict=True)
    sampling = SamplingParams(temperature=0, max_tokens=60, structure=structure)
    text, ids, reason, _ = await run(model_engine, PROMPT, sampling)
    assert reason is FinishReason.STOP
    assert text == json.dumps(json.loads(text))
    assert (text, ids) == (await run(running("builtin"), PROMPT, sampling))[:2]


async def test_structures_that_are_bad_are_the_clients_mistake(model_engine):
    """A 400 that says why, and the engine goes on."""
    for kind, definition in (
        ("json_schema", '{"type": "nonsense"}'),
        ("regex", "(("),
        ("grammar", "start: nowhere"),
        ("choice", "[]"),
        ("grammar", "x: y\n" * 3000),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}'),
    ):
        sampling = SamplingParams(structure=Structure(kind, definition, strict=True))
        with pytest.raises(InvalidRequest):
            await run(model_engine, PROMPT, sampling)
    assert (await run(model_engine, PROMPT))[1]
    model_engine.check()


async def test_prompt_that_is_known_is_not_computed_again(model_engine):
    """`cached_tokens` counts whole blocks; a prompt with logprobs is computed all the same."""
    prompt = random_prompts(1, VOCAB, longest=400, seed=77)[0]
    prompt = (prompt * 400)[:400]
    assert (await run(model_engine, prompt))[3].cached_tokens == 0
    again = (await run(model_engine, prompt))[3]
    assert 256 <= again.cached_tokens < 400
    scored = await run(model_engine, prompt, replace(GREEDY, prompt_logprobs=0))
    assert scored[3].cached_tokens == 0


async def test_times_add_up(model_engine):
    """Queue, prefill and decode are measured, each at least 0."""
    request = GenerationRequest("r", TokenPrompt(tuple(PROMPT)), FREE)
    timing = (await collect(model_engine, request))[-1].timing
    assert timing.queue_s >= 0
    assert timing.prefill_s > 0
    assert timing.decode_s > 0
    assert timing.queue_s + timing.prefill_s + timing.decode_s < 60


@pytest.mark.parametrize(
    ("prompt", "sampling", "error"),
    [
        (TextPrompt(""), GREEDY, InvalidRequest),
        (TokenPrompt((VOCAB,)), GREEDY, InvalidRequest),
        (TokenPrompt((5,) * 512), GREEDY, ContextLengthExceeded),
        (TokenPrompt((5,)), SamplingParams(max_tokens=512), ContextLengthExceeded),
    ],
)
async def test_request_that_is_bad_harms_only_itself(model_engine, prompt, sampling, error):
    """It is refused before any work while a neighbour streams on."""
    long = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    stream = model_engine.generate(GenerationRequest("long", TokenPrompt((9, 8)), long))
    await anext(stream)
    with pytest.raises(error):
        await run(model_engine, prompt, sampling)
    assert await anext(stream)
    await stream.aclose()


async def test_prompt_as_long_as_the_window_allows(model_engine):
    """511 tokens and one new one fit a window of 512."""
    _, ids, _, usage = await run(model_engine, [7] * 511, SamplingParams(temperature=0))
    assert len(ids) == 1
    assert usage.prompt_tokens == 511
