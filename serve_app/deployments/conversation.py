"""What a request has in common with the later ones of its conversation."""

from __future__ import annotations

from serve_app.protocol import ChatPrompt, Prompt, TextPrompt

BEGINNING = 256  # characters, or tokens, that tell one conversation of plain text from another


def opening(prompt: Prompt, question: int | None = None) -> object:
    """Return what does not change of a conversation while it grows, with a `repr` of its own.

    Args:
        prompt: of a request.
        question: characters of the user's first message that count; None for all.

    Returns:
        The messages up to the first of the user, or the beginning of a plain prompt.
    """
    if isinstance(prompt, TextPrompt):
        return prompt.text[:BEGINNING]
    if not isinstance(prompt, ChatPrompt):
        return prompt.token_ids[:BEGINNING]
    roles = [message.get("role") for message in prompt.messages]
    first = roles.index("user") if "user" in roles else 0
    messages = prompt.messages[: first + 1]
    if question is None or not messages:
        return messages
    asked = messages[-1]
    return (*messages[:-1], (asked.get("role"), str(asked.get("content"))[:question]))
