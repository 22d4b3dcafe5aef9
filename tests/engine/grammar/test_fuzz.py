"""Structures grown at random and by mutation, through an engine that serves others meanwhile.

`SERVE_APP_FUZZ_CASES=2000` runs as many; the default is what every run of the tests can pay.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter

from serve_app.errors import InvalidRequest, Overloaded
from serve_app.protocol import FinishReason, SamplingParams, Structure
from tests.engine.conftest import run

CASES = int(os.environ.get("SERVE_APP_FUZZ_CASES", "120"))
AT_ONCE = 8
# Far below the heartbeat of the engine's thread, far above a step of a tiny model.
LONGEST_STEP_S = 5.0
PROMPT = list(range(10, 20))

# Each is slow, large or deep in its own way.
SEEDS = [
    Structure("json_schema", '{"type": "integer", "multipleOf": 99991}'),
    Structure("json_schema", '{"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}'),
    Structure("json_schema", '{"$ref": "#"}'),
    Structure("json_schema", '{"type": "array", "items": {"$ref": "#"}}'),
    Structure("json_schema", '{"type": "string", "minLength": 100000}'),
    Structure("json_schema", '{"pattern": "^((a{1,300}){1,300}){1,300}$"}'),
    Structure("regex", "(.*a){40}"),
    Structure("regex", "(a|aa){2000}"),
    Structure("regex", "((a{1,100}){1,100}){1,100}"),
    Structure("regex", "(.|\n)*a(.|\n){200}"),
    Structure("grammar", 'start: start start | "a" | ""'),
    Structure("grammar", "start: x+\nx: x x | /[a-z ]/ | /[a-z ]+/ | "),
    Structure("grammar", 'start: "a" start'),
    Structure("grammar", 'start: ((("a"?){1,300}){1,300}){1,300}'),
    Structure("grammar", 'start: a\na: a b | b a | "x"\nb: a b a | "y" | '),
    Structure("grammar", "start: X\nX: ~/(.|\\n)*a(.|\\n){15}/"),
    Structure("choice", json.dumps([f"word {number}" for number in range(3000)])),
]


def a_schema(rng: random.Random, depth: int = 0) -> object:
    """Return some schema; sometimes nonsense, sometimes of numbers that nobody wants."""
    if depth > 5 or rng.random() < 0.15:
        return rng.choice([True, False, {}, {"type": "nothing"}, {"enum": []}, {"const": "c"}, 7])
    number = rng.choice([0, 1, 3, 60, 9973, 10**6, 99_999_989, 1e308, -5, 0.01])
    inner = lambda: a_schema(rng, depth + 1)  # noqa: E731
    return rng.choice([
        lambda: {"type": "integer", rng.choice(["multipleOf", "minimum", "maximum"]): number},
        lambda: {"type": "string", rng.choice(["minLength", "maxLength"]): number},
        lambda: {"type": "string", "pattern": an_expression(rng)},
        lambda: {"type": "string", "format": rng.choice(["date", "email", "path", "uri"])},
        lambda: {"type": "array", "items": inner(), "minItems": rng.choice([0, 1, 1000])},
        lambda: {
            "type": "object",
            "properties": {f"k{n}": inner() for n in range(rng.randint(0, 4))},
            "required": [f"k{n}" for n in range(rng.randint(0, 3))],
        },
        lambda: {rng.choice(["allOf", "anyOf", "oneOf"]): [inner() for _ in range(3)]},
        lambda: {"$ref": rng.choice(["#", "#/$defs/a", "#/none", "https://x.test/y"])},
        lambda: {"$defs": {"a": inner()}, "$ref": "#/$defs/a"},
        lambda: {"not": inner()},
        lambda: {"type": "object", "patternProperties": {an_expression(rng): inner()}},
    ])()  # fmt: skip


def an_expression(rng: random.Random, depth: int = 0) -> str:
    """Return some regular expression."""
    if depth > 4 or rng.random() < 0.3:
        return rng.choice(
            ["a", "[a-z]", ".", r"\d", r"\p{L}", "(?!x)", r"\1", "[^\\s\\S]", "é", "("]
        )
    inner = an_expression(rng, depth + 1)
    return rng.choice([
        f"({inner}){{1,{rng.choice([3, 300, 99999, 10**9])}}}",
        f"({inner})*",
        f"({inner}|{an_expression(rng, depth + 1)})",
        inner + an_expression(rng, depth + 1),
        f"^{inner}$",
    ])  # fmt: skip


def a_grammar(rng: random.Random) -> str:
    """Return some grammar whose rules lead to each other."""
    count = rng.choice([1, 3, 10, 300, 1500])
    rules = [f"r{n}" for n in range(count)]
    lines = ["start: r0"]
    for rule in rules:
        parts = [
            rng.choice([rng.choice(rules), '"w"', "/[a-z]+/", '""', f'("x" {rng.choice(rules)})*'])
            for _ in range(rng.randint(0, 4))
        ]
        lines.append(f"{rule}: {' '.join(parts)} | " + rng.choice(['"e"', "", rng.choice(rules)]))
    return "\n".join(lines)


def mutated(rng: random.Random, structure: Structure) -> Structure:
    """Return a structure with some characters repeated, dropped or replaced."""
    text = structure.definition
    for _ in range(rng.randint(1, 3)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice([
            text[:at] + text[to:],
            text[:to] + text[at:to] * rng.choice([1, 2, 50]) + text[to:],
            text[:at] + rng.choice(['"', "{", "(", "|", "9", "\n", "é", "\x00"]) + text[at:],
        ])[:200_000]  # fmt: skip
    return Structure(structure.kind, text, rng.random() < 0.3)


def cases(seed: int, count: int) -> list[Structure]:
    """Return structures of all kinds."""
    rng = random.Random(seed)
    kinds = [
        lambda: Structure("json_schema", json.dumps(a_schema(rng)), rng.random() < 0.3),
        lambda: Structure("regex", an_expression(rng)),
        lambda: Structure("grammar", a_grammar(rng)),
        lambda: rng.choice(SEEDS),
        lambda: mutated(rng, rng.choice(SEEDS)),
    ]
    return [rng.choice(kinds)() for _ in range(count)]


def timed(engine) -> list[float]:
    """Have every step's seconds noted; returns where."""
    steps: list[float] = []
    advance = engine._loop.advance

    def advance_timed():
        started = time.monotonic()
        try:
            return advance()
        finally:
            steps.append(time.monotonic() - started)

    engine._loop.advance = advance_timed
    return steps


async def end_of(engine, number: int, structure: Structure) -> str:
    """Return how a completion with a structure ends; one that finds no place tries again."""
    rng = random.Random(number)
    sampling = SamplingParams(
        structure=structure,
        seed=number,
        max_tokens=40,
        min_tokens=rng.choice([0, 0, 30]),
        ignore_eos=rng.random() < 0.5,
    )
    while True:
        try:
            return str((await run(engine, PROMPT, sampling))[2])
        except InvalidRequest as error:
            return f"refused for its {error.param}"
        except Overloaded:
            await asyncio.sleep(1)


async def ask_until(stop: asyncio.Event, engine) -> int:
    """Ask what has no structure, again and again; returns how often it was answered."""
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    count = 0
    while not stop.is_set():
        assert len((await run(engine, PROMPT, free))[1]) == 30
        count += 1
    return count


async def test_structures_have_one_end_each_and_cost_nobody_else(load, record_property):
    """No step is long, no engine dies, no neighbour fails; each case ends as it should."""
    engine = load(max_running_requests=16)
    steps = timed(engine)
    place = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, structure: Structure) -> str:
        async with place:
            return await end_of(engine, number, structure)

    stop = asyncio.Event()
    beside = asyncio.create_task(ask_until(stop, engine))
    ends = await asyncio.gather(*(one(n, case) for n, case in enumerate(cases(1, CASES))))
    stop.set()
    assert await beside > 0
    assert engine.alive
    assert set(ends) == {FinishReason.STOP, FinishReason.LENGTH, "refused for its structure"}
    record_property("ends", dict(Counter(ends)))
    record_property("longest_step_s", max(steps))
    assert max(steps) < LONGEST_STEP_S
