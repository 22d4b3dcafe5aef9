"""`POST /v1/responses` in the words of a chat: what is asked is translated, then checked as one.

Stateless: a request carries its whole conversation, as a text or as items (messages, calls of
functions and their outputs). What the service would have to remember is refused by name
(`supported_fields.py`). What belongs to a model that thinks or to tools that OpenAI itself runs is
left out, so that clients which always send it work: thoughts from the input, such tools from
`tools`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

import structlog

from serve_app.api.convert import Plan, plan_chat
from serve_app.api.schemas import MAX_MESSAGES, ChatRequest, validate
from serve_app.api.shapes import allowed
from serve_app.api.supported_fields import CHAT, RESPONSES
from serve_app.api.validation import with_field_renamed
from serve_app.errors import InvalidRequest, RequestError, UnsupportedParameter

log = structlog.get_logger()

# What is called the same in a chat and means the same.
_SAME = (CHAT.done & RESPONSES.done) - {"tools", "tool_choice", "top_logprobs", "metadata", "user"}
# What an answer repeats of its request, at what it is when nothing is said.
_REPEATED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "top_logprobs": 0,
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
_LOGPROBS = "message.output_text.logprobs"  # of `include`; the others speak of what is not here
_MAX_METADATA = (16, 64, 512)  # OpenAI's limits: pairs, characters of a key and of a value
_TEXTS = ("input_text", "output_text", "text")  # no set: a client may send what has no hash
_NO_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_LEFT_OUT = ("reasoning", "web_search_call", "mcp_list_tools")


def plan_response(body: Mapping[str, Any], *, request_id: str) -> Plan:
    """Plan a response.

    Raises:
        InvalidRequest: malformed, or fields that make no sense together.
        UnsupportedParameter: asks for what is not done here.
    """
    chat = {name: body[name] for name in _SAME if name in body}
    chat["messages"] = list(_messages(body))
    chat["max_completion_tokens"] = body.get("max_output_tokens")
    chat["tools"], places = _functions(body.get("tools"), request_id)
    chat["tool_choice"] = _nested_choice(body.get("tool_choice"))
    chat["response_format"] = _format(body.get("text"))
    chat["reasoning_effort"] = _effort(body.get("reasoning"))
    chat |= _logprobs(body)
    repeated = {
        name: neutral if body.get(name) is None else body[name]
        for name, neutral in _REPEATED.items()
    }
    _check_metadata(repeated["metadata"])
    if isinstance(body.get("user"), str):
        repeated["user"] = body["user"]
    if body.get("store") is not None:
        repeated["store"] = False  # nothing is kept
    text = {"format": _format_shown(body.get("text")), "verbosity": "medium"}
    try:
        plan = plan_chat(validate(ChatRequest, allowed(chat)), request_id=request_id)
    except RequestError as error:
        raise _placed(error, places) from error
    # OpenAI requires both fields and takes requests without them; its answers have them.
    repeated["tools"] = [
        {"parameters": None, "strict": None, **tool["function"]} for tool in chat["tools"] or ()
    ]
    return replace(plan, repeated={**_FIXED, **repeated, "text": text})


# A chat's names of what a response calls otherwise.
_NAMES = (
    (re.compile(r"^messages\b.*"), "input"),
    (re.compile(r"^(?:response_format|structure)\b.*"), "text.format"),
    (re.compile(r"^max_completion_tokens$"), "max_output_tokens"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^(tools\[\d+\])\.function\b"), r"\1"),
)


def renamed(error: RequestError) -> RequestError:
    """Return an error of a chat with the field's name in a response."""
    return with_field_renamed(error, _NAMES)


def _placed(error: RequestError, places: list[int]) -> RequestError:
    """Return an error of a tool with its place among all that were sent."""
    found = re.match(r"tools\[(\d+)\]", error.param or "")
    if found is None:
        return error
    sent, checked = f"tools[{places[int(found[1])]}]", found[0]
    message = error.message.replace(checked, sent)
    param = str(error.param).replace(checked, sent, 1)
    return type(error)(message, param=param, **error.details)


def _messages(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if (instructions := body.get("instructions")) is not None:
        if not isinstance(instructions, str):
            raise InvalidRequest("`instructions`: must be a string", param="instructions")
        yield {"role": "system", "content": instructions}
    items = body.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not 0 < len(items) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"`input`: is required, a string or a list of 1 to {MAX_MESSAGES} items", param="input"
        )
    messages = [
        _message(item, f"input[{place}]")
        for place, item in enumerate(items)
        if not (isinstance(item, dict) and item.get("type") in _LEFT_OUT)
    ]
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
    kind = item.get("type") or "message"
    if kind == "message":
        content = _parts(item.get("content"))
        if item.get("role") == "assistant" and not content:
            content = ""  # an answer that was cut before its first token
        return {"role": item.get("role"), "content": content}
    if kind in ("function_call", "custom_tool_call"):
        arguments = item.get("arguments")
        if kind == "custom_tool_call":
            arguments = {"input": item.get("input")}
        function = {"name": item.get("name"), "arguments": _text(arguments)}
        return {
            "tool_calls": [{"id": item.get("call_id"), "type": "function", "function": function}]
        }
    if kind in ("function_call_output", "custom_tool_call_output"):
        answer = _parts(item.get("output"))
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": answer}
    raise UnsupportedParameter(_why_not(kind, where), param=where)


def _text(arguments: object) -> object:
    return json.dumps(arguments) if isinstance(arguments, dict) else arguments


def _why_not(kind: object, where: str) -> str:
    if kind == "item_reference":
        return f"`{where}`: nothing is stored here; send the item itself instead of its id"
    return f"`{where}`: only messages, calls of functions and their outputs are supported"


def _parts(content: object) -> object:
    if not isinstance(content, list):
        return content
    return [_part(part) for part in content]


def _part(part: object) -> object:
    if not isinstance(part, dict):
        return part
    if part.get("type") in _TEXTS:
        return {"type": "text", "text": part.get("text")}
    if part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _functions(tools: object, request_id: str) -> tuple[Any, list[int]]:
    """Return the functions with a chat's extra level, and the place of each among all tools.

    What is no tool at all stays, so that it is refused.
    """
    if not isinstance(tools, list):
        return tools, []
    kept, left_out = [], []
    for place, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            left_out.append(kind[:64])
        else:
            function = {"type": kind, "function": tool} if isinstance(tool, dict) else tool
            kept.append((place, function))
    if left_out:
        log.warning(
            "request.tools_left_out", request_id=request_id, types=sorted(set(left_out))[:16]
        )
    return [tool for _, tool in kept], [place for place, _ in kept]


def _nested_choice(choice: object) -> object:
    if not isinstance(choice, dict) or choice.get("type") == "allowed_tools":
        return choice
    return {"type": choice.get("type"), "function": {"name": choice.get("name")}}


def _format(text: object) -> object:
    """Return `text.format` as a chat's `response_format`."""
    if text is None:
        return None
    if not isinstance(text, dict):
        raise InvalidRequest("`text`: must be an object", param="text")
    form = text.get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": form}


def _effort(reasoning: object) -> object:
    if reasoning is not None and not isinstance(reasoning, dict):
        raise InvalidRequest("`reasoning`: must be an object", param="reasoning")
    return reasoning.get("effort") if reasoning else None


def _logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    include, top = body.get("include"), body.get("top_logprobs")
    if include is not None and not isinstance(include, list):
        raise InvalidRequest("`include`: must be a list", param="include")
    return {"top_logprobs": top, "logprobs": bool(top) or _LOGPROBS in (include or ())}


def _format_shown(text: Mapping[str, Any] | None) -> object:
    """Return the format as an answer repeats it: all of a schema that OpenAI requires."""
    form = (text or {}).get("format") or {"type": "text"}
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    kinds = {"description": str, "strict": bool, "schema": dict}
    given = {key: form[key] for key, kind in kinds.items() if isinstance(form.get(key), kind)}
    name = _NO_NAME.sub("_", str(form.get("name") or ""))[:64]
    return {"schema": {}, **given, "type": "json_schema", "name": name or "schema"}


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
