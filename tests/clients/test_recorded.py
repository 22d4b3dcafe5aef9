"""Request bodies as clients that are too large to install here send them."""

import pytest

from tests.api.harness import CHAT, COMPLETIONS, Service
from tests.clients.canned import engine

# lm-evaluation-harness 0.4.13, `local-completions`: log-likelihoods, then generation.
LOGLIKELIHOOD = {
    "model": "tiny",
    "prompt": [[1, 2, 3, 4], [5, 6, 7]],
    "temperature": 0,
    "max_tokens": 1,
    "logprobs": 1,
    "seed": 1234,
    "echo": True,
}
GENERATION = {
    "prompt": ["Question: 1 + 1?\nAnswer:"],
    "model": "tiny",
    "max_tokens": 256,
    "temperature": 0.0,
    "stop": ["Question:", "</s>", "<|im_end|>"],
    "seed": 1234,
}
# The same for HumanEval, whose task file names more stop strings than OpenAI takes.
HUMAN_EVAL = {
    **GENERATION,
    "prompt": ["def add(a, b):\n"],
    "max_tokens": 1024,
    "stop": ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```", "</s>", "<|im_end|>", ""],
}
# `local-chat-completions`: its messages carry a type of their own.
CHAT_GENERATION = {
    "messages": [{"role": "user", "content": "1 + 1?", "type": "text"}],
    "model": "tiny",
    "max_tokens": 256,
    "temperature": 0,
    "stop": ["Question:"],
    "seed": 1234,
}
# llama.cpp's own page and SillyTavern, which send every sampler at the value that is off.
LLAMA_CPP = {
    "messages": [{"role": "user", "content": "hi"}],
    "stream": False,
    "cache_prompt": True,
    "return_progress": True,
    "timings_per_token": True,
    "samplers": [],
    "temperature": 0.8,
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "top_k": 40.0,
    "top_p": 0.95,
    "min_p": 0.05,
    "typical_p": 1.0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "repeat_last_n": 64,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "max_tokens": -1,
    "seed": -1,
    "reasoning_format": "auto",
}
# `vllm bench serve` and AIPerf.
VLLM_BENCH = {
    "model": "tiny",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "max_completion_tokens": 128,
    "stream": False,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "priority": 0,
}
# Continue and Open WebUI add what they know of the chat.
OPEN_WEBUI = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": False,
    "metadata": {"chat_id": "1"},
    "user": {"name": "A", "id": "1", "email": "a@example.com", "role": "user"},
    "session_id": "s",
    "chat_id": "c",
    "background_tasks": {"title_generation": True},
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, LOGLIKELIHOOD),
        (COMPLETIONS, GENERATION),
        (COMPLETIONS, HUMAN_EVAL),
        (CHAT, CHAT_GENERATION),
        (CHAT, LLAMA_CPP),
        (CHAT, VLLM_BENCH),
        (CHAT, OPEN_WEBUI),
    ],
)
async def test_recorded_request_is_answered(path, body):
    """As it is, with the answer that was asked for."""
    answer = await Service(engine(), aliases=("tiny",)).post(path, body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


async def test_recorded_log_likelihoods_have_a_number_for_each_token_of_the_prompt():
    """By `echo`: null for the first one, and where each token begins."""
    answer = await Service(engine(), aliases=("tiny",)).post(COMPLETIONS, LOGLIKELIHOOD)
    for choice, prompt in zip(answer.json()["choices"], LOGLIKELIHOOD["prompt"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) >= len(prompt)
        assert logprobs["token_logprobs"][0] is None
        assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
        assert logprobs["top_logprobs"][1]
