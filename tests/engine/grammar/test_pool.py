"""What a structure may cost, and whom: compiled and walked in processes that die alone."""

import asyncio
import gc
import json
import os
import re
import signal
import time
from contextlib import closing, suppress
from pathlib import Path

import jsonschema
import pytest

from serve_app.engine.grammar import pool as pools
from serve_app.engine.grammar.matcher import wait
from serve_app.engine.grammar.wire import Limits
from serve_app.errors import InvalidRequest, Overloaded
from serve_app.protocol import SUBSCHEMA, Structure

pytestmark = pytest.mark.slow


def schema(definition, *, strict=False) -> Structure:
    return Structure("json_schema", json.dumps(definition), strict)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"enum": [7, 8]}},
    "required": ["name", "age"],
}
SLOW = {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}], "type": "integer"}
# (structure, words of the refusal): each costs seconds, gigabytes or the process if it is let.
EXPENSIVE = {
    "prime divisors": (
        schema(SLOW),
        "processor time|longer than",
    ),
    "doubling": (
        schema(
            {
                "$defs": {
                    **{f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(24)},
                    "d24": {"type": "object", "properties": {"a": {"type": "string"}}},
                },
                "$ref": "#/$defs/d0",
            }
        ),
        "processor time|memory|longer than",
    ),
    "too many bytes": (Structure("regex", "a" * 600_000), "524,288 is the limit"),
    "too many rules": (
        Structure(
            "grammar", "start: r0\n" + "\n".join(f'r{n}: "w" r{n + 1} | "e"' for n in range(5000))
        ),
        "2,000 is the limit",
    ),
    "parentheses": (Structure("regex", "(" * 20_000 + ")" * 20_000), "cannot be enforced"),
    "nothing matches": (Structure("regex", r"a[^\s\S]"), "nothing can satisfy it"),
    "a panic of the compiler": (
        Structure("grammar", 'start: a b\na[lazy,max_tokens=3]: /.*/\nb: "z"'),
        "cannot be enforced",
    ),
}


@pytest.mark.parametrize("name", EXPENSIVE)
async def test_pool_refuses_an_expensive_structure(pool, name):
    """With the limit's name, within seconds, and again at once."""
    structure, words = EXPENSIVE[name]
    with pytest.raises(InvalidRequest, match=words) as refused:
        await pool.compile(structure)
    assert refused.value.param == "structure"
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match=words):
        await pool.compile(structure)
    assert time.monotonic() - started < 0.1


async def test_pool_leaves_a_divisor_to_the_reader_unless_strict(pool, demo):
    """43 bytes that took minutes and gigabytes; now the number is any, or the answer a 400."""
    definition = {"type": "integer", "multipleOf": 99_999_989}
    walk = demo.walk(await pool.compile(schema(definition)), most=5)
    assert re.fullmatch(r"-?\d+", walk.text)
    with pytest.raises(InvalidRequest, match="`multipleOf`: above the limit"):
        await pool.compile(schema(definition, strict=True))


@pytest.mark.parametrize(
    "structure",
    [
        Structure("regex", "((a{1,100}){1,100}){1,100}"),
        Structure("grammar", 'start: "a" start'),
        Structure("grammar", 'start: ((("a"?){1,300}){1,300}){1,300}'),
    ],
    ids=lambda structure: structure.definition,
)
async def test_pool_gives_a_fault_on_the_way_to_its_own_completion(pool, demo, structure):
    """It says what is wrong; another completion of another grammar goes on."""
    other = await pool.compile(schema(PERSON))
    walk = demo.walk(await pool.compile(structure))
    assert walk.fault
    assert "\n" not in walk.fault
    assert demo.walk(other).fault is None


@pytest.mark.parametrize("seed", range(8))
async def test_pool_walk_follows_the_schema(pool, demo, seed):
    """In the spaced form that models have learnt, and without keys that nobody asked for."""
    walk = demo.walk(await pool.compile(schema(PERSON)), seed=seed)
    assert walk.complete
    document = json.loads(walk.text)
    jsonschema.validate(document, PERSON)
    assert document.keys() == {"name", "age"}
    assert re.fullmatch(r'\{"name": ".*", "age": [78]\}', walk.text)


def of_tools(*tools):
    """Return calls of tools as the API writes them: parts of one schema."""
    definitions = {
        f"t{n}": {
            **tool,
            "$id": f"https://part.test/{n}",
            SUBSCHEMA: {"name": f"tools[{n}]", **mark},
        }
        for n, (tool, mark) in enumerate(tools)
    }
    calls = [{"properties": {name: {"$ref": f"#/$defs/{name}"}}} for name in definitions]
    return schema({"$defs": definitions, "anyOf": calls})


async def test_pool_keeps_other_tools_when_one_is_bad(pool, demo):
    """It takes any object; the others are enforced. A strict one is refused by its name."""
    number = {"type": "integer", "minimum": 5, "maximum": 3}
    bad = {"type": "object", "properties": {"a": number}, "required": ["a"]}
    good = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
    worker = await pool.compile(of_tools((bad, {}), (good, {"strict": True})))
    assert demo.accepts(worker, '{"t0": {"any": "thing"}}')
    assert demo.accepts(worker, '{"t1": {"x": 2}}')
    assert not demo.accepts(worker, '{"t1": {"x": 3}}')
    with pytest.raises(InvalidRequest, match=r"`tools\[0\]`.*Unsatisfiable"):
        await pool.compile(of_tools((bad, {"strict": True}), (good, {})))


@pytest.mark.parametrize(
    "definition",
    [
        {"properties": {"e": {"propertyNames": {"type": "string"}, "additionalProperties": True}}},
        {"properties": {"e": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}},
        {"properties": {"e": {"not": {}}}},
        {"properties": {"e": {"type": "string"}}, "unevaluatedProperties": False},
        {"oneOf": [{"properties": {"a": {"type": "string"}}}, {"properties": {"b": {}}}]},
        {"type": "string", "format": "uuid4"},
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
        {"$schema": "https://unknown.test/s#", "type": "object"},
        {"type": "object", "properties": {"a": {"type": "string"}}, "maxProperties": 1},
        {"$ref": "https://elsewhere.test/schema.json"},
    ],
    ids=lambda definition: json.dumps(definition)[:60],
)
async def test_pool_compiles_what_generators_of_schemas_write(pool, definition):
    """Records, sets, unions and formats of pydantic and Zod."""
    assert (await pool.compile(schema(definition))).fault is None


async def test_pool_refuses_if_strict_what_the_compiler_leaves_out(pool):
    """Also what only the compiler knows of."""
    definition = {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "additionalProperties": True,
        "maxProperties": 1,
    }
    with pytest.raises(InvalidRequest, match="maxProperties"):
        await pool.compile(schema(definition, strict=True))
    await pool.compile(schema({"type": "string", "format": "uuid4"}, strict=True))


async def test_pool_compiles_one_grammar_once(pool):
    """For as many as ask at the same time, and later."""
    structure = schema({**PERSON, "title": "once"})
    several = await asyncio.gather(*(pool.compile(structure) for _ in range(20)))
    assert len({worker.pid for worker in several}) == 1
    assert (await pool.compile(structure)).pid == several[0].pid


async def test_pool_lets_completions_walk_apart(pool, demo):
    """Many at a time in one worker, each at a place of its own."""
    worker = await pool.compile(Structure("choice", '["alpha", "beta", "gamma"]'))
    matchers = worker.open(3)
    wait(matchers, 5)
    texts = ["al", "be", "ga"]
    for matcher, text in zip(matchers, texts, strict=True):
        for token in demo.tokenizer.encode(text).ids:
            wait([matcher], 5)
            matcher.advance(token)
    wait(matchers, 5)
    assert [matcher.fault for matcher in matchers] == [None] * 3
    masks = {matcher.mask.tobytes() for matcher in matchers}
    assert len(masks) == 3
    for matcher in matchers:
        matcher.close()
    assert worker.completions == 0


async def test_pool_takes_a_token_outside_the_grammar_as_a_fault(pool, demo):
    """Whoever ignored the mask hears of it."""
    worker = await pool.compile(Structure("choice", '["alpha"]'))
    (matcher,) = worker.open()
    wait([matcher], 5)
    matcher.advance(demo.tokenizer.encode("zebra").ids[0])
    wait([matcher], 5)
    assert matcher.fault
    matcher.close()


async def test_pool_loses_with_a_worker_its_own_completions_alone(demo):
    """The next request that has the structure gets another worker."""
    with closing(demo.pool()) as pool:
        worker = await pool.compile(schema(PERSON))
        other = await pool.compile(Structure("choice", '["a", "b"]'))
        (mine,), (theirs,) = worker.open(), other.open()
        wait([mine, theirs], 5)
        os.kill(worker.pid, signal.SIGSEGV)
        mine.advance(5)
        wait([mine], 5)
        assert "stack" in (mine.fault or "")
        assert theirs.fault is None
        assert demo.walk(other).complete
        again = await pool.compile(schema(PERSON))
        assert again.pid != worker.pid
        assert demo.walk(again).complete


async def test_pool_ends_a_worker_that_hangs(demo, monkeypatch):
    """A step goes on without it; a process that answers nothing does not live for ever."""
    monkeypatch.setattr("serve_app.engine.grammar.matcher.MASK_TIMEOUT_S", 0.3)
    with closing(demo.pool()) as pool:
        worker = await pool.compile(schema(PERSON))
        (matcher,) = worker.open()
        wait([matcher], 5)
        os.kill(worker.pid, signal.SIGSTOP)
        matcher.advance(demo.tokenizer.encode("{").ids[0])
        started = time.monotonic()
        wait([matcher], 0.05)
        assert time.monotonic() - started < 0.2
        assert matcher.pending
        matcher.was_late()
        assert matcher.sits_out
        await asyncio.sleep(0.3)
        assert not matcher.sits_out
        assert "not there within" in (matcher.fault or "")
        await _until_gone(worker.pid, pool)


async def _until_gone(pid, pool=None):
    """Wait for the end of a process; the server collects its dead when it is asked something."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/cmdline")
        if not status.exists() or not status.read_bytes():
            return
        await asyncio.sleep(0.05)
        if pool is not None:
            await _anything(pool)
    pytest.fail("a process is left")


async def _anything(pool):
    with suppress(InvalidRequest):
        await pool.compile(Structure("regex", f"x{time.monotonic_ns()}"))


async def test_pool_compiles_in_bounded_memory(demo):
    """A process at its limit ends; the refusal speaks of memory."""
    limits = Limits(compile_cpu_s=20.0, compile_bytes=16 << 20)
    with closing(demo.pool(limits=limits)) as pool:
        many = Structure("choice", json.dumps([f"{n} {n * 7919}" for n in range(20_000)]))
        with pytest.raises(InvalidRequest, match="memory"):
            await pool.compile(many)


async def test_pool_bounds_the_time_of_all_masks_of_a_completion(demo):
    """A completion whose every mask is slow is ended, not computed for ever."""
    limits = Limits(walk_cpu_s=-1.0)
    with closing(demo.pool(limits=limits)) as pool:
        walk = demo.walk(await pool.compile(schema(PERSON)))
    assert walk.fault == "its masks take too much processor time"


async def test_pool_makes_room_by_ending_the_longest_compilation(demo, monkeypatch):
    """Slow structures fill every place; a quick one does not wait for their limits."""
    monkeypatch.setattr(pools, "EVICTABLE_AFTER_S", 0.0)
    limits = Limits(compile_cpu_s=60.0)
    with closing(demo.pool(limits=limits)) as pool:
        await pool.compile(Structure("regex", "a"))
        slow = [
            asyncio.create_task(pool.compile(schema({**SLOW, "title": str(n)}), "ab"[n % 2]))
            for n in range(pools.COMPILERS)
        ]
        while sum(bool(one.worker) for one in pool._compiling.values()) < pools.COMPILERS:
            await asyncio.sleep(0.02)
        quick = await asyncio.wait_for(pool.compile(schema(PERSON)), 30)
        assert quick.fault is None
        done, _ = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(Overloaded) as refused:
            done.pop().result()
        assert refused.value.details["retry_after_s"]
        for task in slow:
            task.cancel()


async def test_pool_asks_too_many_at_once_to_come_back(demo, monkeypatch):
    """The line for a place is bounded."""
    monkeypatch.setattr(pools, "MAX_QUEUED_PER_CLIENT", 0)
    with closing(demo.pool()) as pool:
        count = pools.COMPILERS_PER_CLIENT + 4
        results = await asyncio.gather(
            *(pool.compile(Structure("regex", f"a{n}"), "a") for n in range(count)),
            pool.compile(Structure("regex", "of another one"), "b"),
            return_exceptions=True,
        )
    assert [n for n in range(count) if isinstance(results[n], Overloaded)] == [4, 5, 6, 7]
    assert not isinstance(results[-1], BaseException)


async def test_pool_does_not_hold_up_a_client_for_the_slow_structures_of_another(demo, monkeypatch):
    """They take no more than half of the places, and have an answer themselves before long."""
    monkeypatch.setattr(pools, "MAX_WAIT_S", 4.0)
    limits = Limits(compile_cpu_s=60.0)
    with closing(demo.pool(limits=limits)) as pool:
        await pool.compile(Structure("regex", "a"))
        began = time.monotonic()
        slow = [
            asyncio.create_task(pool.compile(schema({**SLOW, "title": str(n)}), "a"))
            for n in range(pools.COMPILERS_PER_CLIENT + pools.MAX_QUEUED_PER_CLIENT)
        ]
        await asyncio.sleep(0.2)
        quick = [await pool.compile(Structure("regex", f"b{n}"), "b") for n in range(20)]
        assert time.monotonic() - began < 4.0
        assert not any(worker.fault for worker in quick)
        ends = await asyncio.gather(*slow, return_exceptions=True)
        assert time.monotonic() - began < 6.0
        assert {type(end) for end in ends} == {Overloaded}


async def test_pool_makes_room_by_ending_idle_workers(demo, monkeypatch):
    """There are never more processes than the bound; those in use stay."""
    monkeypatch.setattr(pools, "MAX_WORKERS", pools.COMPILERS + 2)
    monkeypatch.setattr(pools, "IDLE_S", 0.0)
    with closing(demo.pool()) as pool:
        used = await pool.compile(Structure("regex", "used"))
        (matcher,) = used.open()
        for number in range(6):
            await pool.compile(Structure("regex", f"idle{number}"))
        assert len(pool._workers) <= 3
        assert (await pool.compile(Structure("regex", "used"))).pid == used.pid
        second = await pool.compile(Structure("regex", "second"))
        second.open()
        with pytest.raises(Overloaded):
            await pool.compile(Structure("regex", "third"))
        matcher.close()
        assert (await pool.compile(Structure("regex", "third"))).fault is None


async def test_pool_bounds_the_memory_of_all_together(demo, monkeypatch):
    """Beyond it those that nobody uses go first, then the largest."""
    with closing(demo.pool()) as pool:
        first = await pool.compile(Structure("regex", "first"))
        # Room for one; two processes that compiled the same thing differ by some KiB.
        monkeypatch.setattr(pools, "MEMORY_KIB", first.memory_kib * 3 // 2)
        second = await pool.compile(Structure("regex", "second"))
        assert first.fault == "nobody used it"
        assert second.fault is None
        (matcher,) = second.open()
        second.memory_kib = pools.MEMORY_KIB + 1
        pool._check_memory()
        assert "most memory" in (second.fault or "")
        assert matcher.fault == second.fault


async def test_pool_starts_a_server_that_dies_again(demo):
    """The grammars that are compiled go on; the next one finds a new server."""
    with closing(demo.pool()) as pool:
        worker = await pool.compile(schema(PERSON))
        os.kill(pool._server._process.pid, signal.SIGKILL)
        pool._server._process.wait()
        other = await pool.compile(Structure("regex", "b"))
        assert demo.walk(other).complete
        assert demo.walk(worker).complete


async def test_pool_leaves_nothing_behind(demo):
    """Neither the server nor a worker outlives the pool; no descriptor stays open."""
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with closing(demo.pool()) as pool:
        pids = [(await pool.compile(Structure("regex", f"a{n}"))).pid for n in range(6)]
        pids.append(pool._server._process.pid)
    del pool
    for pid in pids:
        await _until_gone(pid)
    gc.collect()
    # The thread that compiled last still holds its result.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


async def test_pool_hands_down_no_secret_of_our_environment(demo, monkeypatch):
    """The processes that run a client's grammar know no token."""
    monkeypatch.setenv("HF_TOKEN", "not-for-workers")
    with closing(demo.pool()) as pool:
        worker = await pool.compile(Structure("regex", "a"))
        for pid in (worker.pid, pool._server._process.pid):
            assert b"not-for-workers" not in Path(f"/proc/{pid}/environ").read_bytes()


async def test_pool_of_a_tokenizer_that_cannot_be_used(demo):
    """Structures are refused with the reason; nothing else is touched."""
    with closing(
        pools.GrammarPool(lambda: "{}", vocab_size=10, eos_token_ids=frozenset({2}), slots=4)
    ) as pool:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="tokenizer cannot be used for structures"):
                await pool.compile(Structure("regex", "a"))


async def test_pool_of_a_model_without_an_end(demo):
    """Nothing that is complete could end."""
    nothing = pools.GrammarPool(
        lambda: demo.json, vocab_size=10, eos_token_ids=frozenset(), slots=4
    )
    with closing(nothing) as pool, pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        await pool.compile(Structure("regex", "a"))
