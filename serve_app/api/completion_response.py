"""Writes the answers of one completion, with its prompt in front if that is asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from serve_app.api.choices import Piece
from serve_app.api.convert import Plan
from serve_app.api.logprobs import CompletionTokens
from serve_app.api.response_types import TextChoice, TextCompletion, usage_body
from serve_app.protocol import FinishReason, LLMEngine, Prompt, TextPrompt, TokenLogprobs, Usage


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as its answer shows it.

    Args:
        text: what the client sent, or the text of the ids that it sent.
        first: the text of the prompt's first token, which has no probability to carry it.
    """

    text: str = ""
    first: str = ""


async def read_echoes(engine: LLMEngine, plan: Plan) -> list[Echo]:
    """Ask the engine for the text of each prompt, as far as the answer has to show it.

    Raises:
        RequestError: a prompt cannot be encoded or decoded.
    """
    if not plan.echo:
        return [Echo()] * len(plan.requests)
    return await asyncio.gather(
        *(_echo(engine, request.prompt, first=plan.logprobs) for request in plan.requests)
    )


async def _echo(engine: LLMEngine, prompt: Prompt, *, first: bool) -> Echo:
    whole = prompt.text if isinstance(prompt, TextPrompt) and prompt.truncate is None else None
    if whole is not None and not first:
        return Echo(whole)
    ids = (await engine.tokenize(prompt)).token_ids
    text = await engine.detokenize(ids) if whole is None else whole
    return Echo(text, await engine.detokenize(ids[:1]) if first else "")


class CompletionWriter:
    """Writes completions; its chunks have the shape of the whole.

    Args:
        model: the name to answer under.
        plan: what the answer has to show.
        echoes: one for each prompt.
    """

    def __init__(self, model: str, plan: Plan, echoes: Sequence[Echo]) -> None:
        self._model = model
        self._plan = plan
        self._echoes = echoes
        self._id = f"cmpl-{uuid4().hex}"
        self._created = int(time.time())
        self._tokens: dict[int, CompletionTokens] = {}

    def full_body(self, pieces: Sequence[Piece], usage: Usage) -> TextCompletion:
        """Return the complete answer."""
        body = self.end()
        of_prompts = [piece.prompt_logprobs for piece in pieces[:: self._plan.n]]
        body["choices"] = [
            self._choice(piece, of_prompts[piece.index // self._plan.n], piece.finish_reason)
            for piece in pieces
        ]
        body["usage"] = usage_body(usage)
        return body

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Return the chunk of a piece's text, if it has any, and that of its finish."""
        choice = self._choice(piece, piece.prompt_logprobs, None)
        content = choice["text"] or choice.get("token_ids")
        if content or (choice["logprobs"] and choice["logprobs"]["tokens"]):
            yield {**self.end(), "choices": [choice]}
        if piece.finish_reason is not None:
            finish = TextChoice(
                index=piece.index, text="", logprobs=None, finish_reason=piece.finish_reason
            )
            yield {**self.end(), "choices": [finish]}

    def end(self) -> TextCompletion:
        """Return a chunk without choices."""
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [],
        }

    def _choice(
        self, piece: Piece, of_prompt: Sequence[TokenLogprobs], reason: FinishReason | None
    ) -> TextChoice:
        tokens, text = self._tokens.get(piece.index), piece.text
        echo = self._echoes[piece.index // self._plan.n]
        if tokens is None:
            text = echo.text + text
            tokens = CompletionTokens(_offset(echo, of_prompt))
            self._tokens[piece.index] = tokens
        entries = [*of_prompt, *piece.logprobs]
        choice: TextChoice = {
            "index": piece.index,
            "text": text,
            "logprobs": tokens.read(entries, first=echo.first) if self._plan.logprobs else None,
            "finish_reason": reason,
        }
        if self._plan.token_ids:
            choice["token_ids"] = list(piece.token_ids)
            if piece.prompt_token_ids:
                choice["prompt_token_ids"] = list(piece.prompt_token_ids)
        return choice


def _offset(echo: Echo, of_prompt: Sequence[TokenLogprobs]) -> int:
    """Return where a choice's first token begins: before its text, if special tokens lead."""
    raw = b"".join(entry.chosen.raw for entry in of_prompt if entry.chosen is not None)
    return len(echo.text) - len((echo.first.encode() + raw).decode(errors="replace"))
