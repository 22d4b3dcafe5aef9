"""Tool calls are read out of any text, however it is cut, and nothing is lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.api.tool_formats import CallArguments, CallBegun, Content, ToolReader

NAMES = ("weather", "search")
OPEN, CLOSE, PYTHON = "<tool_call>", "</tool_call>", "<|python_tag|>"


def read(pieces, **options):
    """Read pieces to the end; neighbours of one kind are joined."""
    reader = ToolReader(NAMES, **options)
    parts = [part for piece in pieces for part in reader.read(piece)] + reader.end()
    joined = []
    for part in parts:
        if isinstance(part, CallBegun) or not joined or type(joined[-1]) is not type(part):
            joined.append(part)
        else:
            joined[-1] = type(part)(joined[-1].text + part.text)
    return joined


def call(name, arguments):
    return [CallBegun(name), CallArguments(arguments)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            '{"name": "weather", "parameters": {"city": "Bern"}}',
            call("weather", '{"city": "Bern"}'),
        ),
        (PYTHON + '{"name": "search", "parameters": {}}', call("search", "{}")),
        (
            '\n{"name":"search","parameters":{"q":"}"}}; {"name":"weather","parameters":{}}\n',
            call("search", '{"q":"}"}') + call("weather", "{}"),
        ),
        (
            '[{"name": "search", "parameters": {}}, {"name": "search", "parameters": {"a":[{}]}}]',
            call("search", "{}") + call("search", '{"a":[{}]}'),
        ),
        (
            f'{OPEN}\n{{"name": "search", "arguments": {{"q": "\\"{{"}}}}\n{CLOSE}',
            call("search", '{"q": "\\"{"}'),
        ),
        (
            f'Let me see.\n{OPEN}{{"name": "search", "arguments": {{}}}}{CLOSE}\n'
            f'{OPEN}{{"name": "weather", "arguments": {{}}}}{CLOSE}\nDone.',
            [
                Content("Let me see."),
                *call("search", "{}"),
                *call("weather", "{}"),
                Content("\nDone."),
            ],
        ),
        (
            '{"type": "function", "name": "search", "parameters": {"q": "é"}}',
            call("search", '{"q": "é"}'),
        ),
        (
            f'{OPEN}{{"arguments": {{"q": 1}}, "name": "search"}}{CLOSE}',
            call("search", '{"q": 1}'),
        ),
    ],
)
def test_the_forms_of_calls(text, parts):
    """Llama's with and without its tag, lists, Hermes' between words, keys in any order."""
    assert read([text]) == parts
    assert read(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello",
        "  \n",
        '{"city": "Bern"}',
        '{"name": "unknown", "parameters": {}}',
        '{"name": "weather"}',
        '{"name": "weather", "parameters": "Bern"}',
        '{"name": 1, "parameters": {}}',
        '{"parameters": {"name": "weather"}}',
        '{"name": "weather", "parameters"',
        '{"name": "weather" "parameters": {}}',
        '{"type": "function", "name": "weather", "parameters": {oops}}',
        "[1, 2, 3]",
        "{}",
        "{",
        PYTHON,
        PYTHON + 'search.call(query="x")',
        "a <b> {c} < d",
        OPEN,
        f"{OPEN} search {CLOSE}",
        f'{OPEN}{{"name": "unknown", "arguments": {{}}}}{CLOSE}',
        "Words first. {'name': 'weather'}",
        'Words first. {"name": "weather", "parameters": {}}',
    ],
)
def test_what_is_no_call_of_a_known_tool_is_content(text):
    """To the last character, in one piece and in many."""
    for pieces in ([text], text):
        assert read(pieces) == ([Content(text)] if text else [])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"name": "search", "parameters": {"q": "ab', call("search", '{"q": "ab')),
        ('{"name": "search", "parameters": {}', call("search", "{}")),
        (f'{OPEN}{{"name": "search", "arguments": {{}}}}\n</tool', call("search", "{}")),
        (
            '{"name": "search", "parameters": {}, "more": 1}',
            [*call("search", "{}"), Content(', "more": 1}')],
        ),
        (
            f'{OPEN}{{"name": "search", "arguments": {{}}}} oops {CLOSE}',
            [*call("search", "{}"), Content(f" oops {CLOSE}")],
        ),
    ],
)
def test_a_call_that_breaks_off_stays_as_far_as_it_came(text, parts):
    """Arguments that never end are arguments; what does not belong to the call is content."""
    assert read([text]) == parts
    assert read(text) == parts


def test_arguments_are_told_while_they_come():
    """The name first, then each piece of the arguments as it arrives."""
    reader = ToolReader(NAMES)
    pieces = ['{"name": "search", ', '"parameters"', ': {"q', '": "a\\', '"b"', "}", "}"]
    assert [reader.read(piece) for piece in pieces] == [
        [],
        [],
        [CallBegun("search"), CallArguments('{"q')],
        [CallArguments('": "a\\')],
        [CallArguments('"b"')],
        [CallArguments("}")],
        [],
    ]
    assert reader.end() == []


def test_content_is_told_while_it_comes():
    """Only what may begin a call is held back, white space before it included."""
    reader = ToolReader(NAMES)
    assert reader.read("Hi") == [Content("Hi")]
    assert reader.read(" <") == []
    assert reader.read("b") == [Content(" <b")]
    assert reader.read("> {") == [Content("> {")]


def test_an_object_of_other_keys_is_told_at_once():
    """JSON that is no call does not wait for its end."""
    reader = ToolReader(NAMES)
    assert reader.read('{"answer') == [Content("{"), Content('"answer')]


def test_without_parallel_calls_the_second_is_content():
    """One call, and what follows is shown as it is."""
    second = f'{OPEN}{{"name": "search", "arguments": {{}}}}{CLOSE}'
    assert read([second + second], parallel=False) == [*call("search", "{}"), Content(second)]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(), values, max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)
calls = st.tuples(st.sampled_from(NAMES), arguments)
near = st.sampled_from(
    [
        *(OPEN, CLOSE, PYTHON, "{", "}", "[", "]", '"', "\\", ";", " ", "\n", "<", "<tool", "a"),
        *('{"name": "search", "parameters": {', '"name"', ": ", '"weather"', ', "arguments": '),
    ]
)


@st.composite
def cut(draw, texts):
    """A text and a way to cut it into pieces."""
    text = draw(texts)
    ends = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@settings(max_examples=1500, deadline=None)
@given(cut(st.lists(near, max_size=14).map("".join)))
def test_any_cut_of_any_text_reads_the_same(cutting):
    """Pieces are an accident of time; text near to a call is no exception."""
    text, pieces = cutting
    assert read(pieces) == read([text]) == read(text)


@settings(max_examples=500, deadline=None)
@given(cut(st.lists(near, max_size=14).map("".join)))
def test_nothing_of_a_text_without_calls_is_lost(cutting):
    """What is no call comes out as it went in."""
    text, pieces = cutting
    parts = read(pieces)
    if not any(isinstance(part, CallBegun) for part in parts):
        assert parts == ([Content(text)] if text else [])


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(calls, min_size=1, max_size=3))
def test_every_call_is_read_from_every_form(data, wanted):
    """Names and arguments arrive to the letter, in order, from all three forms."""
    objects = [f'{{"name": "{name}", "parameters": {text}}}' for name, text in wanted]
    tagged = [f"{OPEN}\n{text}\n{CLOSE}" for text in objects]
    words = st.sampled_from(["", "I look it up.", "Well, {that} <is> that:"])
    texts = st.sampled_from(
        [PYTHON + "; ".join(objects), f"[{', '.join(objects)}]", "\n".join(tagged)]
    )
    lead = data.draw(words)
    texts = st.just("\n".join([lead, *tagged])) if lead else texts
    _, pieces = data.draw(cut(texts))
    content = [Content(lead)] if lead else []
    assert read(pieces) == content + [part for one in wanted for part in call(*one)]
