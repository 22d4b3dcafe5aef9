"""What the text of a completion is, through a whole engine: ends, special tokens, thoughts."""

import json
import shutil
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from serve_app.config import ApiConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.errors import UnsupportedParameter
from serve_app.protocol import (
    MODEL_DEFAULTS,
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Structure,
    TextPrompt,
    TokenPrompt,
)
from tests.engine.conftest import collect, run
from tests.models import END, START, make_model, make_tokenizer

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
HELLO = ChatPrompt(({"role": "user", "content": "Hello"},))
THINK, THOUGHT = 372, 373  # the ids of the tags
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "<|start|>assistant\n{{ opening }}"
)


def forced(*tokens, **sampling):
    """Sample these before all others, the first ones before the next."""
    bias = tuple((token, 400.0 - place) for place, token in enumerate(tokens))
    return SamplingParams(temperature=0, logit_bias=bias, **{"max_tokens": 4} | sampling)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny model whose tokenizer has the tags of thoughts as tokens."""
    made = make_model(tmp_path_factory.mktemp("thinks") / "m")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [THINK, THOUGHT]
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture
def load(directory, tmp_path):
    """Load engines over changed copies of it."""
    engines = []

    def get(*, files=None, model=None, engine=None, api=None):
        copy = shutil.copytree(directory, tmp_path / f"m{len(engines)}")
        for name, changes in (files or {}).items():
            path = copy / name
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        engines.append(
            Engine.load(
                copy,
                model=ModelConfig(path=str(copy), dtype="float32", **(model or {})),
                engine=EngineConfig(
                    max_context_tokens=512, kv_cache_cpu_gib=0.02, **(engine or {})
                ),
                num_gpus=0,
                num_cpus=2,
                api=ApiConfig(**(api or {})),
            )
        )
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()


async def test_answer_ends_at_a_fine_tunes_own_end(load):
    """Both configs name another one; the tokenizer knows."""
    other = {"eos_token_id": 5}
    engine = load(files={"config.json": other, "generation_config.json": other})
    for end in (0, 5):
        text, ids, reason, _ = await run(engine, HELLO, forced(end))
        assert (text, ids, reason) == ("", [end], STOP)


async def test_answer_stops_at_a_stop_string_that_is_a_special_token(load):
    """It has no text to be found in; also where the model's own ends are ignored."""
    engine = load()
    for fields in ({}, {"ignore_eos": True}):
        _, ids, reason, _ = await run(engine, HELLO, forced(1, stop=(START,), **fields))
        assert (ids, reason) == ([1], STOP)
    _, ids, reason, _ = await run(engine, HELLO, forced(0, stop=(END,), ignore_eos=True))
    assert (ids, reason) == ([0], STOP)
    _, ids, reason, _ = await run(engine, HELLO, forced(0, stop=(START,), ignore_eos=True))
    assert (ids, reason) == ([0] * 4, LENGTH)


async def test_answer_shows_special_tokens_where_it_is_asked_for(load):
    """All of them or some; what stopped the text as well."""
    engine = load()
    assert (await run(engine, HELLO, forced(1)))[0] == ""
    assert (await run(engine, HELLO, forced(1, skip_special_tokens=False)))[0] == START * 4
    assert (await run(engine, HELLO, forced(1, keep_special_tokens=(START,))))[0] == START * 4
    assert (await run(engine, HELLO, forced(1, keep_special_tokens=(END,))))[0] == ""
    asked = {"stop": (START,), "include_stop": True}
    assert (await run(engine, HELLO, forced(1, **asked)))[0] == START


async def test_defaults_of_the_authors_count_where_the_request_is_silent(load):
    """`generation_config: none` leaves it out; the request's own word always counts."""
    published = {"generation_config.json": {"temperature": 0.0, "top_k": 1}}
    silent = SamplingParams(max_tokens=8, unset=frozenset(MODEL_DEFAULTS))
    said = SamplingParams(max_tokens=8, temperature=2.0)
    texts = {}
    for mode in ("auto", "none"):
        engine = load(files=published, engine={"generation_config": mode})
        for name, sampling in (("silent", silent), ("said", said)):
            runs = [tuple((await run(engine, HELLO, sampling))[1]) for _ in range(6)]
            texts[mode, name] = len(set(runs))
    assert texts["auto", "silent"] == 1  # greedy
    assert all(count > 1 for key, count in texts.items() if key != ("auto", "silent"))


async def test_prompt_is_cut_to_fit(load):
    """To its last tokens, or to what leaves room for the completion."""
    engine = load()
    ids = tuple(range(2, 300)) * 2
    kept = await engine.tokenize(TokenPrompt(ids, truncate=7))
    assert kept.token_ids == ids[-7:]
    *_, usage = await run(engine, TokenPrompt(ids, truncate=-8), forced(9, max_tokens=8))
    assert (usage.prompt_tokens, usage.completion_tokens) == (504, 8)
    text = TextPrompt("fox " * 600, truncate=5)
    assert len((await engine.tokenize(text)).token_ids) == 5
    chat = ChatPrompt(HELLO.messages, truncate=3)
    whole = (await engine.tokenize(HELLO)).token_ids
    assert (await engine.tokenize(chat)).token_ids == whole[-3:]


async def test_prompt_ids_are_reported_where_they_are_asked_for(load):
    """Those that the model read."""
    engine = load()
    asked = GenerationRequest("r", HELLO, forced(9, return_prompt_ids=True))
    deltas = await collect(engine, asked)
    expected = (await engine.tokenize(HELLO)).token_ids
    assert [d.prompt_token_ids for d in deltas] == [expected, *[()] * (len(deltas) - 1)]


async def test_vocabulary_names_its_ids(load):
    """As it writes them; a row that no token uses has no name."""
    engine = load()
    assert await engine.token_strings((0, THINK, 383)) == (END, "<think>", "")
    seen = await engine.tokenizer_info()
    assert (seen["eos_token"], seen["chat_template"]) == (END, TEMPLATE)
    assert seen["chat_template_shows_tools"] is False
    json.dumps(seen)


async def test_template_of_a_request_needs_the_services_trust(load):
    """It is refused by name otherwise."""
    prompt = ChatPrompt(HELLO.messages, chat_template="{{ messages[0].content }}!")
    with pytest.raises(UnsupportedParameter):
        await load().tokenize(prompt)
    trusting = load(api={"trust_request_chat_template": True})
    expected = (await trusting.tokenize(TextPrompt("Hello!"))).token_ids
    assert (await trusting.tokenize(prompt)).token_ids == expected


def test_template_that_hides_tools_is_logged_once(load, tmp_path):
    """At the start, in the log, with the way out; one that shows them is no news."""
    with capture_logs() as logs:
        load()
    seen = [entry for entry in logs if entry["event"] == "template.hides_tools"]
    assert [entry["log_level"] for entry in seen] == ["warning"]
    own = tmp_path / "own.jinja"
    own.write_text("{{ tools | tojson if tools }}" + TEMPLATE)
    with capture_logs() as logs:
        load(model={"chat_template": str(own)})
    assert not [entry for entry in logs if entry["event"] == "template.hides_tools"]


def thinking(opening=""):
    return ChatPrompt(HELLO.messages, {"opening": opening})


async def answer(engine, prompt, sampling):
    deltas = await collect(engine, GenerationRequest("r", prompt, sampling))
    reasoning = "".join(delta.reasoning for delta in deltas)
    return reasoning, "".join(delta.text for delta in deltas), deltas[-1]


FOX = make_tokenizer().backend_tokenizer.encode(" fox").ids


async def test_thoughts_are_split_from_the_answer_where_that_is_asked_for(load):
    """By the config; without it all is text, tags included."""
    engine = load(model={"reasoning": "think"})
    assert (await answer(engine, thinking("<think>\n"), forced(*FOX[:1])))[:2] == (
        engine._encoder.decode(FOX[:1] * 4).strip(),
        "",
    )
    reasoning, text, _ = await answer(engine, thinking(), forced(THINK, max_tokens=3))
    assert (reasoning, text) == ("<think><think>", "")
    assert (await answer(engine, thinking("<think></think>"), forced(THINK)))[:2] == (
        "",
        "<think>" * 4,
    )
    joined = forced(THOUGHT, split_thoughts=False)  # what a client may ask for
    assert (await answer(engine, thinking("<think>\n"), joined))[:2] == ("", "</think>" * 4)
    plain = load()
    assert (await answer(plain, thinking("<think>\n"), forced(THOUGHT)))[:2] == (
        "",
        "</think>" * 4,
    )


SCHEMA = Structure(
    "json_schema", json.dumps({"type": "array", "items": {"const": 7}, "maxItems": 1})
)


@pytest.mark.parametrize(
    ("opening", "tokens"),
    [
        ("<think>\n", (THOUGHT,)),
        ("", (THOUGHT, THINK)),
        ("<think>\n\n</think>\n\n", (THOUGHT, THINK)),
        ("", FOX),  # a model that does not think: no word may stand before the answer
    ],
)
async def test_structure_begins_behind_the_thoughts(load, opening, tokens):
    """Whoever opens them, or nobody does; the answer is what it must be."""
    engine = load(model={"reasoning": "think"})
    sampling = forced(*tokens, structure=SCHEMA, max_tokens=40)
    if THOUGHT not in tokens:
        sampling = replace(sampling, logit_bias=((THINK, -400.0), *sampling.logit_bias))
    thoughts, text, last = await answer(engine, thinking(opening), sampling)
    assert thoughts == ""
    assert json.loads(text) in ([], [7])
    assert last.finish_reason is STOP


async def test_thoughts_are_free_before_a_structure(load):
    """Any text but an end: the answer would be missing."""
    engine = load(model={"reasoning": "think"})
    sampling = forced(0, *FOX[:1], structure=SCHEMA, max_tokens=6)
    thoughts, text, last = await answer(engine, thinking("<think>"), sampling)
    assert thoughts == engine._encoder.decode(FOX[:1] * 6).strip()
    assert (text, last.finish_reason) == ("", LENGTH)


async def test_structure_begins_at_once_without_thoughts(load):
    """The switch is off: the whole text is the answer."""
    sampling = forced(THOUGHT, THINK, structure=SCHEMA, max_tokens=40)
    _, text, _ = await answer(load(), thinking("<think>"), sampling)
    assert json.loads(text) in ([], [7])
