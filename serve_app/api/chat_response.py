"""Writes the answers of one chat completion."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

from serve_app.api.choices import Piece
from serve_app.api.convert import Plan
from serve_app.api.logprobs import ChatLogprobs, chat_logprobs
from serve_app.api.response_types import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatFinish,
    ChatMessage,
    ToolCallBody,
    ToolCallPiece,
    usage_body,
)
from serve_app.api.tool_parser import CallArguments, CallBegun, Content, Part
from serve_app.api.tools import new_call_id
from serve_app.protocol import FinishReason, TokenLogprobs, Usage


class ChatWriter:
    """Writes chat completions: one object with all choices, or a stream of chunks.

    Args:
        model: the name to answer under.
        plan: what the answer has to show.
    """

    def __init__(self, model: str, plan: Plan) -> None:
        self._model = model
        self._plan = plan
        self._id = f"chatcmpl-{uuid4().hex}"
        self._created = int(time.time())
        self._choices: dict[int, _Choice] = {}

    def full_body(self, pieces: Sequence[Piece], usage: Usage) -> ChatCompletion:
        """Return the complete answer."""
        body: ChatCompletion = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(piece) for piece in pieces],
            "usage": usage_body(usage),
        }
        if self._plan.token_ids:
            body["prompt_token_ids"] = list(pieces[0].prompt_token_ids)
        return body

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Return the chunks of a piece; the first one of a choice has the role."""
        choice = self._choices.get(piece.index)
        if choice is None:
            choice = self._choices[piece.index] = _Choice(self._plan)
            opening = None if self._plan.calls else ""
            delta = ChatDelta(role="assistant", content=opening, refusal=None)
            chunk = self._chunk(piece.index, delta)
            if self._plan.token_ids:
                chunk["prompt_token_ids"] = list(piece.prompt_token_ids)
            yield chunk
        choice.unsent += piece.logprobs
        choice.unsent_ids += piece.token_ids
        for delta in choice.deltas(piece):
            yield self._chunk_of(choice, piece.index, delta)
        if piece.finish_reason is not None:
            yield self._chunk_of(choice, piece.index, {}, choice.finish(piece.finish_reason))

    def end(self) -> ChatChunk:
        """Return a chunk without choices."""
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [],
        }

    def _choice(self, piece: Piece) -> ChatChoice:
        choice = _Choice(self._plan)
        message = _message(list(choice.deltas(piece)))
        body: ChatChoice = {
            "index": piece.index,
            "message": message,
            "logprobs": chat_logprobs(piece.logprobs) if self._plan.logprobs else None,
            "finish_reason": choice.finish(piece.finish_reason or FinishReason.STOP),
        }
        if self._plan.token_ids:
            body["token_ids"] = list(piece.token_ids)
        return body

    def _chunk_of(
        self, choice: _Choice, index: int, delta: ChatDelta, reason: ChatFinish | None = None
    ) -> dict[str, Any]:
        """Return a chunk with the probabilities and ids of all its tokens."""
        chunk = self._chunk(index, delta, reason, choice.take_logprobs())
        if self._plan.token_ids:
            chunk["choices"][0]["token_ids"] = choice.take_ids()
        return chunk

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        reason: ChatFinish | None = None,
        logprobs: ChatLogprobs | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self.end(), "choices": [choice]}


class _Choice:
    """What is known of one choice while it is written."""

    def __init__(self, plan: Plan) -> None:
        self._reader = plan.calls.reader() if plan.calls else None
        self._shows_thoughts = plan.reasoning
        self._calls = 0
        # Text may be held back, and what belongs to its tokens with it.
        self.unsent: tuple[TokenLogprobs, ...] = ()
        self.unsent_ids: tuple[int, ...] = ()

    def deltas(self, piece: Piece) -> Iterator[ChatDelta]:
        if piece.reasoning and self._shows_thoughts:
            yield {"reasoning_content": piece.reasoning}
        if self._reader is None:
            if piece.text:
                yield {"content": piece.text}
            return
        parts = self._reader.read(piece.text)
        if piece.finish_reason is not None:
            parts += self._reader.end()
        for part in parts:
            yield self._delta(part)

    def finish(self, reason: FinishReason) -> ChatFinish:
        return "tool_calls" if self._calls and reason is FinishReason.STOP else reason

    def take_logprobs(self) -> ChatLogprobs | None:
        sent, self.unsent = self.unsent, ()
        return chat_logprobs(sent) if sent else None

    def take_ids(self) -> list[int]:
        sent, self.unsent_ids = self.unsent_ids, ()
        return list(sent)

    def _delta(self, part: Part) -> ChatDelta:
        if isinstance(part, Content):
            return {"content": part.text}
        call: ToolCallPiece
        if isinstance(part, CallArguments):
            call = {"index": self._calls - 1, "function": {"arguments": part.text}}
        else:
            call = _begun(part, self._calls)
            self._calls += 1
        return {"tool_calls": [call]}


def _begun(part: CallBegun, index: int) -> ToolCallPiece:
    return {
        "index": index,
        "id": new_call_id(),
        "type": "function",
        "function": {"name": part.name, "arguments": ""},
    }


def _message(deltas: Sequence[ChatDelta]) -> ChatMessage:
    """Return the message that a stream of deltas adds up to."""
    content = "".join(delta.get("content") or "" for delta in deltas)
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    calls: list[ToolCallBody] = []
    for piece in pieces:
        if "id" in piece:
            name = piece["function"]["name"]
            calls.append(
                {
                    "id": piece["id"],
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
            )
        calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    message = ChatMessage(role="assistant", content=content, refusal=None)
    if thoughts := "".join(delta.get("reasoning_content", "") for delta in deltas):
        message["reasoning_content"] = thoughts
    if calls:
        message["content"] = content or None
        message["tool_calls"] = calls
    return message
