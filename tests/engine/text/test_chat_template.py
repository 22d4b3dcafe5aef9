"""Templates are rendered as transformers does, and none runs without end."""

# ruff: noqa: E501 - a template's lines end where its text may

import json
import threading
import time

import pytest

from serve_app.engine.text import chat_template
from serve_app.engine.text.chat_template import (
    Budget,
    TemplateLimit,
    TemplateRefusal,
    check_template,
    render,
)
from tests.models import CHAT_TEMPLATE, make_tokenizer
from tests.templates import TEMPLATES

USER = {"role": "user", "content": "hi"}
CHAT = [
    {"role": "system", "content": "Be <b>kind</b> & 'brief'."},
    USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "a23456789", "type": "function", "function": {"name": "f", "arguments": {}}}
        ],
    },
    {"role": "tool", "content": 'ü \u2028 "1"', "tool_call_id": "a23456789", "name": None},
    {"role": "assistant", "content": "  yes \n", "reasoning_content": "hm"},
    {"role": "user", "content": "so?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d<e>", "parameters": {}}}]
# What templates on the Hub use of Jinja and of transformers' additions to it.
FEATURES = [
    *(each for name, each in TEMPLATES.items() if name in ("llama-3", "qwen-2", "qwen-3")),
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ missing }}{{ messages }}{{ none }}{{ true }}",
    "{%- for m in messages -%}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.revindex0 }}\n{% endfor %}",
    "{% for m in messages[::-1] if m.role != 'user' %}{{ m.role }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for k, v in tools[0].function | items %}{{ k ~ '=' ~ v }};{% endfor %}",
    "{% for k, v in tools[0].function.items() %}{{ k }}{% endfor %}{{ tools[0] | dictsort }}",
    "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.s = ns.s ~ m.role[0] %}{% endfor %}{{ ns.n }}{{ ns.s }}",
    "{% macro show(m, deep=1) %}<{{ m.role }}{{ caller() if caller else '' }}>{% if deep %}"
    "{{ show(m, deep - 1) }}{% endif %}{% endmacro %}{{ show(messages[0]) }}"
    "{% call show(messages[1], 0) %}x{% endcall %}",
    "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ messages | tojson(ensure_ascii=true) }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'eq', "
    "'user') | list | length }}{{ messages | rejectattr('role', 'eq', 'user') | first }}",
    "{{ messages[4].content.strip() }}|{{ messages[4].content | trim }}|{{ 'a,b'.split(',') }}|"
    "{{ 'x'.replace('x', 'yy') }}|{{ '-'.join(['a', 'b']) }}|{{ 'a' * 3 }}|{{ [1] + [2] }}|"
    "{{ '%s of %d' % ('a', 3) }}|{{ '{} {:>4}'.format('a', 3) }}|{{ 7 // 2 }}{{ 2 ** 3 }}{{ 7 % 4 }}",
    "{% set text %}{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ text }}{{ text | length }}",
    "{% filter upper %}a{{ messages[1].content }}{% endfilter %}{% generation %}x{% endgeneration %}",
    "{{ messages[1].content in 'ohio' }}{{ messages is iterable }}{{ tools is not none }}"
    "{{ messages[0] is mapping }}{{ 'a' is string }}{{ dict(a=1) }}{{ raise_exception is defined }}",
    "{{ '<b>' | e }}{{ 'a b' | title | capitalize | upper }}{{ ' x' | indent(2, true) }}"
    "{{ [3, 1, 2] | sort | reverse | list }}{{ 1700000000 | int }}{{ x | default(1700000000) }}",
    "{% for a in [1, 2] recursive %}{{ a }}{% if loop.depth0 == 0 %}{{ loop([3]) }}{% endif %}{% endfor %}",
    "  {% if true %}\n  a\n  {% endif %}\n b {# no #}\n{%- if messages %} c{% endif -%}\n",
]  # fmt: skip


def ours(source, messages=CHAT, *, final=False, cpu_s=5.0, **variables):
    given = {"tools": TOOLS, "documents": None, "add_generation_prompt": not final} | variables
    return render(source, messages, given, continue_final=final, budget=Budget(cpu_s))


@pytest.mark.parametrize("source", FEATURES)
def test_render_gives_the_text_of_transformers(source):
    """To the byte, whatever of Jinja a template uses."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = source
    theirs = tokenizer.apply_chat_template(
        CHAT, tools=TOOLS, add_generation_prompt=True, tokenize=False
    )
    assert ours(source, **tokenizer.special_tokens_map) == theirs


@pytest.mark.parametrize(
    ("source", "content"),
    [
        (CHAT_TEMPLATE, "I am"),
        (CHAT_TEMPLATE, "I am \n"),
        ("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", "I am \n"),
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", ""),
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", "hi"),
    ],
)
def test_render_continues_a_message_as_transformers_does(source, content):
    """The text ends with its last word, whatever the template does to spaces."""
    chat = [USER, {"role": "assistant", "content": content}]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = source
    theirs = tokenizer.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    assert ours(source, chat, final=True) == theirs


def test_render_refuses_to_continue_a_message_that_is_not_shown():
    """Whatever came out would be something else."""
    chat = [USER, {"role": "assistant", "content": "I am"}]
    with pytest.raises(TemplateRefusal, match="cannot be continued"):
        ours("{{ messages[0].content }}", chat, final=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('on purpose') }}",
        "{{ undefined.attribute }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[99].role }}",
        "{{ 1 / 0 }}",
        "{{ messages | fromjson }}",
        "{% if %}",
        "{{ 'x'.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ range(200000) }}",
        "{{ lipsum(2) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_render_refuses_whatever_a_template_does(source):
    """On purpose or by mistake, in its own words; never an error of the engine."""
    with pytest.raises(TemplateRefusal) as caught:
        ours(source)
    assert str(caught.value)


BIG = "{% set b = 'x' * 1000000 %}{% set l = [b] * 100000 %}"
LIST = "{% set l = range(100000) | list %}"
DOUBLING = (
    "{% set n = namespace(x=X) %}{% for i in range(60) %}{% set n.x = n.x OP n.x %}{% endfor %}"
)
ENDLESS = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    LIST + "{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    LIST + "{% for a in l %}{{ l | join | length }}{% endfor %}",
    LIST + "{% for a in l %}{% if -1 in l %}{% endif %}{{ l[1:] | length }}{% endfor %}",
    LIST + "{% for a in l %}{% set x = l | map('string') | list %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for m in messages recursive %}{% if loop.depth0 < 50 %}{{ loop(messages) }}{% endif %}"
    "{% endfor %}",
    *(DOUBLING.replace("X", x).replace("OP", op) for x, op in [("'aa'", "~"), ("'aa'", "+")]),
    *(DOUBLING.replace("X", x).replace("OP", op) for x, op in [("['a']", "+"), ("3", "*")]),
    "{{ 'x' * 1000000000 }}",
    "{{ 1000000000 * [1] }}",
    "{{ 2 ** 1000000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a' | indent(width=1000000000) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).join('b' * 1000000) }}",
    BIG + "{{ l }}",
    BIG + "{{ l | tojson }}",
    BIG + "{{ l | string }}",
    BIG + "{{ l | join }}",
    BIG + "{{ ''.join(l) }}",
    BIG + "{{ '%s' % l }}",
    BIG + "{{ '{}'.format(l) }}",
    BIG + "{{ 'a' ~ l }}",
    BIG + "{% for x in l %}{{ x }}{% endfor %}",
    BIG + "{% set y %}{% for x in l %}{{ x }}{% endfor %}{% endset %}{{ y | length }}",
]  # fmt: skip


@pytest.mark.timed
@pytest.mark.parametrize("source", ENDLESS)
def test_render_stops_a_template_without_end(source):
    """Each stops within its processor time, or before it makes what no memory can hold."""
    began = time.thread_time()
    with pytest.raises(TemplateLimit):
        ours(source, cpu_s=0.3)
    assert time.thread_time() - began < 4  # a tick may be a join of 100,000 numbers


@pytest.mark.timed
def test_render_stops_a_conversation_that_makes_a_template_run_without_end():
    """A template that looks at all messages for each of them, over a body of 2 MB."""
    source = (
        "{% for m in messages %}{% for n in messages %}{% if n.content == m.role %}x{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    began = time.thread_time()
    with pytest.raises(TemplateLimit, match="takes too long"):
        ours(source, [USER] * 50_000, cpu_s=0.5)
    assert time.thread_time() - began < 3


def test_render_of_a_long_conversation_is_far_from_the_limit():
    """3,000 messages with tools, as no window holds them, take a fraction of a request's time."""
    chat = [USER, CHAT[4]] * 1500
    began = time.thread_time()
    text = ours(TEMPLATES["qwen-3"], chat, cpu_s=chat_template.RENDER_CPU_S)
    assert len(text) > 50_000
    assert time.thread_time() - began < chat_template.RENDER_CPU_S / 3


def test_render_does_not_share_its_budget_with_others_at_the_same_time():
    """One that is stopped stops no other."""
    slow = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
    outcomes = {}

    def work(name, source, cpu_s):
        try:
            outcomes[name] = ours(source, cpu_s=cpu_s)
        except TemplateLimit as error:
            outcomes[name] = error

    threads = [
        threading.Thread(target=work, args=("slow", slow, 0.3)),
        *(threading.Thread(target=work, args=(n, "{{ messages | length }}", 5)) for n in range(4)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(outcomes.pop("slow"), TemplateLimit)
    assert outcomes == dict.fromkeys(range(4), "6")


def test_check_template_names_the_line_of_a_fault():
    """For whoever writes a template of their own."""
    check_template("{{ messages }}")
    with pytest.raises(TemplateRefusal, match="line 2"):
        check_template("a\n{% if %}")
    with pytest.raises(TemplateRefusal, match="No filter"):
        check_template("{{ messages | nonsense }}")


def test_render_lets_no_template_change_what_others_see():
    """Data is copied or immutable, and a rendering leaves nothing behind."""
    before = json.dumps(CHAT)
    ours("{% set messages = [] %}{% set range = 1 %}{{ messages }}")
    assert ours("{{ range(2) | list }}") == "[0, 1]"
    assert json.dumps(CHAT) == before
