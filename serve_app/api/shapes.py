"""Other shapes of a chat's body, brought into the one that the schema reads.

OpenAI's first form of tools (`functions`, `function_call`, messages of role `function`) becomes
today's, and `ChatRequest` need not know it; `OldCalls` answers in it. A `tool_choice` of type
`allowed_tools` becomes the tools that it allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serve_app.api.choices import Piece
from serve_app.api.response_types import ChunkWriter
from serve_app.api.validation import with_field_renamed
from serve_app.errors import InvalidRequest, RequestError
from serve_app.protocol import Usage

Body = dict[str, Any]


def is_old(body: Mapping[str, Any]) -> bool:
    """Return whether a body asks for calls in the first form."""
    return bool(body.get("functions"))


def modern(body: Mapping[str, Any]) -> Body:
    """Return a chat's body in the form that the schema reads.

    Raises:
        InvalidRequest: both forms of tools at once, or allowed tools that are none.
    """
    new = {name: body[name] for name in body if name not in ("functions", "function_call")}
    if is_old(body):
        if body.get("tools"):
            raise InvalidRequest("`functions`: cannot be combined with `tools`", param="functions")
        new["tools"] = _tools(body["functions"])
        new["tool_choice"] = _choice(body.get("function_call"))
        new["parallel_tool_calls"] = False  # the form has room for one call
    elif body.get("function_call") not in (None, "none", "auto"):
        raise InvalidRequest("`function_call`: there are no `functions`", param="function_call")
    if isinstance(body.get("messages"), list):
        new["messages"] = list(_messages(body["messages"]))
    return allowed(new)


def allowed(body: Body) -> Body:
    """Return a chat's body with the tools alone that its `tool_choice` allows.

    Raises:
        InvalidRequest: it allows no tool that there is.
    """
    choice = body.get("tool_choice")
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return body
    form = choice.get("allowed_tools", choice)
    entries = form.get("tools") if isinstance(form, dict) else None
    if not isinstance(entries, list) or form.get("mode", "auto") not in ("auto", "required"):
        raise InvalidRequest(
            "`tool_choice`: `allowed_tools` must have a `mode`, auto or required, and `tools`",
            param="tool_choice",
        )
    tools = body.get("tools")
    names = [_name_of(entry) for entry in entries]
    kept = [tool for tool in tools if _name_of(tool) in names] if isinstance(tools, list) else []
    if not kept:
        raise InvalidRequest(
            "`tool_choice`: allows no function that is among `tools`", param="tool_choice"
        )
    return {**body, "tools": kept, "tool_choice": form.get("mode", "auto")}


def _name_of(tool: object) -> str | None:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None


def _tools(functions: object) -> object:
    if not isinstance(functions, list):
        return functions
    return [{"type": "function", "function": function} for function in functions]


def _choice(choice: object) -> object:
    if not isinstance(choice, dict):
        return choice
    return {"type": "function", "function": choice}


def _messages(messages: Sequence[object]) -> Iterator[object]:
    """Give each old call an id, and the id of the latest call of its name to each result."""
    ids: dict[object, str] = {}
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            yield message
            continue
        new = dict(message)
        call = new.pop("function_call", None)
        if isinstance(call, dict) and not new.get("tool_calls"):
            identity = f"call{place:05d}"  # nine letters and digits, as some templates want them
            ids[str(call.get("name"))] = identity
            new["tool_calls"] = [{"id": identity, "type": "function", "function": call}]
        if new.get("role") == "function":
            new["role"] = "tool"
            new["tool_call_id"] = ids.get(str(new.get("name")), f"call{place:05d}")
        yield new


# The schema's names of what an old body calls otherwise.
_NAMES = (
    (re.compile(r"^tools\[(\d+)\](?:\.function)?"), r"functions[\1]"),
    (re.compile(r"^tools\b"), "functions"),
    (re.compile(r"^tool_choice\b"), "function_call"),
)


def renamed(error: RequestError) -> RequestError:
    """Return an error with the field's name in the first form."""
    return with_field_renamed(error, _NAMES)


class OldCalls:
    """A `ChunkWriter` that writes calls in OpenAI's first form.

    Args:
        modern: writes them in today's.
    """

    def __init__(self, modern: ChunkWriter) -> None:
        self._modern = modern

    def full_body(self, pieces: Sequence[Piece], usage: Usage) -> Mapping[str, object]:
        """Return the complete answer."""
        body: Any = self._modern.full_body(pieces, usage)
        return {**body, "choices": [_old(choice, "message") for choice in body["choices"]]}

    def chunks(self, piece: Piece) -> Iterator[Body]:
        """Return the chunks of a piece."""
        for chunk in self._modern.chunks(piece):
            yield {**chunk, "choices": [_old(choice, "delta") for choice in chunk["choices"]]}

    def end(self) -> Mapping[str, object]:
        """Return a chunk without choices."""
        return self._modern.end()


def _old(choice: Body, key: str) -> Body:
    message = dict(choice[key])
    calls = message.pop("tool_calls", None)
    if calls:
        message["function_call"] = calls[0]["function"]
    reason = choice["finish_reason"]
    return {
        **choice,
        key: message,
        "finish_reason": "function_call" if reason == "tool_calls" else reason,
    }
