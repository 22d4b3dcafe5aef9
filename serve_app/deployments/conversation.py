"""What a request has in common with the later ones of its conversation."""

from __future__ import annotations

from serve_app.protocol import ChatPrompt, Prompt, TextPrompt

BEGINNING = 256  # characters, or tokens, that tell one conversation of plain text from another
# Of a chat so much is looked at, and no more: a request may be megabytes, and this runs on the
# event loop of an ingress, again each time that a full replica is asked once more.
MESSAGES, CHARACTERS = 64, 16_384


def opening(prompt: Prompt, question: int = CHARACTERS) -> object:
    """Return what does not change of a conversation while it grows, with a `repr` of its own.

    Args:
        prompt: of a request.
        question: characters of the user's first message that count.

    Returns:
        The messages up to the first of the user, role and text, or the beginning of a plain
        prompt.
    """
    if isinstance(prompt, TextPrompt):
        return prompt.text[:BEGINNING]
    if not isinstance(prompt, ChatPrompt):
        return prompt.token_ids[:BEGINNING]
    left, parts = CHARACTERS, []
    for message in prompt.messages[:MESSAGES]:
        role, text = message.get("role"), str(message.get("content"))
        text = text[: min(left, question) if role == "user" else left]
        left -= len(text)
        parts.append((role, text))
        if role == "user":
            return tuple(parts)
    return tuple(parts[:1])
