"""Writes the answer of one response: an object of items, or the events that build it up."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any
from uuid import uuid4

from serve_app.api import sse
from serve_app.api.choices import Piece
from serve_app.api.convert import Plan
from serve_app.api.error_body import envelope
from serve_app.api.logprobs import ChatTokenLogprob, chat_logprobs
from serve_app.api.tool_parser import CallBegun, Content, Part
from serve_app.api.tools import new_call_id
from serve_app.errors import ServeAppError
from serve_app.protocol import FinishReason, TokenLogprobs, Usage

Event = dict[str, Any]


class ResponseWriter:
    """See `AnswerWriter`; there is one choice.

    Events come in the order of OpenAI's: created, in_progress, for each item what is added,
    its deltas and what is done, and one that ends it: completed, incomplete or error.

    Args:
        model: the name to answer under.
        plan: what the answer has to show.
    """

    def __init__(self, model: str, plan: Plan) -> None:
        self._reader = plan.calls.reader() if plan.calls else None
        self._shows_thoughts = plan.reasoning
        self._body: dict[str, Any] = {
            "id": f"resp_{uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **(plan.repeated or {}),
        }
        self._items: list[_Thoughts | _Message | _Call] = []
        self._open: _Thoughts | _Message | _Call | None = None
        self._reason: FinishReason | None = None
        self._untold: tuple[TokenLogprobs, ...] = ()  # text may be held back, its tokens with it
        self._begun = False
        self._numbers = count()

    def full_body(self, pieces: Sequence[Piece], usage: Usage) -> Event:
        """Return the complete answer."""
        for _ in self._events_of(pieces[0]):
            pass
        for _ in self._closed():
            pass
        return self._response(self._status, usage)

    def events(self, pieces: Sequence[Piece], usage: Usage) -> Iterator[bytes]:  # noqa: ARG002
        """Return the events of the pieces."""
        if not self._begun:
            self._begun = True
            for kind in ("created", "in_progress"):
                yield self._event(
                    {"type": f"response.{kind}", "response": self._response("in_progress")}
                )
        for piece in pieces:
            for event in self._events_of(piece):
                yield self._event(event)

    def end(self, usage: Usage) -> bytes:
        """Return what closes the last item, and the event that ends the stream."""
        closing = b"".join(self._event(event) for event in self._closed())
        last = {
            "type": f"response.{self._status}",
            "response": self._response(self._status, usage),
        }
        return closing + self._event(last)

    def failed(self, error: ServeAppError) -> bytes:
        """Return the event that ends a stream with an error.

        Beside the fields of OpenAI's event it holds the envelope of all errors here, by which
        the official client knows an error in any stream.
        """
        body = envelope(error)
        return self._event({**body["error"], "error": body["error"], "type": "error"})

    @property
    def _status(self) -> str:
        return "incomplete" if self._reason is FinishReason.LENGTH else "completed"

    def _response(self, status: str, usage: Usage | None = None) -> Event:
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._body,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": why,
            "output": [item.body for item in self._items],
            **({} if usage is None else {"usage": _usage(usage)}),
        }

    def _events_of(self, piece: Piece) -> Iterator[Event]:
        self._reason = piece.finish_reason
        if piece.reasoning and self._shows_thoughts:
            yield from self._thought(piece.reasoning)
        for text, logprobs in _by_token(piece) if self._reader else [(piece.text, piece.logprobs)]:
            self._untold += logprobs
            for part in self._parts(text):
                yield from self._part(part)
        if piece.finish_reason is not None:
            for part in self._reader.end() if self._reader else []:
                yield from self._part(part)
            if not self._items:
                yield from self._opened(_Message(0))

    def _thought(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, _Thoughts):
            yield from self._opened(_Thoughts(len(self._items)))
        if isinstance(self._open, _Thoughts):
            yield self._open.more(text)

    def _parts(self, text: str) -> list[Part]:
        if self._reader is not None:
            return self._reader.read(text)
        return [Content(text)] if text else []

    def _part(self, part: Part) -> Iterator[Event]:
        if isinstance(part, Content):
            if not isinstance(self._open, _Message):
                yield from self._opened(_Message(len(self._items)))
            if isinstance(self._open, _Message):
                yield self._open.more(part.text, self._take_logprobs())
            return
        self._untold = ()  # of the call's own syntax, which nobody is shown
        if isinstance(part, CallBegun):
            yield from self._opened(_Call(len(self._items), part.name))
        elif isinstance(self._open, _Call):
            yield self._open.more(part.text)

    def _opened(self, item: _Thoughts | _Message | _Call) -> Iterator[Event]:
        yield from self._closed()
        self._items.append(item)
        self._open = item
        yield from item.added()

    def _take_logprobs(self) -> list[ChatTokenLogprob]:
        entries, self._untold = self._untold, ()
        return chat_logprobs(entries)["content"]

    def _closed(self) -> Iterator[Event]:
        if isinstance(self._open, _Message):
            self._open.logprobs += self._take_logprobs()  # of what has no text, such as an end
        if self._open is not None:
            cut = self._reason is FinishReason.LENGTH
            yield from self._open.done("incomplete" if cut else "completed")
        self._open = None

    def _event(self, body: Event) -> bytes:
        numbered = {**body, "sequence_number": next(self._numbers)}
        return f"event: {body['type']}\n".encode() + sse.event(numbered)


def _by_token(piece: Piece) -> Iterator[tuple[str, tuple[TokenLogprobs, ...]]]:
    """Return a piece's text by token, as far as it can be cut so, with their probabilities.

    What is text and what belongs to a call is known of each token only if each is read alone.
    """
    rest, raw = piece.text, b""
    waiting: tuple[TokenLogprobs, ...] = ()
    for entry in piece.logprobs:
        waiting += (entry,)
        raw += entry.chosen.raw if entry.chosen else b""
        text = raw.decode(errors="replace")
        if text and rest.startswith(text):
            yield text, waiting
            rest, raw, waiting = rest[len(text) :], b"", ()
    if rest or waiting:
        yield rest, waiting


class _TextItem:
    """An item whose content is one part, a text that grows."""

    def __init__(self, prefix: str, place: int) -> None:
        self._place = place
        self._id = f"{prefix}_{uuid4().hex}"
        self._text = ""
        self._status = "in_progress"

    @property
    def body(self) -> Event:
        raise NotImplementedError

    @property
    def _part(self) -> Event:
        raise NotImplementedError

    @property
    def _content(self) -> list[Event]:
        return [] if self._status == "in_progress" else [self._part]

    @property
    def _where(self) -> Event:
        return {"item_id": self._id, "output_index": self._place, "content_index": 0}

    def added(self) -> Iterator[Event]:
        added = "response.output_item.added"
        yield {"type": added, "output_index": self._place, "item": self.body}
        yield {"type": "response.content_part.added", **self._where, "part": self._part}

    def _ended(self) -> Iterator[Event]:
        yield {"type": "response.content_part.done", **self._where, "part": self._part}
        kind = "response.output_item.done"
        yield {"type": kind, "output_index": self._place, "item": self.body}


class _Thoughts(_TextItem):
    """What the model thought before its answer."""

    def __init__(self, place: int) -> None:
        super().__init__("rs", place)

    @property
    def body(self) -> Event:
        return {
            "id": self._id,
            "type": "reasoning",
            "status": self._status,
            "summary": [],
            "content": self._content,
        }

    @property
    def _part(self) -> Event:
        return {"type": "reasoning_text", "text": self._text}

    def more(self, text: str) -> Event:
        self._text += text
        return {"type": "response.reasoning_text.delta", **self._where, "delta": text}

    def done(self, status: str) -> Iterator[Event]:
        self._status = status
        yield {"type": "response.reasoning_text.done", **self._where, "text": self._text}
        yield from self._ended()


class _Message(_TextItem):
    """Text for the reader."""

    def __init__(self, place: int) -> None:
        super().__init__("msg", place)
        self.logprobs: list[ChatTokenLogprob] = []

    @property
    def body(self) -> Event:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "status": self._status,
            "content": self._content,
        }

    @property
    def _part(self) -> Event:
        return {
            "type": "output_text",
            "text": self._text,
            "annotations": [],
            "logprobs": [*self.logprobs],
        }

    def more(self, text: str, logprobs: list[ChatTokenLogprob]) -> Event:
        self._text += text
        self.logprobs += logprobs
        kind = "response.output_text.delta"
        return {"type": kind, **self._where, "delta": text, "logprobs": logprobs}

    def done(self, status: str) -> Iterator[Event]:
        self._status = status
        kind = "response.output_text.done"
        yield {"type": kind, **self._where, "text": self._text, "logprobs": [*self.logprobs]}
        yield from self._ended()


class _Call:
    """A call of one of the request's functions."""

    def __init__(self, place: int, name: str) -> None:
        self._place = place
        self._id, self._call_id = f"fc_{uuid4().hex}", new_call_id()
        self._name = name
        self._arguments = ""
        self._status = "in_progress"

    @property
    def body(self) -> Event:
        return {
            "id": self._id,
            "type": "function_call",
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self._arguments,
            "status": self._status,
        }

    @property
    def _where(self) -> Event:
        return {"item_id": self._id, "output_index": self._place}

    def added(self) -> Iterator[Event]:
        added = "response.output_item.added"
        yield {"type": added, "output_index": self._place, "item": self.body}

    def more(self, text: str) -> Event:
        self._arguments += text
        return {"type": "response.function_call_arguments.delta", **self._where, "delta": text}

    def done(self, status: str) -> Iterator[Event]:
        self._status = status
        kind = "response.function_call_arguments.done"
        yield {"type": kind, **self._where, "name": self._name, "arguments": self._arguments}
        kind = "response.output_item.done"
        yield {"type": kind, "output_index": self._place, "item": self.body}


def _usage(usage: Usage) -> Event:
    """Return `ResponseUsage`; nothing is written to a cache that anybody pays for."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
