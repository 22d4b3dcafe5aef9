"""`POST /v1/responses` in the words of a chat: what is asked is translated, then checked as one.

Stateless: a request brings its whole conversation, as a text or as items (messages, calls of
functions and their outputs). What the service would have to remember, and the tools that
OpenAI itself runs, are refused by name (`fields.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from serve_app.api.convert import Plan, plan_chat
from serve_app.api.fields import SAMPLING_EXTENSIONS
from serve_app.api.schemas import ChatRequest, validate
from serve_app.errors import InvalidRequest, RequestError, UnsupportedParameter

# What is called the same in a chat.
_SAME = SAMPLING_EXTENSIONS | {
    "model",
    "parallel_tool_calls",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
}
# What an answer repeats of its request, at what it is when nothing is said.
_REPEATED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
}
# What OpenAI's object says of a service that remembers nothing and only generates text.
_FIXED: dict[str, Any] = {
    "background": False,
    "error": None,
    "incomplete_details": None,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "truncation": "disabled",
}
_MAX_METADATA = (16, 64, 512)  # OpenAI's limits: pairs, characters of a key and of a value
_TEXTS = ("input_text", "output_text", "text")  # no set: a client may send what has no hash


def plan_response(body: Mapping[str, Any], *, request_id: str) -> Plan:
    """Plan a response.

    Raises:
        InvalidRequest: malformed, or fields that make no sense together.
        UnsupportedParameter: asks for what is not done here.
    """
    chat = {name: body[name] for name in _SAME if name in body}
    chat["messages"] = list(_messages(body))
    chat["max_completion_tokens"] = body.get("max_output_tokens")
    chat["tools"] = _nested(body.get("tools"))
    chat["tool_choice"] = _nested_choice(body.get("tool_choice"))
    chat["response_format"] = _format(body.get("text"))
    repeated = {
        name: neutral if body.get(name) is None else body[name]
        for name, neutral in _REPEATED.items()
    }
    _check_metadata(repeated["metadata"])
    if isinstance(body.get("user"), str):
        repeated["user"] = body["user"]
    text = {"format": {"type": "text"}, "verbosity": "medium"} | _given(body.get("text"))
    plan = plan_chat(validate(ChatRequest, chat), request_id=request_id)
    # OpenAI requires both fields and takes requests without them; its answers have them.
    repeated["tools"] = [{"parameters": None, "strict": None, **tool} for tool in repeated["tools"]]
    return replace(plan, repeated={**_FIXED, **repeated, "text": text})


# A chat's names of what a response calls otherwise.
_NAMES = (
    (re.compile(r"messages\b.*"), "input"),
    (re.compile(r"(?:response_format|structure)\b.*"), "text.format"),
    (re.compile(r"max_completion_tokens"), "max_output_tokens"),
    (re.compile(r"(tools\[\d+\])\.function\b"), r"\1"),
)


def renamed(error: RequestError) -> RequestError:
    """Return an error of a chat with the field's name in a response."""
    if error.param is None:
        return error
    param = error.param
    for pattern, name in _NAMES:
        param = pattern.sub(name, param)
    message = error.message.replace(f"`{error.param}`", f"`{param}`")
    return type(error)(message, param=param, **error.details)


def _messages(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if (instructions := body.get("instructions")) is not None:
        if not isinstance(instructions, str):
            raise InvalidRequest("`instructions`: must be a string", param="instructions")
        yield {"role": "system", "content": instructions}
    items = body.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise InvalidRequest(
            "`input`: is required, a string or a list of items that is not empty", param="input"
        )
    messages = [_message(item, f"input[{place}]") for place, item in enumerate(items)]
    # Calls that follow each other are of one turn, and a chat has them in one message.
    for calling, group in groupby(messages, key=lambda message: "tool_calls" in message):
        if calling:
            calls = [call for message in group for call in message["tool_calls"]]
            yield {"role": "assistant", "content": None, "tool_calls": calls}
        else:
            yield from group


def _message(item: object, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InvalidRequest(f"`{where}`: must be an object", param=where)
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role"), "content": _parts(item.get("content"))}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"tool_calls": [call]}
    if kind == "function_call_output":
        answer = _parts(item.get("output"))
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": answer}
    raise UnsupportedParameter(
        f"`{where}`: only message, function_call and function_call_output are supported",
        param=where,
    )


def _parts(content: object) -> object:
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, dict) and part.get("type") in _TEXTS
        else part
        for part in content
    ]


def _nested(tools: object) -> object:
    """Return tools with a chat's extra level; what is no list or object is refused as it is."""
    if not isinstance(tools, list):
        return tools
    return [
        {"type": tool.get("type"), "function": tool} if isinstance(tool, dict) else tool
        for tool in tools
    ]


def _nested_choice(choice: object) -> object:
    if not isinstance(choice, dict):
        return choice
    return {"type": choice.get("type"), "function": {"name": choice.get("name")}}


def _format(text: object) -> object:
    """Return `text.format` as a chat's `response_format`."""
    if text is None:
        return None
    if not isinstance(text, dict):
        raise InvalidRequest("`text`: must be an object", param="text")
    if text.get("verbosity") not in (None, "medium"):
        raise UnsupportedParameter("`text.verbosity` is not supported here", param="text.verbosity")
    form = text.get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": form}


def _given(text: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (text or {}).items() if value is not None}


def _check_metadata(metadata: object) -> None:
    pairs, key_chars, value_chars = _MAX_METADATA
    if (
        not isinstance(metadata, dict)
        or len(metadata) > pairs
        or any(len(key) > key_chars for key in metadata)
        or any(not isinstance(v, str) or len(v) > value_chars for v in metadata.values())
    ):
        raise InvalidRequest(
            f"`metadata`: at most {pairs} strings of {value_chars} characters", param="metadata"
        )
