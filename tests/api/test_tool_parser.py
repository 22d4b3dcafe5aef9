"""Tool calls are read out of any text, however it is cut, and nothing is lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.api.tool_parser import CallArguments, CallBegun, Content, ToolReader

NAMES = ("weather", "search")
OPEN, CLOSE, PYTHON = "<tool_call>", "</tool_call>", "<|python_tag|>"
START, END, TOOL_CALLS = "<|python_start|>", "<|python_end|>", "[TOOL_CALLS]"


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


SCHEMAS = {
    "weather": {
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": ["boolean", "null"]},
            "units": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "where": {"type": "object"},
            "list": {"type": "array"},
            "any": {},
        }
    }
}

FORMS = [
    # Llama 3: with and without its tag, several, keys in any order
    ('{"name": "weather", "parameters": {"city": "Bern"}}', call("weather", '{"city": "Bern"}')),
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
        '{"type": "function", "name": "search", "parameters": {"q": "é"}}',
        call("search", '{"q": "é"}'),
    ),
    ('{"id": "a", "parameters": {"q": 1}, "name": "search"}', call("search", '{"q": 1}')),
    (
        '{"type": "function", "function": {"name": "search", "arguments": {"q": 1}}}',
        call("search", '{"q": 1}'),
    ),
    ('{"type": "function", "function": "search", "parameters": {}}', call("search", "{}")),
    # arguments as a string, null, absent; more members behind them
    (
        '{"name": "search", "arguments": "{\\"q\\": \\"a\\\\nb \\ud83d\\ude00 \\u00e9\\"}"}',
        call("search", '{"q": "a\\nb 😀 é"}'),
    ),
    ('{"arguments": "{\\"q\\": 1}", "name": "search"}', call("search", '{"q": 1}')),
    ('{"name": "search", "parameters": null}', call("search", "{}")),
    ('{"name": "search", "arguments": ""}', call("search", "{}")),
    ('{"name": "search"}', call("search", "{}")),
    (
        '[{"name": "search", "arguments": {}, "id": "a"}, {"name": "weather"}]',
        call("search", "{}") + call("weather", "{}"),
    ),
    # Hermes, Qwen
    (
        f'{OPEN}\n{{"name": "search", "arguments": {{"q": "\\"{{"}}}}\n{CLOSE}',
        call("search", '{"q": "\\"{"}'),
    ),
    (
        f'Let me see.\n{OPEN}{{"name": "search", "arguments": {{}}}}{CLOSE}\n'
        f'{OPEN}{{"name": "weather", "arguments": {{}}}}{CLOSE}\nDone.',
        [Content("Let me see."), *call("search", "{}"), *call("weather", "{}"), Content("\nDone.")],
    ),
    (f'{OPEN}{{"arguments": {{"q": 1}}, "name": "search"}}{CLOSE}', call("search", '{"q": 1}')),
    (
        f'{OPEN}[{{"name": "search", "arguments": {{}}}}, {{"name": "weather"}}]{CLOSE}',
        call("search", "{}") + call("weather", "{}"),
    ),
    (
        f'{OPEN}{{"name": "search", "arguments": {{}}}}\n{{"name": "weather"}}\n{CLOSE}',
        call("search", "{}") + call("weather", "{}"),
    ),
    (f'{OPEN}{{"name": "search", "arguments": {{}}\n{CLOSE}', call("search", "{}")),
    (f'{OPEN}{{"name": "search", "arguments": {{}}}}}}\n{CLOSE}', call("search", "{}")),
    # fenced, after words, after thoughts
    ('```json\n{"name": "search", "parameters": {"q": 1}}\n```', call("search", '{"q": 1}')),
    ('```\n[{"name": "search", "arguments": {}}]\n```\n', call("search", "{}")),
    (
        'I look:\n\n```json\n{"name": "search", "arguments": {}}\n```\nSo.',
        [Content("I look:"), *call("search", "{}"), Content("\nSo.")],
    ),
    ("```tool_code\nsearch(q='a')\n```", call("search", '{"q": "a"}')),
    (
        'I will look it up. {"name": "search", "parameters": {"q": 1}}',
        [Content("I will look it up."), *call("search", '{"q": 1}')],
    ),
    (
        'Sure!\n[{"name": "search", "parameters": {}}, {"name": "weather", "parameters": {}}]',
        [Content("Sure!"), *call("search", "{}"), *call("weather", "{}")],
    ),
    (
        '<think>\nI could {"name": "search", "parameters": {}}.\n</think>\n\n'
        '{"name": "weather", "parameters": {}}',
        [
            Content('<think>\nI could {"name": "search", "parameters": {}}.\n</think>'),
            *call("weather", "{}"),
        ],
    ),
    ("hm</think>[search(q=1)]", [Content("hm</think>"), *call("search", '{"q": 1}')]),
    # Python
    ('[weather(city="Bern")]', call("weather", '{"city": "Bern"}')),
    (
        "[weather(city='Bern', days=3), search(q=[1, 2.5, -3], deep={'a': (True, None), 2: {}})]",
        call("weather", '{"city": "Bern", "days": 3}')
        + call("search", '{"q": [1, 2.5, -3], "deep": {"a": [true, null], "2": {}}}'),
    ),
    ("[search()]", call("search", "{}")),
    ("[search(q='')]", call("search", '{"q": ""}')),
    (
        "[search(q='it\\'s \\x41\\u00e9\\n \\d \"q\" \\ud83d\\ude00 \\U0001f600')]",
        call(
            "search", '{"q": "it\'s \\u0041\\u00e9\\n \\\\d \\"q\\" \\ud83d\\ude00 \\ud83d\\ude00"}'
        ),
    ),
    ('[search(q="""a "b"\nc""", )]', call("search", '{"q": "a \\"b\\"\\nc"}')),
    (START + '[weather(city="Bern")]' + END, call("weather", '{"city": "Bern"}')),
    (START + '{"name": "search", "parameters": {}}' + END, call("search", "{}")),
    (PYTHON + 'search(q="a")', call("search", '{"q": "a"}')),
    ('search(q="a")', call("search", '{"q": "a"}')),
    ("search()\n", call("search", "{}")),
    ('One moment. [search(q="a")]', [Content("One moment."), *call("search", '{"q": "a"}')]),
    # tags with the name in them
    ('<function name="search">{"q": "a"}</function>', call("search", '{"q": "a"}')),
    ("<function='search'></function>", call("search", "{}")),
    (
        '<function name="weather"><parameter name="city">Bern</parameter></function>',
        call("weather", '{"city": "Bern"}'),
    ),
    ('{"name": "search", "args": {"q": "a"}}', call("search", '{"q": "a"}')),
    ('{"input": {"q": "a"}, "name": "search"}', call("search", '{"q": "a"}')),
    ('<function=search>{"q": "</function>"}</function>', call("search", '{"q": "</function>"}')),
    (
        "I look.\n<function=search>\n</function>\n<function=weather>{}</function>",
        [Content("I look."), *call("search", "{}"), *call("weather", "{}")],
    ),
    (
        f"{OPEN}\n<function=weather>\n<parameter=city>\nBern\nCH\n</parameter>\n<parameter=days>"
        f"\n3\n</parameter>\n</function>\n{CLOSE}",
        call("weather", '{"city": "Bern\\nCH", "days": 3}'),
    ),
    # Mistral
    (TOOL_CALLS + '[{"name": "search", "arguments": {"q": 1}}]', call("search", '{"q": 1}')),
    (
        TOOL_CALLS + 'search{"q": 1}' + TOOL_CALLS + "weather{}",
        call("search", '{"q": 1}') + call("weather", "{}"),
    ),
    (TOOL_CALLS + 'search[CALL_ID]aB3456789[ARGS]{"q": 1}', call("search", '{"q": 1}')),
    ('search[ARGS]{"q": 1}', call("search", '{"q": 1}')),
    ('search{"q": 1}', call("search", '{"q": 1}')),
    ('Well. [TOOL_CALLS]search{"q": 1}', [Content("Well."), *call("search", '{"q": 1}')]),
]


@pytest.mark.parametrize(("text", "parts"), FORMS)
def test_tool_parser_reads_all_forms_of_calls(text, parts):
    """In one piece and in many; the arguments are JSON."""
    assert read([text], parameters=SCHEMAS) == parts
    assert read(text, parameters=SCHEMAS) == parts
    for part in parts:
        assert not isinstance(part, CallArguments) or isinstance(json.loads(part.text), dict)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello",
        "  \n",
        '{"city": "Bern"}',
        '{"name": "unknown", "parameters": {}}',
        '{"name": "unknown"}',
        '{"name": "weather", "parameters": "Bern"}',
        '{"name": "weather", "parameters": [1]}',
        '{"name": "weathers", "parameters": {}}',
        '{"name": 1, "parameters": {}}',
        '{"parameters": {"name": "weather"}}',
        '{"name": "weather", "parameters"',
        '{"name": "weather" "parameters": {}}',
        '{"type": "object", "name": "weather", "parameters": {}}',
        '{"type": "function", "name": "weather", "parameters": {oops}}',
        "[1, 2, 3]",
        "[weather, search]",
        "[unknown(a=1)]",
        "[weather(city=Bern)]",
        "[weather(1)]",
        "{}",
        "{",
        PYTHON,
        START + "print(1)" + END,
        PYTHON + 'search.call(query="x")',
        "a <b> {c} < d",
        OPEN,
        f"{OPEN} search {CLOSE}",
        f'{OPEN}{{"name": "unknown", "arguments": {{}}}}{CLOSE}',
        "<function=unknown>{}</function>",
        '<function name="unknown">{}</function>',
        '<function id="search">{}</function>',
        "<function='search\">{}</function>",
        "<functions>",
        "<function=search>oops</function>",
        TOOL_CALLS + "unknown{}",
        TOOL_CALLS + "search",
        "search{q}",
        "search",
        "search() is a function.",
        "searching(q=1)",
        "```python\nprint(1)\n```",
        'So: ```python\nsearch(q="a")\n```',
        "Words first. {'name': 'weather'}",
        'Words first. {"name": "weather"}',
        'Write `{"name": "weather", "parameters": {}}` to call it.',
        '{"calls": [{"name": "weather", "parameters": {}}]}',
        'x = [search(q="a")]',
        '<think>I could write {"name": "weather", "parameters": {}}',
        "</think>",
        "<think",
    ],
)
def test_tool_parser_passes_what_is_no_call_of_a_known_tool_as_content(text):
    """To the last character, in one piece and in many."""
    for pieces in ([text], text):
        assert read(pieces) == ([Content(text)] if text else [])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"name": "search", "parameters": {"q": "ab', call("search", '{"q": "ab')),
        ('{"name": "search", "parameters": {}', call("search", "{}")),
        ('{"name": "search", "parameters": {}, "id": "a', call("search", "{}")),
        ('{"name": "search", "parameters": {}, "more": 1}', call("search", "{}")),
        ('{"name": "search", "arguments": "{\\"q\\": 1', call("search", '{"q": 1')),
        (f'{OPEN}{{"name": "search", "arguments": {{}}}}\n</tool', call("search", "{}")),
        (
            f'{OPEN}{{"name": "search", "arguments": {{}}}} oops {CLOSE}',
            [*call("search", "{}"), Content(f" oops {CLOSE}")],
        ),
        ('[search(q="ab', call("search", '{"q": "ab')),
        ('[search(q=1, r=["a", ', call("search", '{"q": 1, "r": ["a"')),
        ('[search(q="a"), wea', call("search", '{"q": "a"}')),
        ('[search(q="a"), and', [*call("search", '{"q": "a"}'), Content(", and")]),
        ('[{"name": "search", "parameters": {}}, {"name": "we', call("search", "{}")),
        (
            '[{"name": "search", "parameters": {}}, {"name": "x',
            [*call("search", "{}"), Content(', {"name": "x')],
        ),
        (f'{OPEN}{{"name": "search"}}{CLOSE}\n{OPEN}{{"name": "we', call("search", "{}")),
        (f'{OPEN}{{"name": "search"}}{CLOSE}\nwe', [*call("search", "{}"), Content("\nwe")]),
        (
            "<function=search><parameter=q>ab</parameter><parameter=r>c",
            call("search", '{"q": "ab"'),
        ),
        ("<function=search>{}</fun", call("search", "{}")),
    ],
)
def test_tool_parser_keeps_a_call_that_breaks_off_as_far_as_it_came(text, parts):
    """Arguments that never end are arguments; what does not belong to the call is content."""
    assert read([text]) == parts
    assert read(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[", []),
        ('[{"name": "wea', []),
        ('[{"name": "weather", "parameters":', []),
        ('[{"name": "weather", "parameters": {"a', call("weather", '{"a')),
        (
            '[{"name": "weather", "parameters": {}}, {"name": "search", "parameters":',
            call("weather", "{}"),
        ),
    ],
)
def test_tool_parser_shows_no_syntax_of_a_forced_call_that_is_cut(text, parts):
    """The text is nothing but calls, so there is no content in it."""
    assert read([text], forced=True) == parts
    assert read(text, forced=True) == parts


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "12", "12"),
        ("city", "null", "null"),
        ("city", " a\n\nb ", " a\n\nb "),
        ("days", "12", 12),
        ("days", " 12 ", 12),
        ("days", "many", "many"),
        ("exact", "True", True),
        ("exact", "FALSE", False),
        ("exact", "null", None),
        ("units", "null", None),
        ("units", "metric", "metric"),
        ("where", '{"x": 1}', {"x": 1}),
        ("where", "{'x': True}", {"x": True}),
        ("list", "[1, 2]", [1, 2]),
        ("any", "12", "12"),
        ("other", "12", "12"),
    ],
)
def test_tool_parser_reads_a_parameters_text_by_the_schema(key, text, value):
    """Texts stay texts, all else is read as JSON or as Python writes it."""
    tagged = f"<function=weather>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
    for pieces in ([tagged], tagged):
        begun, seen = read(pieces, parameters=SCHEMAS)
        assert (begun, json.loads(seen.text)) == (CallBegun("weather"), {key: value})


def test_tool_parser_names_arguments_by_position_from_the_schema():
    """In order, and without those that are named."""
    text = '[weather("Bern", 3, city="x")]'
    for pieces in ([text], text):
        assert read(pieces, parameters=SCHEMAS) == call(
            "weather", '{"city": "Bern", "days": 3, "city": "x"}'
        )


def test_tool_parser_reports_the_value_of_a_call_in_python_while_it_comes():
    """A long text does not wait for its end."""
    reader = ToolReader(NAMES)
    seen = [reader.read(piece) for piece in ["[search(", 'q="a', "b\n", 'c"', ")", "]"]]
    assert seen == [
        [],
        [CallBegun("search"), *map(CallArguments, ('{"q": ', '"', "a"))],
        [CallArguments("b\\n")],
        [CallArguments("c"), CallArguments('"')],
        [CallArguments("}")],
        [],
    ]


def test_tool_parser_reports_arguments_while_they_come():
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


def test_tool_parser_reports_content_while_it_comes():
    """Only what may begin a call is held back, white space before it included."""
    reader = ToolReader(NAMES)
    assert reader.read("Hi") == [Content("Hi")]
    assert reader.read(" <") == []
    assert reader.read("b") == [Content(" <b")]
    assert reader.read("> {") == [Content(">")]
    assert reader.read("x [1] ") == [Content(" {"), Content("x"), Content(" ["), Content("1]")]


def test_tool_parser_reports_an_object_of_other_keys_at_once():
    """JSON that is no call does not wait for its end."""
    reader = ToolReader(NAMES)
    assert reader.read('{"answer') == [Content("{"), Content('"answer')]


def test_tool_parser_gives_one_call_without_parallel_calls():
    """Further ones are left out, what is said beside them is not."""
    one = f'{OPEN}{{"name": "search", "arguments": {{}}}}{CLOSE}'
    seen = [*call("search", "{}"), Content("\nand")]
    assert read([f"{one}\nand {one}"], parallel=False) == seen


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
        *("search", "weather(", "q=", "'", '"""', ")", ",", "1", "True", "</think>", "<think>"),
        *(START, END, TOOL_CALLS, "[ARGS]", "```", "json", "<function=search>", "<parameter=q>"),
        *("</parameter>", "</function>", '"type": "function"', '"function"', "null", "\\u00"),
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
def test_tool_parser_reads_any_cut_of_any_text_the_same(cutting):
    """Pieces are an accident of time; text near to a call is no exception."""
    text, pieces = cutting
    assert read(pieces) == read([text]) == read(text)


@settings(max_examples=500, deadline=None)
@given(cut(st.lists(near, max_size=14).map("".join)))
def test_tool_parser_loses_nothing_of_a_text_without_calls(cutting):
    """What is no call comes out as it went in."""
    text, pieces = cutting
    parts = read(pieces)
    if not any(isinstance(part, CallBegun) for part in parts):
        assert parts == ([Content(text)] if text else [])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(calls, min_size=1, max_size=3))
def test_tool_parser_reads_every_call_from_every_form(data, wanted):
    """Names and arguments arrive to the letter, in order, from all forms that hold JSON."""
    objects = [f'{{"name": "{name}", "parameters": {text}}}' for name, text in wanted]
    tagged = [f"{OPEN}\n{text}\n{CLOSE}" for text in objects]
    words = st.sampled_from(["", "I look it up.", "Well, {that} <is> that:"])
    texts = st.sampled_from(
        [
            PYTHON + "; ".join(objects),
            f"[{', '.join(objects)}]",
            "\n".join(tagged),
            START + "\n".join(objects) + END,
            "".join(f"{TOOL_CALLS}{name}[ARGS]{text}" for name, text in wanted),
            "\n".join(f"<function={name}>{text}</function>" for name, text in wanted),
            f"```json\n[{', '.join(objects)}]\n```",
        ]
    )
    lead = data.draw(words)
    texts = st.just("\n".join([lead, *tagged])) if lead else texts
    _, pieces = data.draw(cut(texts))
    content = [Content(lead)] if lead else []
    assert read(pieces) == content + [part for one in wanted for part in call(*one)]


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    | st.tuples(inner, inner),
    max_leaves=8,
)  # fmt: skip


def as_json(value):
    """Return what a literal is in JSON: a tuple is a list."""
    return json.loads(json.dumps(value))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.data(),
    st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), literals, max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_tool_parser_reads_every_literal_of_python_as_json(data, wanted):
    """Any value that `repr` writes, nested, in any cut."""
    calls = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in wanted
    ]
    _, pieces = data.draw(cut(st.just(f"[{', '.join(calls)}]")))
    seen = read(pieces)
    assert [part.name for part in seen[::2]] == [name for name, _ in wanted]
    assert [json.loads(part.text) for part in seen[1::2]] == [as_json(args) for _, args in wanted]
