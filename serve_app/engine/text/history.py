"""Forms of a conversation for templates that refuse the one a client sent.

Chat templates are strict in ways that no client can know: Llama 3 takes one call a message,
Mistral wants ids of nine letters and digits, Qwen one system message and that first, Gemma
roles that alternate and no system at all. `forms` returns the same conversation in one form
after another, each changed a little more, so that the first one that a template takes is the
nearest to what was sent. A template that takes the conversation as it is never sees any of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
Step: TypeAlias = Callable[[list[Message]], list[Message]]

_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
SEPARATOR = "\n\n"


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Return other forms of a conversation, the least changed first; each differs from the last.

    Args:
        messages: OpenAI-shaped, contents are texts.
    """
    latest = list(messages)
    yield from _with_texts(latest)
    for step in STEPS:
        changed = step(latest)
        if changed != latest:
            latest = changed
            yield latest
            yield from _with_texts(latest)


def _with_texts(messages: list[Message]) -> Iterator[list[Message]]:
    # DeepSeek's templates add the arguments to other text; all others want the object.
    changed = arguments_as_text(messages)
    if changed != messages:
        yield changed


def short_ids(messages: list[Message]) -> list[Message]:
    """Give calls ids of nine letters and digits, their results the same; Mistral's rule."""
    return [_with_ids(message, short_id) for message in messages]


def short_id(text: str) -> str:
    """Return an id of nine letters and digits for an id; one that is such stays."""
    return text if _SHORT_ID.fullmatch(text) else sha256(text.encode()).hexdigest()[:9]


def _with_ids(message: Message, rename: Callable[[str], str]) -> Message:
    changed = dict(message)
    if "tool_call_id" in message:
        changed["tool_call_id"] = rename(message["tool_call_id"])
    if "tool_calls" in message:
        changed["tool_calls"] = [
            {**call, "id": rename(call["id"])} if "id" in call else call
            for call in message["tool_calls"]
        ]
    return changed


def single_calls(messages: list[Message]) -> list[Message]:
    """Give each call a message of its own, followed by its own result; Llama 3's rule."""
    result: list[Message] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        place += 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            result.append(message)
            continue
        answers = []
        while place < len(messages) and messages[place]["role"] == "tool":
            answers.append(messages[place])
            place += 1
        for number, call in enumerate(calls):
            # What was said beside the calls was said once.
            words = message if number == 0 else {**message, "content": ""}
            result.append({**words, "tool_calls": [call]})
            if own := _answer_of(call, answers):
                answers.remove(own)
                result.append(own)
        result += answers
    return result


def _answer_of(call: dict[str, Any], answers: list[Message]) -> Message | None:
    return next((a for a in answers if a.get("tool_call_id") == call.get("id")), None)


def first_systems_joined(messages: list[Message]) -> list[Message]:
    """Join the system messages at the beginning to one."""
    count = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    return [*_joined(messages[:count]), *messages[count:]]


def systems_joined(messages: list[Message]) -> list[Message]:
    """Join all system messages to one at the beginning."""
    systems = [message for message in messages if message["role"] == "system"]
    return [*_joined(systems), *(m for m in messages if m["role"] != "system")]


def roles_alternating(messages: list[Message]) -> list[Message]:
    """Join neighbours of one role; messages with calls, and results, stay as they are."""
    result: list[Message] = []
    for message in messages:
        if result and _joinable(result[-1], message):
            result[-1:] = _joined([result[-1], message])
        else:
            result.append(message)
    return result


def _joinable(one: Message, other: Message) -> bool:
    calls = "tool_calls" in one or "tool_calls" in other
    return one["role"] == other["role"] != "tool" and not calls


def user_first(messages: list[Message]) -> list[Message]:
    """Put an empty user message before an answer that nobody asked for."""
    place = 1 if messages and messages[0]["role"] == "system" else 0
    if place < len(messages) and messages[place]["role"] == "user":
        return messages
    return [*messages[:place], {"role": "user", "content": ""}, *messages[place:]]


def arguments_as_objects(messages: list[Message]) -> list[Message]:
    """Put arguments that are no object, as a model may have written them, into one."""
    return [
        _with_arguments(
            message, lambda value: value if isinstance(value, dict) else {"text": value}
        )
        for message in messages
    ]


def arguments_as_text(messages: list[Message]) -> list[Message]:
    """Write the arguments of calls as JSON."""
    return [
        _with_arguments(
            message,
            lambda value: (
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            ),
        )
        for message in messages
    ]


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {**call["function"], "arguments": change(call["function"]["arguments"])},
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def tools_as_text(messages: list[Message]) -> list[Message]:
    """Write calls as the text of an answer and results as a user's; for templates without tools."""
    return [_as_text(message) for message in messages]


def _as_text(message: Message) -> Message:
    if message["role"] == "tool":
        name = f" of {message['name']}" if message.get("name") else ""
        return {"role": "user", "content": f"Result{name}: {message.get('content', '')}"}
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [
        json.dumps({"name": f["name"], "parameters": _object(f["arguments"])}, ensure_ascii=False)
        for f in functions
    ]
    words = [message["content"]] if message.get("content") else []
    return {"role": message["role"], "content": "\n".join([*words, *calls])}


def _object(arguments: object) -> object:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def system_in_user(messages: list[Message]) -> list[Message]:
    """Put the system message before the first user's words; Gemma 2 has no such role."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    return _joined([{**messages[0], "role": "user"}, messages[1]]) + messages[2:]


def _joined(messages: Sequence[Message]) -> list[Message]:
    if len(messages) < 2:
        return list(messages)
    texts = [message["content"] for message in messages if message.get("content")]
    return [{**messages[0], "content": SEPARATOR.join(texts)}]


STEPS: tuple[Step, ...] = (
    short_ids,
    arguments_as_objects,
    first_systems_joined,
    single_calls,
    systems_joined,
    roles_alternating,
    user_first,
    lambda messages: roles_alternating(tools_as_text(messages)),
    system_in_user,
)
