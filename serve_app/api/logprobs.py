"""Probabilities of tokens, in the two forms that OpenAI writes them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TypedDict

from serve_app.protocol import Logprob, TokenLogprobs


class ChatLogprob(TypedDict):
    """A token and its probability; `bytes` joins characters that are cut between tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob):
    """`ChatCompletionTokenLogprob`."""

    top_logprobs: list[ChatLogprob]


class ChatLogprobs(TypedDict):
    """`logprobs` of a chat's choice."""

    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """`logprobs` of a completion's choice; parallel lists, an item for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logprobs(entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """Return the chat's form."""
    content = [
        ChatTokenLogprob(**_chat(entry.chosen), top_logprobs=[_chat(one) for one in entry.top])
        for entry in entries
        if entry.chosen is not None
    ]
    return {"content": content, "refusal": None}


def _chat(one: Logprob) -> ChatLogprob:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.raw)}


class CompletionTokens:
    """Writes the completions' form for one choice and counts where each token's text begins.

    Args:
        offset: of the first token, in characters of the choice's text; below zero for tokens
            before the text, which begin at 0.
    """

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def read(self, entries: Sequence[TokenLogprobs], *, first: str = "") -> CompletionLogprobs:
        """Return the form of more tokens.

        Args:
            entries: the tokens; one without probability is the first of a prompt.
            first: the text of that one.
        """
        body = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in entries:
            chosen = entry.chosen
            body["tokens"].append(first if chosen is None else _key(chosen))
            body["token_logprobs"].append(None if chosen is None else chosen.logprob)
            body["top_logprobs"].append(
                None if chosen is None else _alternatives(chosen, entry.top)
            )
            body["text_offset"].append(max(0, self._offset))
            raw = first.encode() if chosen is None else chosen.raw
            self._offset += len(self._decode(raw))
        return body


def _alternatives(chosen: Logprob, top: Sequence[Logprob]) -> dict[str, float]:
    """Return the alternatives and, as OpenAI does, the chosen token as well."""
    return {_key(one): one.logprob for one in reversed((*top, chosen))}


def _key(one: Logprob) -> str:
    """Return a token's text, or its bytes where it holds a part of a character only."""
    try:
        return one.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.raw)
