"""Conversations of every shape come through the templates of every family."""

import json
import time

import pytest

from serve_app.engine.text import history
from serve_app.engine.text.conversation import RESERVED, ChatRenderer
from serve_app.errors import InvalidRequest, UnsupportedParameter
from serve_app.protocol import ChatPrompt
from tests.models import make_tokenizer
from tests.templates import (
    DEEPSEEK,
    GEMMA_2,
    GEMMA_3,
    LLAMA_3,
    MISTRAL,
    QWEN_2,
    QWEN_3,
    TEMPLATES,
)

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def renderer(template, **options):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return ChatRenderer(tokenizer, **options)


def render(template, *messages, **options):
    return renderer(template).render(ChatPrompt(messages, **options))


def says(role, content, **fields):
    return {"role": role, "content": content, **fields}


def calls(*arguments, content="", ids="ab"):
    made = [
        {"id": id_, "type": "function", "function": {"name": "f", "arguments": each}}
        for id_, each in zip(ids, arguments, strict=False)
    ]
    return says("assistant", content, tool_calls=made)


def result(id_, content):
    return says("tool", content, tool_call_id=id_, name="f")


USER, ANSWER = says("user", "hi"), says("assistant", "yes")
PARALLEL = (
    USER,
    calls({"x": 1}, {"x": 2}, content="I look."),
    result("b", "two"),
    result("a", "one"),
    says("assistant", "done"),
    says("user", "and?"),
)


def test_conversation_shows_two_calls_of_an_answer_as_two_answers():
    """Llama 3 shows one call a message; the words beside them are said once."""
    text = render(LLAMA_3, *PARALLEL)
    assert text == (
        "<user>hi</user>"
        '<c>{"name": "f", "parameters": {"x": 1}}</c><r>"one"</r>'
        '<c>{"name": "f", "parameters": {"x": 2}}</c><r>"two"</r>'
        "<assistant>done</assistant><user>and?</user><assistant>"
    )


def test_conversation_gives_ids_the_form_that_the_template_wants():
    """Of calls and their results alike; ids that are right stay."""
    text = render(MISTRAL, *PARALLEL)
    a, b = history.short_id("a"), history.short_id("b")
    assert len({a, b}) == 2
    assert all(len(each) == 9 and each.isalnum() for each in (a, b))
    assert f"}}#{a}" in text
    assert f"one#{a}" in text
    assert f"two#{b}" in text
    good = (USER, calls({}, ids=["aB3456789"]), result("aB3456789", "one"))
    assert render(MISTRAL, *good).count("#aB3456789") == 2


SYSTEMS = [
    ((says("system", "a"), says("system", "b"), USER), "<system>a\n\nb</><user>hi</><assistant>"),
    (
        (says("system", "a"), USER, says("system", "b"), ANSWER, says("user", "so")),
        "<system>a\n\nb</><user>hi</><assistant>yes</><user>so</><assistant>",
    ),
    ((USER, says("system", "b")), "<system>b</><user>hi</><assistant>"),
]


@pytest.mark.parametrize(("messages", "text"), SYSTEMS)
def test_conversation_joins_system_messages_to_the_first(messages, text):
    """Those at the beginning, or all of them, in their order."""
    assert render(QWEN_3, *messages) == text


@pytest.mark.parametrize("template", [MISTRAL, GEMMA_2, GEMMA_3])
def test_conversation_alternates_roles_where_it_has_to(template):
    """Neighbours of one role are joined, in order and with nothing lost."""
    messages = (says("user", "a"), says("user", "b"), says("assistant", "c"), says("user", "d"))
    text = render(template, *messages)
    assert "a\n\nb" in text
    assert text.index("b") < text.index("c") < text.index("d")


@pytest.mark.parametrize("template", [MISTRAL, GEMMA_2, GEMMA_3, QWEN_3])
def test_conversation_may_begin_with_a_greeting(template):
    """An empty message of the user stands before it."""
    assert "welcome" in render(template, says("assistant", "welcome"), says("user", "thanks"))


def test_conversation_without_a_system_role_shows_it_as_the_user():
    """In front of the first words."""
    text = render(GEMMA_2, says("system", "be brief"), USER)
    assert text == "<user>be brief\n\nhi</><model>"


@pytest.mark.parametrize("template", [GEMMA_2, GEMMA_3])
def test_conversation_without_tools_shows_calls_and_results_as_text(template):
    """In a form that is read as a call again when the model repeats it."""
    text = render(template, says("system", "be brief"), *PARALLEL)
    assert '{"name": "f", "parameters": {"x": 1}}' in text
    assert "Result of f: one" in text
    assert text.startswith("<user>be brief")


def test_conversation_gives_arguments_as_text_where_the_template_adds_them_to_one():
    """DeepSeek's does; the others get an object."""
    assert '<call>function f {"x": 1}</call>' in render(DEEPSEEK, USER, calls({"x": 1}))


def test_conversation_shows_arguments_that_are_no_object_in_one():
    """A model may have written them so; Qwen's template goes through their items."""
    assert "<parameter=text>{oops</parameter>" in render(QWEN_3, USER, calls("{oops"))


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize(
    "messages",
    [
        (USER,),
        PARALLEL,
        (says("system", "a"), says("system", "b"), *PARALLEL, says("system", "c")),
        (ANSWER, USER, USER),
        (says("system", "a"),),
        (USER, ANSWER, ANSWER, USER),
        (USER, calls({"x": 1}, ids=["call_1"]), result("call_1", "one")),
        (USER, calls("{oops", {}), result("a", ""), result("b", ""), result("z", "")),
        (result("z", "alone"),),
    ],
)
def test_conversation_of_any_history_is_taken_by_every_family(name, messages):
    """Every family takes every history in some form."""
    assert render(TEMPLATES[name], *messages, tools=(TOOL,))


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (LLAMA_3, (says("system", "a"), says("system", "b"), USER, USER)),
        (LLAMA_3, (USER, calls({"x": 1}, ids=["not nine"]), result("not nine", "one"), ANSWER)),
        (MISTRAL, (says("system", "a"), USER, ANSWER, USER)),
        (MISTRAL, (USER, calls({}, {}, ids=["a23456789", "b23456789"]), result("b23456789", "x"))),
        (QWEN_2, (says("system", "a"), *PARALLEL, says("system", "b"), USER, USER)),
        (QWEN_3, (says("system", "a"), *PARALLEL)),
        (GEMMA_3, (says("system", "a"), USER, ANSWER, USER)),
        (DEEPSEEK, (says("system", "a"), says("system", "b"), ANSWER, USER, USER)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"tools": (TOOL,)}])
def test_conversation_that_a_template_takes_is_rendered_as_it_came(
    template, messages, options, monkeypatch
):
    """To the byte as transformers does it, and no other form is even looked at."""

    def never(_messages):
        pytest.fail("another form was asked for")
        yield

    monkeypatch.setattr(history, "forms", never)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    theirs = tokenizer.apply_chat_template(
        list(messages),
        tools=list(options.get("tools", ())) or None,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert ChatRenderer(tokenizer).render(ChatPrompt(messages, **options)) == theirs


def test_conversation_refused_is_reported_in_the_templates_own_words():
    """Those about what the client sent, when no other form helps either."""
    stubborn = "{{ raise_exception(messages | length ~ ' are not enough') }}"
    with pytest.raises(InvalidRequest, match="refuses this conversation: 2 are not enough"):
        render(stubborn, USER, USER)


def test_conversation_forms_share_one_budget():
    """A template that takes long for each is stopped as soon as one that takes long once."""
    slow = (
        "{% for i in range(100000) %}{% if i == 99999 %}{{ raise_exception('no') }}{% endif %}"
        "{% for j in range(3) %}{% endfor %}{% endfor %}"
    )
    began = time.thread_time()
    with pytest.raises(InvalidRequest):
        render(slow, says("system", "a"), says("system", "b"), *PARALLEL, USER, ANSWER)
    assert time.thread_time() - began < 3


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_conversation_cannot_steer_the_renderer(name):
    """A client chooses variables of the template, not another template or another output."""
    with pytest.raises(InvalidRequest, match=name) as caught:
        render(QWEN_2, USER, template_kwargs={name: "x"})
    assert caught.value.param == "chat_template_kwargs"


def test_conversation_runs_a_requests_template_only_where_it_is_trusted():
    """It is a program; the refusal names the field and the setting."""
    prompt = ChatPrompt((USER,), chat_template="{{ messages[0].content }}!")
    with pytest.raises(UnsupportedParameter, match="trust_request_chat_template") as caught:
        renderer(QWEN_2).render(prompt)
    assert caught.value.param == "chat_template"
    assert renderer(QWEN_2, trust_templates=True).render(prompt) == "hi!"
    assert renderer(None, trust_templates=True).render(prompt) == "hi!"


@pytest.mark.parametrize(
    ("template", "shows"),
    [
        *((TEMPLATES[name], name in ("llama-3", "qwen-2")) for name in sorted(TEMPLATES)),
        ("{{ messages }}", False),
        ("{% if tools %}{{ tools | tojson }}{% endif %}{{ messages }}", True),
        ({"default": "{{ messages }}", "tool_use": "{{ tools }}{{ messages }}"}, True),
        ({"default": "{{ messages }}"}, False),
        ("{{ raise_exception('no') }}", False),
        (None, False),
    ],
)
def test_renderer_finds_out_whether_tools_are_shown(template, shows):
    """By rendering with one and without."""
    assert renderer(template).shows_tools() is shows


def test_renderer_chooses_named_templates_as_transformers_does():
    """`tool_use` where there are tools, else `default`."""
    named = {"default": "plain", "tool_use": "{{ tools | tojson }}"}
    assert render(named, USER) == "plain"
    assert json.loads(render(named, USER, tools=(TOOL,))) == [TOOL]
    with pytest.raises(InvalidRequest, match="no chat template"):
        render({"rag": "x"}, USER)


def test_conversation_hands_thoughts_to_templates_by_every_name():
    """`reasoning_content`, and `thinking` as gpt-oss reads it."""
    thought = says("assistant", "so", reasoning_content="hm")
    assert "<think>hm</think>so" in render(QWEN_3, USER, thought)
    assert render("{{ messages[0].thinking }}", thought) == "hm"
