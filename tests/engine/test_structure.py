"""Structured output: what comes out parses, validates and matches, beside whatever runs."""

import asyncio
import errno
import json
import os
import random
import re
import signal
from contextlib import aclosing

import jsonschema
import pytest
from structlog.testing import capture_logs

from serve_app.engine.grammar import processes
from serve_app.errors import EngineDead, InvalidRequest
from serve_app.protocol import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Structure,
    TokenPrompt,
)
from tests.engine.conftest import GREEDY, run

PROMPT = list(range(10, 20))


def params(structure: Structure, **settings) -> SamplingParams:
    settings = {"temperature": 1.0, "seed": 3, "max_tokens": 200, **settings}
    return SamplingParams(structure=structure, **settings)


def random_schema(rng: random.Random) -> dict:
    """A closed object of bounded parts, so that an answer fits its limit."""
    kinds = [
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "boolean"},
        {"enum": ["red", "green", "blue"]},
        {"type": "string", "maxLength": 5, "pattern": "^[a-z]{1,5}$"},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    ]
    names = [f"k{index}" for index in range(rng.randint(1, 3))]
    return {
        "type": "object",
        "properties": {name: rng.choice(kinds) for name in names},
        "required": names,
        "additionalProperties": False,
    }


async def test_structure_of_a_hundred_schemas_is_kept(engine):
    """A random model at temperature 1 says nothing but valid documents, and ends."""
    rng = random.Random(1)
    schemas = [random_schema(rng) for _ in range(100)]
    answers = await asyncio.gather(
        *(
            run(engine, PROMPT, params(Structure("json_schema", json.dumps(schema)), seed=index))
            for index, schema in enumerate(schemas)
        )
    )
    for schema, (text, _, reason, _) in zip(schemas, answers, strict=True):
        assert reason is FinishReason.STOP
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("temperature", [0, 1.0])
async def test_structure_of_choices_and_expressions(engine, temperature):
    """One of the words, whole; a match of the expression, whole."""
    words = ["yes", "no", 'say "no"']
    text, _, reason, _ = await run(
        engine, PROMPT, params(Structure("choice", json.dumps(words)), temperature=temperature)
    )
    assert (text in words, reason) == (True, FinishReason.STOP)
    text, _, reason, _ = await run(
        engine, PROMPT, params(Structure("regex", "[a-c]{3}-[0-9]{2}"), temperature=temperature)
    )
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", text)
    assert reason is FinishReason.STOP


async def test_structure_of_one_of_thousands_of_choices(engine):
    """However many begin alike, and also where one is the beginning of another."""
    words = ["word", *(f"word {number}" for number in range(5000))]
    text, _, reason, _ = await run(
        engine, PROMPT, params(Structure("choice", json.dumps(words)), temperature=1.0)
    )
    assert (text in words, reason) == (True, FinishReason.STOP)


async def test_structure_of_a_grammar_in_larks_syntax(engine):
    """A small language of one's own."""
    grammar = 'start: "<" word ">"\nword: /[xy]{2,4}/\n'
    text, _, _, _ = await run(engine, PROMPT, params(Structure("grammar", grammar)))
    assert re.fullmatch("<[xy]{2,4}>", text)


async def test_structure_of_a_whole_text_ends_even_if_ends_are_ignored(engine):
    """Nothing may follow a whole choice, so the end is the only token left."""
    only = params(Structure("choice", '["done"]'), ignore_eos=True)
    text, _, reason, _ = await run(engine, PROMPT, only)
    assert (text, reason) == ("done", FinishReason.STOP)


async def test_structure_is_not_changed_by_neighbours_and_preemption(load):
    """The same seed gives the same text alone and in a crowded small cache."""
    engine = load(kv_cache_cpu_gib=320 * 960 / 2**30, max_context_tokens=200)
    schema = Structure("json_schema", json.dumps(random_schema(random.Random(5))))
    wanted = params(schema, max_tokens=150)
    alone = await run(engine, PROMPT, wanted)
    free = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    crowd = [run(engine, [20 + i] * 20, free) for i in range(6)]
    *_, together = await asyncio.gather(*crowd, run(engine, PROMPT, wanted))
    assert together[:3] == alone[:3]


async def test_structure_that_is_complete_ends_before_min_tokens(engine):
    """Only an end may follow 12 letters; a completion that is shorter is better than none."""
    structure = Structure("regex", "[ab]{12}")
    answers = await asyncio.gather(
        *(run(engine, PROMPT, params(structure, min_tokens=40, seed=n)) for n in range(6))
    )
    for text, _, reason, _ in answers:
        assert re.fullmatch("[ab]{12}", text)
        assert reason is FinishReason.STOP
    text, ids, _, _ = await run(
        engine, PROMPT, params(Structure("regex", "[ab]*"), min_tokens=20, max_tokens=30)
    )
    assert len(ids) >= 20
    assert re.fullmatch("[ab]*", text)


async def test_structure_fault_on_the_way_is_the_clients(engine):
    """It is no failed step: as many as come, the neighbour's tokens are not computed again."""
    structure = Structure("grammar", 'start: "a" start')
    neighbour = asyncio.create_task(
        run(engine, PROMPT, SamplingParams(temperature=0, max_tokens=150, ignore_eos=True))
    )
    for _ in range(6):
        with pytest.raises(InvalidRequest, match="any further") as refused:
            await run(engine, PROMPT, params(structure, max_tokens=400))
        assert refused.value.param == "structure"
    assert len((await neighbour)[1]) == 150
    assert engine._loop._failures == 0
    assert engine.alive


async def test_structure_mask_that_is_late_is_waited_for_by_its_own_request(engine):
    """The process that walks stands still for a while: neighbours go on, the text is the same."""
    structure = Structure("regex", "[a-z]{60}")
    wanted = params(structure, max_tokens=100)
    alone = await run(engine, PROMPT, wanted)
    worker = await engine._grammars.compile(structure)
    stopped = asyncio.create_task(run(engine, PROMPT, wanted))
    while not worker.completions:
        await asyncio.sleep(0.001)
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        free = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        assert len((await asyncio.wait_for(run(engine, [7, 8, 9], free), 60))[1]) == 60
        assert not stopped.done()
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    assert await stopped == alone


async def test_structure_of_a_cancelled_request_leaves_no_walk_behind(engine):
    """Its worker has the place back within a step."""
    structure = Structure("regex", "[a-z]{300}")
    worker = await engine._grammars.compile(structure)
    for _ in range(5):
        request = GenerationRequest("r", TokenPrompt(tuple(PROMPT)), params(structure), n=3)
        async with aclosing(engine.generate(request)) as deltas:
            await anext(deltas)
            assert worker.completions == 3
    async with asyncio.timeout(10):
        while worker.completions:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "structure",
    [
        Structure("json_schema", '{"type": "nothing"}'),
        Structure("json_schema", "{"),
        Structure("regex", "("),
        Structure("grammar", "start: missing"),
        Structure("choice", "[]"),
    ],
    ids=lambda structure: f"{structure.kind} {structure.definition}",
)
async def test_structure_that_cannot_be_enforced_is_refused(engine, structure):
    """Before any token, naming the field."""
    with pytest.raises(InvalidRequest, match="structure cannot be enforced") as refused:
        await run(engine, PROMPT, params(structure))
    assert refused.value.param == "structure"
    assert (await run(engine, PROMPT, GREEDY))[1]


def test_prepare_grammars_leaves_a_lack_of_processes_to_who_asks(load, monkeypatch):
    """A replica serves without them; the log says why."""

    def refuse(*_args, **_kwargs):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    engine = load()
    monkeypatch.setattr(processes.subprocess, "Popen", refuse)
    with capture_logs() as logs:
        engine.prepare_grammars()
    assert [(line["event"], line["cause"]) for line in logs] == [
        ("grammar.failed", "[Errno 11] Resource temporarily unavailable")
    ]


async def test_engine_blames_no_structure_when_closed(load):
    """What was compiled then was not begun: another replica may have it."""
    engine = load()
    await asyncio.to_thread(engine.prepare_grammars)
    slow = {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}], "type": "integer"}
    sampling = SamplingParams(structure=Structure("json_schema", json.dumps(slow)))
    asked = asyncio.create_task(run(engine, PROMPT, sampling))
    async with asyncio.timeout(10):
        while not engine._grammars._compiling:
            await asyncio.sleep(0.01)
    await asyncio.to_thread(engine.close)
    with pytest.raises(EngineDead) as dead:
        await asyncio.wait_for(asked, 10)
    assert dead.value.details["untouched"]
