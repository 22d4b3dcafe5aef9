"""From a checked request to the engine's requests: one for each choice of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from serve_app.api.schemas import ChatRequest, CompletionRequest, Message, SamplingFields
from serve_app.protocol import ChatPrompt, GenerationRequest, Prompt, SamplingParams

COMPLETION_MAX_TOKENS = 16  # OpenAI's default of /v1/completions; chat has none
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: far apart, never equal below 2**64


@dataclass(frozen=True, slots=True)
class Plan:
    """One API request as the engine will see it.

    Args:
        requests: in the order of the choices' indexes, prompt by prompt.
        choices_per_prompt: `n`.
        stream: answer with events.
        include_usage: end the stream with a usage chunk.
        continuous_usage: tell the usage so far in every chunk.
    """

    requests: tuple[GenerationRequest, ...]
    choices_per_prompt: int
    stream: bool
    include_usage: bool
    continuous_usage: bool


def plan_chat(body: ChatRequest, *, request_id: str) -> Plan:
    """Plan a chat completion; `developer` is today's name of `system`, and is sent as that."""
    prompt = ChatPrompt(
        messages=tuple(_message(message) for message in body.messages),
        template_kwargs=dict(body.chat_template_kwargs or {}),
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _plan(body, [prompt], max_tokens=limit, request_id=request_id)


def plan_completion(body: CompletionRequest, *, request_id: str) -> Plan:
    """Plan a completion of one or several prompts."""
    limit = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return _plan(body, body.prompt, max_tokens=limit, request_id=request_id)


def derive_seed(seed: int | None, choice: int) -> int | None:
    """Return the seed of a prompt's `choice`-th completion: the first one keeps the request's.

    A signed 64-bit integer, as the request's. Choices of one request differ, and the same
    request gives the same choices again.
    """
    if seed is None:
        return None
    return (seed + choice * _GOLDEN + 2**63) % 2**64 - 2**63


def _plan(
    body: SamplingFields, prompts: Sequence[Prompt], *, max_tokens: int | None, request_id: str
) -> Plan:
    n = body.n or 1
    options = body.stream_options
    # A client may repeat its request id, but the engine's must be unique while it runs.
    unique = f"{request_id}/{uuid4().hex[:12]}"
    requests = [
        GenerationRequest(
            request_id=f"{unique}-{place * n + choice}",
            prompt=prompt,
            sampling=_sampling(body, max_tokens=max_tokens, choice=choice),
        )
        for place, prompt in enumerate(prompts)
        for choice in range(n)
    ]
    return Plan(
        requests=tuple(requests),
        choices_per_prompt=n,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def _sampling(body: SamplingFields, *, max_tokens: int | None, choice: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        top_k=max(0, body.top_k or 0),
        seed=derive_seed(body.seed, choice),
        stop=body.stop or (),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
    )


def _message(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    fields: dict[str, Any] = {"role": role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields
