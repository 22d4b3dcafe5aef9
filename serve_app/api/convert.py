"""From a checked request to the engine's requests: one for each prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from uuid import uuid4

from serve_app.api.formats.table import MARKS
from serve_app.api.messages import shown
from serve_app.api.schemas import (
    UNLIMITED,
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    StreamOptions,
)
from serve_app.api.tool_parser import ToolReader
from serve_app.api.tools import NamedFunction, Tool, calls_schema
from serve_app.errors import InvalidRequest
from serve_app.protocol import (
    MODEL_DEFAULTS,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    SamplingParams,
    Structure,
    TextPrompt,
)

SAMPLING = tuple(field.name for field in fields(SamplingParams))
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class Calls:
    """Which calls a chat's answer may hold.

    Args:
        parameters: the JSON schema of each tool's arguments, by the tool's name.
        parallel: more than one call.
        forced: the answer can be nothing but calls.
    """

    parameters: Mapping[str, Mapping[str, Any]]
    parallel: bool
    forced: bool = False

    def reader(self) -> ToolReader:
        """Return what parts the text of one choice."""
        return ToolReader(
            self.parameters,
            parallel=self.parallel,
            parameters=self.parameters,
            forced=self.forced,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """One API request as the engine will see it, and what its answer has to show.

    Args:
        requests: one for each prompt, in order, all with the same `n`.
        stream: answer with events.
        include_usage: end the stream with a usage chunk.
        continuous_usage: send the usage so far in every chunk.
        calls: look for tool calls in the text; None takes all of it as content.
        old_calls: write calls in OpenAI's first form, in which they were asked for.
        echo: show the prompt before the completion.
        prompt_only: show nothing of the completion (`max_tokens: 0`); one token is generated.
        reasoning: show the model's thoughts, where they are separated from its answer.
        token_ids: show the ids of prompt and completion.
        structure_field: the request's field that `SamplingParams.structure` stems from.
        repeated: what a response's answer repeats of its request.
        model: the name to answer under.
    """

    requests: tuple[GenerationRequest, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    calls: Calls | None = None
    old_calls: bool = False
    echo: bool = False
    prompt_only: bool = False
    reasoning: bool = True
    token_ids: bool = False
    structure_field: str | None = None
    repeated: Mapping[str, Any] | None = None
    model: str = ""

    @property
    def n(self) -> int:
        """Choices of each prompt."""
        return self.requests[0].n

    @property
    def logprobs(self) -> bool:
        """Whether the answer shows the tokens' probabilities."""
        return self.requests[0].sampling.logprobs is not None


def plan_chat(body: ChatRequest, *, request_id: str) -> Plan:
    """Plan a chat completion.

    Raises:
        InvalidRequest: fields that make no sense together.
    """
    tools = body.tools if body.tools and body.tool_choice != "none" else []
    field, structure = _structure(body, tools)
    prompt = ChatPrompt(
        messages=shown(body.messages),
        template_kwargs=_variables(body),
        tools=tuple(tool.shown() for tool in tools),
        continue_final_message=bool(body.continue_final_message),
        chat_template=body.chat_template,
        add_special_tokens=bool(body.add_special_tokens),
    )
    options = body.stream_options or StreamOptions()
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    sampling = _sampling(body, logprobs=alternatives, structure=structure)
    sampling = replace(
        sampling,
        split_thoughts=body.splits_thoughts,
        keep_special_tokens=MARKS if tools else (),  # a call's syntax may be special tokens
    )
    return Plan(
        requests=_requests(body, [prompt], sampling, request_id),
        calls=_calls(body, tools) if tools else None,
        reasoning=body.shows_thoughts,
        token_ids=bool(body.return_token_ids),
        structure_field=field,
        stream=bool(body.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
    )


def _calls(body: ChatRequest, tools: Sequence[Tool]) -> Calls:
    choice = body.tool_choice
    return Calls(
        {tool.function.name: tool.function.parameters or {} for tool in tools},
        parallel=body.parallel_tool_calls is not False,
        forced=choice == "required" or isinstance(choice, NamedFunction),
    )


def _variables(body: ChatRequest) -> dict[str, Any]:
    """Return what the chat template is given beside messages and tools."""
    variables = _thinking(body.reasoning_effort)
    if body.enable_thinking is not None:
        variables["enable_thinking"] = body.enable_thinking
    variables |= body.chat_template_kwargs or {}
    if body.add_generation_prompt is not None:
        variables["add_generation_prompt"] = body.add_generation_prompt
    return variables


def _thinking(effort: str | None) -> dict[str, Any]:
    """Return what templates of models that think read of an effort; others ignore it."""
    if effort not in _EFFORTS:
        return {}
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def plan_completion(body: CompletionRequest, *, request_id: str) -> Plan:
    """Plan a completion of one or several prompts.

    Raises:
        InvalidRequest: fields that make no sense together.
    """
    field, structure = next(iter(body.structures().items()), (None, None))
    options = body.stream_options or StreamOptions()
    shows_prompt = body.echo and body.logprobs is not None
    if shows_prompt and body.stream and (body.n or 1) > 1:
        raise InvalidRequest("`n`: must be 1 in a stream with `echo` and `logprobs`", param="n")
    sampling = _sampling(
        body,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if shows_prompt else None,
        structure=structure,
    )
    adds = body.add_special_tokens is not False
    prompts = [
        replace(prompt, add_special_tokens=adds) if isinstance(prompt, TextPrompt) else prompt
        for prompt in body.prompt
    ]
    return Plan(
        requests=_requests(body, prompts, sampling, request_id),
        echo=bool(body.echo),
        token_ids=bool(body.return_token_ids),
        prompt_only=body.limit == 0,
        structure_field=field,
        stream=bool(body.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
    )


def _structure(body: ChatRequest, tools: Sequence[Tool]) -> tuple[str | None, Structure | None]:
    """Return what the text must look like, and the field to blame if that cannot be."""
    field, structure = next(iter(body.structures().items()), (None, None))
    choice = body.tool_choice
    if isinstance(choice, NamedFunction):
        tools = [tool for tool in tools if tool.function.name == choice.name]
    elif choice != "required" and structure is None:
        return None, None
    if not tools:
        return field, structure
    several = body.parallel_tool_calls is not False and not isinstance(choice, NamedFunction)
    answer = None
    if structure is not None and choice in (None, "auto"):
        answer = _schema_of(structure, field)
    schema = calls_schema(tools, parallel=several, answer=answer)
    return field or "tools", Structure("json_schema", json.dumps(schema))


def _schema_of(structure: Structure, field: str | None) -> dict[str, Any]:
    if structure.kind == "json_object":
        return {"type": "object"}
    if structure.kind != "json_schema":
        raise InvalidRequest(f"`{field}`: with `tools` it must be a JSON schema", param=field)
    schema: dict[str, Any] = json.loads(structure.definition)
    return schema


def _requests(
    body: SamplingFields, prompts: Sequence[Prompt], sampling: SamplingParams, request_id: str
) -> tuple[GenerationRequest, ...]:
    # A client may repeat its request id, but the engine's must be unique while it runs.
    unique = f"{request_id}/{uuid4().hex[:12]}"
    kept = body.truncate_prompt_tokens
    if kept == UNLIMITED:
        kept = -(sampling.max_tokens or 1)
    return tuple(
        GenerationRequest(
            f"{unique}-{place}", replace(prompt, truncate=kept), sampling, n=body.n or 1
        )
        for place, prompt in enumerate(prompts)
    )


def _sampling(
    body: SamplingFields,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    structure: Structure | None,
) -> SamplingParams:
    # Those that a client names as the protocol does, and means alike; null leaves the default.
    given = {name: value for name in SAMPLING if (value := getattr(body, name, None)) is not None}
    # `top_p: 0` keeps the single most likely token, whatever the temperature: greedy.
    greedy = body.top_p == 0
    if greedy:
        given |= {"temperature": 0.0, "top_p": 1.0}
    given["top_k"] = max(0, given.get("top_k", 0))
    given["stop_token_ids"] = frozenset(given.get("stop_token_ids", ()))
    unset = frozenset(name for name in MODEL_DEFAULTS if getattr(body, name) is None)
    return SamplingParams(
        **given
        | {
            "max_tokens": None if body.limit is None else max(1, body.limit),
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
            "structure": structure,
            "include_stop": bool(body.include_stop_str_in_output),
            "return_prompt_ids": bool(body.return_token_ids),
            "unset": unset - {"temperature"} if greedy else unset,
        }
    )
