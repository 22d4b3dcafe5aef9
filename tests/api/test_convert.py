"""Requests become the engine's requests without losing or bending a field."""

from dataclasses import replace

import pytest

from serve_app.api.convert import plan_chat, plan_completion
from serve_app.api.schemas import ChatRequest, CompletionRequest, validate
from serve_app.protocol import (
    MODEL_DEFAULTS,
    ChatPrompt,
    SamplingParams,
    Structure,
    TextPrompt,
    TokenPrompt,
)

SILENT = SamplingParams(unset=frozenset(MODEL_DEFAULTS))
USER = {"role": "user", "content": "hi"}


def chat(**fields):
    return plan_chat(validate(ChatRequest, {"messages": [USER]} | fields), request_id="r")


def completion(**fields):
    return plan_completion(validate(CompletionRequest, {"prompt": "a"} | fields), request_id="r")


def test_plan_chat_hands_on_every_sampling_field():
    """What the client set is what the engine gets."""
    plan = chat(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=11,
        stop=["x", "y"],
        stop_token_ids=[3],
        ignore_eos=True,
        min_p=0.1,
        frequency_penalty=-1,
        presence_penalty=0.5,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "7": 1.5},
        min_tokens=2,
        logprobs=True,
        top_logprobs=4,
        guided_regex="a+",
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        return_token_ids=True,
    )
    assert [request.sampling for request in plan.requests] == [
        SamplingParams(
            max_tokens=7,
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            seed=11,
            stop=("x", "y"),
            stop_token_ids=frozenset({3}),
            ignore_eos=True,
            min_p=0.1,
            frequency_penalty=-1.0,
            presence_penalty=0.5,
            repetition_penalty=1.1,
            logit_bias=((5, -100.0), (7, 1.5)),
            min_tokens=2,
            logprobs=4,
            structure=Structure("regex", "a+"),
            include_stop=True,
            skip_special_tokens=False,
            return_prompt_ids=True,
        )
    ]
    assert plan.token_ids


def test_plan_has_openais_defaults():
    """Temperature and top_p 1 unless the model has its own; a completion has 16 tokens."""
    assert chat().requests[0].sampling == SILENT
    assert completion().requests[0].sampling == replace(SILENT, max_tokens=16)


def test_plan_chat_takes_null_as_absent():
    """Explicit nulls give the defaults."""
    names = set(ChatRequest.model_fields) - {"messages"}
    plan = chat(**dict.fromkeys(names))
    assert plan.requests[0].sampling == SILENT
    assert (plan.n, plan.calls, plan.structure_field) == (1, None, None)


@pytest.mark.parametrize("top_k", [-1, 0])
def test_plan_chat_switches_top_k_off_in_two_ways(top_k):
    """-1, as other servers write it, and 0."""
    assert chat(top_k=top_k).requests[0].sampling.top_k == 0


@pytest.mark.parametrize("temperature", [{}, {"temperature": 2}])
def test_plan_chat_takes_a_nucleus_of_nothing_as_greedy(temperature):
    """`top_p: 0` keeps the single most likely token, whatever the temperature."""
    sampling = chat(top_p=0, **temperature).requests[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0, 1)
    assert not sampling.unset & {"temperature", "top_p"}


@pytest.mark.parametrize("name", MODEL_DEFAULTS)
def test_plan_chat_says_what_the_client_set(name):
    """Only what it is silent about may be the model's own."""
    said = chat(**{name: 1}).requests[0].sampling
    assert said.unset == set(MODEL_DEFAULTS) - {name}


def test_plan_can_leave_out_special_tokens_of_a_prompt():
    """They are added to a text and not to a conversation, unless the request says otherwise."""
    assert [p.add_special_tokens for p in prompts(completion(prompt=["a", "b"]))] == [True, True]
    assert not prompts(completion(add_special_tokens=False))[0].add_special_tokens
    assert not prompts(chat())[0].add_special_tokens
    assert prompts(chat(add_special_tokens=True))[0].add_special_tokens
    assert prompts(completion(prompt=[1, 2], add_special_tokens=True)) == [TokenPrompt((1, 2))]


def prompts(plan):
    return [request.prompt for request in plan.requests]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, None),
        ({"truncate_prompt_tokens": 7}, 7),
        ({"truncate_prompt_tokens": -1, "max_tokens": 5}, -5),
    ],
)
def test_plan_can_cut_a_prompt(fields, kept):
    """To a number of tokens, or to what leaves room for the completion."""
    assert prompts(chat(**fields))[0].truncate == kept
    for prompt in ("a", [1, 2]):
        assert prompts(completion(prompt=prompt, **fields))[0].truncate == kept


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        (
            {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True, "a": 1}},
            {"enable_thinking": True, "a": 1},
        ),
        (
            {"reasoning_effort": "low", "enable_thinking": False},
            {"reasoning_effort": "low", "enable_thinking": False},
        ),
    ],
)
def test_plan_chat_takes_thinking_as_a_variable_of_the_template(fields, variables):
    """By its own name, as other servers take it; what names the variable itself wins."""
    assert prompts(chat(**fields))[0].template_kwargs == variables


def test_plan_chat_hands_on_a_requests_template():
    """The engine says whether it is trusted."""
    assert prompts(chat(chat_template="{{ 1 }}"))[0].chat_template == "{{ 1 }}"


def test_plan_chat_prefers_the_newer_name_of_the_limit():
    """`max_completion_tokens` replaces `max_tokens`."""
    assert chat(max_tokens=5, max_completion_tokens=9).requests[0].sampling.max_tokens == 9


def test_plan_chat_keeps_a_conversations_order_and_names():
    """Roles, names and tool ids go to the template; developer is called system there."""
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ann"},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    plan = chat(messages=messages, chat_template_kwargs={"lang": "de"})
    assert plan.requests[0].prompt == ChatPrompt(
        messages=(
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi", "name": "ann"},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ),
        template_kwargs={"lang": "de"},
    )


@pytest.mark.parametrize(
    ("fields", "kwargs", "continued"),
    [
        ({}, {}, False),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}, False),
        ({"continue_final_message": True}, {}, True),
        (
            {"continue_final_message": True, "add_generation_prompt": False},
            {"add_generation_prompt": False},
            True,
        ),
    ],
)
def test_plan_chat_leaves_the_prompts_end_to_the_client(fields, kwargs, continued):
    """Answer begun, not begun, or continued."""
    prompt = chat(**fields).requests[0].prompt
    assert (prompt.template_kwargs, prompt.continue_final_message) == (kwargs, continued)


def test_plan_completion_makes_one_request_of_each_prompt_with_all_its_choices():
    """The engine reads a prompt once, however many choices it has."""
    plan = completion(prompt=["a", "b"], n=2, seed=1)
    assert [(request.prompt, request.n) for request in plan.requests] == [
        (TextPrompt("a"), 2),
        (TextPrompt("b"), 2),
    ]
    assert plan.n == 2
    assert [request.sampling.seed for request in plan.requests] == [1, 1]


def test_plan_completion_gives_unique_engine_ids():
    """Two requests with the same x-request-id do not meet in the engine."""
    plans = [completion(prompt=["a", "b", "c"]) for _ in range(2)]
    ids = [request.request_id for plan in plans for request in plan.requests]
    assert len(set(ids)) == 6
    assert all(name.startswith("r/") for name in ids)


@pytest.mark.parametrize(
    ("options", "include", "continuous"),
    [
        (None, False, False),
        ({}, False, False),
        ({"include_usage": True}, True, False),
        ({"continuous_usage_stats": True}, False, True),
    ],
)
def test_plan_chat_reads_stream_options(options, include, continuous):
    """Each option alone."""
    plan = chat(stream=True, stream_options=options)
    assert (plan.stream, plan.include_usage, plan.continuous_usage) == (True, include, continuous)
