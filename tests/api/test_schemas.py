"""Types and ranges of every honoured field, and messages that name it."""

import time

import pytest
from pydantic import ValidationError

from serve_app.api.schemas import ChatRequest, CompletionRequest, validate
from serve_app.errors import InvalidRequest, UnsupportedParameter
from serve_app.protocol import TextPrompt, TokenPrompt

HELLO = {"messages": [{"role": "user", "content": "hi"}]}
ONCE = {"prompt": "Once"}


def refused(schema, body):
    with pytest.raises(InvalidRequest) as caught:
        validate(schema, body)
    return caught.value


STOPS = [chr(ord("A") + n) for n in range(64)]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", [1, ["x"], {}]),
        ("max_tokens", [-2, 1.5, "8", True, 2**31, 10**400]),
        ("max_completion_tokens", [-2, 1.5, "8", True]),
        ("n_predict", [-2, 1.5, "8", 0]),
        ("temperature", [-0.01, 2.01, "1", True, float("inf"), [1]]),
        ("top_p", [-1, 1.01, "1"]),
        ("top_k", [-2, 0.5, "1", 2**31]),
        ("seed", [2**63, -(2**63) - 1, 1.5, "1"]),
        (
            "stop",
            [["a"] * 129, [1], 1, {"a": 1}, "x" * 1025, [["a"]], ["x" * 1000 + c for c in STOPS]],
        ),
        ("stop_token_ids", [1, ["1"], [-1], [2**31], [True], [1] * 257]),
        ("ignore_eos", ["yes", 1]),
        ("min_p", [-0.1, 1.1, "0"]),
        ("frequency_penalty", [-2.01, 2.01, "1"]),
        ("presence_penalty", [-2.01, 2.01, "1"]),
        ("repetition_penalty", [0, -1, 101, "1", 1e-45, 1e-300, 0.0099]),
        (
            "logit_bias",
            [
                [],
                {"a": 1},
                {"-1": 1},
                {"1.0": 1},
                {"²": 1},
                {"2147483648": 1},
                {"1": 100.1},
                {"1": -101},
                {"1": "5"},
                {"1": True},
                {"1": None},
                {str(token): 1 for token in range(1025)},
            ],
        ),
        ("min_tokens", [-1, 1.5, "1"]),
        ("n", [0, 129, "2", 1.5]),
        ("best_of", [0, 2, 129, "1"]),
        ("stream", ["true", 1]),
        ("stream_options", [True, [], "usage"]),
    ],
)
@pytest.mark.parametrize(("schema", "smallest"), [(ChatRequest, HELLO), (CompletionRequest, ONCE)])
def test_schemas_refuse_a_wrong_value_by_name(schema, smallest, name, values):
    """The message and `param` name the field; nothing is coerced."""
    for value in values:
        error = refused(
            schema,
            smallest | {name: value} | ({"stream": True} if name == "stream_options" else {}),
        )
        assert error.param is not None, value
        assert error.param.split("[")[0] == name, value
        assert f"`{error.param}`" in error.message


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [1, 2**31 - 1, -1, 4.0, 0]),
        ("max_completion_tokens", [1, -1, 4.0]),
        ("n_predict", [1, -1, 4.0]),
        ("temperature", [0, 2, 0.7]),
        ("top_p", [1, 0.001, 0]),
        ("top_k", [-1, 0, 50, 40.0]),
        ("seed", [0, 2**63 - 1, -(2**63), -1, 7.0]),
        ("stop", ["a", [], STOPS, "\n", "", [""], ["a", ""]]),
        ("stop_token_ids", [[], [0, 5]]),
        ("min_p", [0, 1]),
        ("frequency_penalty", [-2, 2]),
        ("presence_penalty", [-2, 2]),
        ("repetition_penalty", [0.01, 100]),
        ("logit_bias", [{}, {"0": -100, "2147483647": 100}]),
        ("min_tokens", [0, 16]),
        ("logprobs", [0, 5, 20, 3.0]),
        ("echo", [True, False]),
        ("best_of", [1]),
        ("n", [1, 128, 2.0]),
        ("response_format", [{"type": "json_object"}]),
        ("json_schema", [{"type": "object"}]),
        ("regex", ["a+"]),
    ],
)
def test_schemas_accept_the_ends_of_each_range_and_null(name, values):
    """Ranges include their ends; null means absent."""
    for value in [*values, None]:
        assert validate(CompletionRequest, ONCE | {name: value}).prompt


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("a", (TextPrompt("a"),)),
        (["a", "b"], (TextPrompt("a"), TextPrompt("b"))),
        ("", (TextPrompt(""),)),  # a document's beginning; the engine knows whether there is one
        ([""], (TextPrompt(""),)),
        ([1, 2], (TokenPrompt((1, 2)),)),
        ([[1], [2, 3]], (TokenPrompt((1,)), TokenPrompt((2, 3)))),
    ],
)
def test_schemas_take_four_forms_of_a_prompt(prompt, parsed):
    """String, strings, token ids, lists of token ids."""
    assert validate(CompletionRequest, {"prompt": prompt}).prompt == parsed


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], ["a", 1], [1, "a"], [[1], "a"], [True], [1.5], [-1], [2**31], None, {}, 3],
    ids=repr,
)
def test_schemas_refuse_other_prompts(prompt):
    """Lists of nothing, mixed and impossible prompts never reach the engine."""
    assert refused(CompletionRequest, {"prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("schema", "smallest", "name", "values"),
    [
        (ChatRequest, HELLO, "max_tokens", [0]),
        (ChatRequest, HELLO, "max_completion_tokens", [0, "1"]),
        (ChatRequest, HELLO, "logprobs", [1, "true"]),
        (ChatRequest, HELLO, "top_logprobs", [-1, 21, "1", True]),
        (ChatRequest, HELLO, "add_generation_prompt", [1]),
        (ChatRequest, HELLO, "continue_final_message", ["yes"]),
        (CompletionRequest, ONCE, "logprobs", [-1, 21, True, 1.5]),
        (CompletionRequest, ONCE, "echo", [1, "yes"]),
    ],
)
def test_schemas_refuse_a_wrong_value_of_one_endpoint_by_name(schema, smallest, name, values):
    """Fields that only one of them has, or that each has in its own range."""
    for value in values:
        assert refused(schema, smallest | {"logprobs": None, name: value}).param == name


def test_schemas_refuse_a_least_number_of_tokens_over_the_limit():
    """`min_tokens` fits under the limit, whichever field sets it."""
    for schema, body in [
        (CompletionRequest, ONCE | {"min_tokens": 17}),
        (ChatRequest, HELLO | {"min_tokens": 9, "max_tokens": 8}),
        (ChatRequest, HELLO | {"min_tokens": 9, "max_tokens": 10, "max_completion_tokens": 8}),
    ]:
        assert refused(schema, body).param == "min_tokens"
    assert validate(ChatRequest, HELLO | {"min_tokens": 9})


def test_schemas_refuse_an_answer_both_begun_and_continued():
    """Asking for both ends of the prompt is a contradiction."""
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refused(ChatRequest, HELLO | both).param == "continue_final_message"


def test_schemas_bound_prompts_times_n():
    """One request cannot ask for more choices than `n` alone may."""
    assert validate(CompletionRequest, {"prompt": ["a"] * 64, "n": 2})
    error = refused(CompletionRequest, {"prompt": ["a"] * 65, "n": 2})
    assert "128" in error.message


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hi", "messages"),
        ([], "messages"),
        ([1], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": None}], "messages[0]"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ([{"role": "system"}], "messages[0]"),
        ([{"role": "user", "content": {"a": 1}}], "messages[0].content"),
        ([{"role": "assistant", "content": {"a": 1}}], "messages[0].content"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": "x", "name": 1}],
            "messages[1].name",
        ),
    ],
)
def test_schemas_refuse_a_wrong_conversation_by_place(messages, param):
    """`param` is the path of the first fault."""
    assert refused(ChatRequest, {"messages": messages}).param == param


@pytest.mark.parametrize(
    "extra",
    [
        {"content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]},
        {"role": "user", "content": [{"type": "refusal", "refusal": "x"}]},
        {"role": "system", "content": [{"type": "thinking", "thinking": "x"}]},
        {"function_call": {"name": "f"}},
        {"audio": {"id": "a"}},
    ],
)
def test_schemas_refuse_what_a_message_cannot_carry_here(extra):
    """Images and audio are refused, never dropped."""
    with pytest.raises(UnsupportedParameter) as caught:
        validate(ChatRequest, {"messages": [{"role": "assistant", "content": "x"} | extra]})
    assert caught.value.param == f"messages[0].{[*extra][-1]}"


def test_schemas_take_an_answer_of_ours_back():
    """The official client returns a message with all its nulls and empty lists."""
    back = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert validate(ChatRequest, {"messages": [back]}).messages[0].content == "yes"


def test_schemas_make_lines_of_text_parts():
    """Parts of type text are one text, a line for each."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = validate(ChatRequest, {"messages": [{"role": "user", "content": parts}]})
    assert body.messages[0].content == "a\nb"


def test_schemas_ignore_stream_options_without_a_stream():
    """Clients leave them in when they switch streaming off; their types still count."""
    for options in ({}, {"include_usage": True}, {"include_obfuscation": True}, None):
        assert validate(ChatRequest, HELLO | {"stream_options": options})
        assert validate(ChatRequest, HELLO | {"stream": True, "stream_options": options})


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, (None, 16)),
        ({"max_tokens": 4.0}, (4, 4)),
        ({"max_tokens": -1}, (None, None)),
        ({"n_predict": 7}, (7, 7)),
        ({"n_predict": -1}, (None, None)),
        ({"max_completion_tokens": 5}, (5, 5)),
        ({"max_completion_tokens": 5, "max_tokens": 3, "n_predict": 2}, (5, 5)),
        ({"max_tokens": 3, "n_predict": 2}, (3, 3)),
        ({"max_completion_tokens": None, "max_tokens": 3}, (3, 3)),
    ],
    ids=str,
)
def test_schemas_know_many_names_of_the_limit(fields, limit):
    """OpenAI's two and llama.cpp's one; the newest counts, and -1 is no limit."""
    chat = validate(ChatRequest, HELLO | fields)
    completion = validate(CompletionRequest, ONCE | fields)
    assert (chat.limit, completion.limit) == limit


def test_schemas_take_a_seed_of_minus_one_as_none():
    """So do vLLM and llama.cpp."""
    assert validate(ChatRequest, HELLO | {"seed": -1}).seed is None
    assert validate(ChatRequest, HELLO | {"seed": -2}).seed == -2


def test_schemas_quote_no_value():
    """Not even a short one."""
    for name in ("temperature", "seed", "stop", "n", "model"):
        assert "diary" not in refused(ChatRequest, HELLO | {name: {"diary": "diary"}}).message


def test_schemas_take_template_variables_as_an_object():
    """Which names it may hold is the engine's to say, which knows the template."""
    assert (
        refused(ChatRequest, HELLO | {"chat_template_kwargs": [1]}).param == "chat_template_kwargs"
    )
    assert validate(ChatRequest, HELLO | {"chat_template_kwargs": {"enable_thinking": False}})


CALLING = {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}] * 1024}
WRONG = {
    "messages[0]": ({"messages": [1] * 8192}, ChatRequest),
    "messages[1].role": ({"messages": [HELLO["messages"][0], *[{}] * 8191]}, ChatRequest),
    "messages[0].tool_calls[0].function": ({"messages": [CALLING] * 8192}, ChatRequest),
    "tools[0]": ({**HELLO, "tools": [1] * 128}, ChatRequest),
    "stop_token_ids[0]": ({**HELLO, "stop_token_ids": ["a"] * 256}, ChatRequest),
}
LONG = {
    "messages": ({"messages": HELLO["messages"] * 500_000}, ChatRequest),
    "messages[0].tool_calls": (
        {"messages": [CALLING | {"tool_calls": [{}] * 500_000}]},
        ChatRequest,
    ),
    "tools": ({**HELLO, "tools": [{}] * 500_000}, ChatRequest),
    "stop_token_ids": ({**HELLO, "stop_token_ids": [0] * 500_000}, ChatRequest),
    "prompt": ({"prompt": ["a"] * 500_000}, CompletionRequest),
    "guided_choice": ({**HELLO, "guided_choice": ["a"] * 500_000}, ChatRequest),
    "logit_bias": ({**HELLO, "logit_bias": {str(n): 0 for n in range(500_000)}}, ChatRequest),
}


@pytest.mark.parametrize("param", WRONG)
def test_schemas_stop_a_list_at_its_first_fault(param):
    """A thousand wrong entries cost what one costs."""
    body, schema = WRONG[param]
    assert refused(schema, body).param == param
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(body)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("param", LONG)
def test_schemas_bound_the_length_of_a_list(param):
    """Which is looked at before its entries are; half a million of them would take seconds."""
    body, schema = LONG[param]
    began = time.perf_counter()
    error = refused(schema, body)
    assert time.perf_counter() - began < 0.2
    assert error.param == param
    assert "at most" in error.message or "1 to 16384" in error.message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "`messages`: must hold at least 1"),
        ({"temperature": 3}, "`temperature`: must be at most 2"),
        ({"top_p": -1}, "`top_p`: must be at least 0"),
        ({"frequency_penalty": -3}, "`frequency_penalty`: must be at least -2"),
        ({"n": 0}, "`n`: must be at least 1"),
        ({"top_k": "1"}, "`top_k`: must be a whole number"),
        ({"temperature": "1"}, "`temperature`: must be a number"),
        ({"stream": 1}, "`stream`: must be true or false"),
        ({"model": 1}, "`model`: must be a string"),
        ({"tools": 1}, "`tools`: must be a list"),
        ({"messages": [1]}, "`messages[0]`: must be an object"),
        ({"stop_token_ids": [1] * 257}, "`stop_token_ids`: must hold at most 256"),
        ({"repetition_penalty": 1e-45}, "`repetition_penalty`: must be at least 0.01"),
    ],
    ids=str,
)
def test_schemas_speak_plain_words(fields, words):
    """They speak of JSON and of the range; not of a validator, of Python or of its types."""
    assert refused(ChatRequest, HELLO | fields).message == words


def test_schemas_leave_out_empty_stop_strings():
    """They are left out, and each other one stands once."""
    for stop, kept in [("", ()), (["a", "", "b", "a"], ("a", "b")), ([], ())]:
        assert validate(ChatRequest, HELLO | {"stop": stop}).stop == kept
