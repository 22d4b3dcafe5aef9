"""All choices of one API request, generated at the same time and read as one flow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from serve_app.errors import AnswerTooLarge, EngineError, RequestCancelled
from serve_app.protocol import (
    FinishReason,
    GenerationRequest,
    LLMEngine,
    Timing,
    TokenDelta,
    TokenLogprobs,
    Usage,
)

# What a piece and a probability come to as JSON, about.
_PIECE_BYTES, _LOGPROB_BYTES = 256, 80


@dataclass(frozen=True, slots=True)
class Piece:
    """What came for one choice since the last look, in one piece.

    Args:
        index: of the choice: its prompt's place times `n`, plus the completion's index.
        text: new text, may be empty.
        finish_reason: set on the choice's last piece.
        logprobs: of the new tokens, if they were asked for.
        prompt_logprobs: of the prompt's tokens, once, for a prompt's first choice.
        reasoning: new text of the model's thoughts, which come before `text`.
        token_ids: the new tokens.
        prompt_token_ids: the prompt's, once, if they were asked for.
    """

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()

    @property
    def weight(self) -> int:
        """About how many bytes it comes to in an answer."""
        entries = sum(1 + len(entry.top) for entry in (*self.logprobs, *self.prompt_logprobs))
        return _PIECE_BYTES + len(self.text) + _LOGPROB_BYTES * entries


def join(pieces: Sequence[Piece]) -> Piece:
    """Return consecutive pieces of one choice, at least one, as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        finish_reason=pieces[-1].finish_reason,
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        prompt_logprobs=tuple(entry for piece in pieces for entry in piece.prompt_logprobs),
        reasoning="".join(piece.reasoning for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        prompt_token_ids=pieces[0].prompt_token_ids,
    )


class Choices:
    """Runs one generation for each prompt; leaving the context frees every one of them.

    Args:
        engine: continues each prompt.
        requests: one for each prompt, all with the same `n`.
        prompt_only: show and count nothing of what is generated.
        max_bytes: of all that is generated, about, as JSON; what nobody has read yet as well.
    """

    def __init__(
        self,
        engine: LLMEngine,
        requests: Sequence[GenerationRequest],
        *,
        prompt_only: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self.weight = 0  # of all pieces so far, in bytes
        self._engine = engine
        self._requests = requests
        self._n = requests[0].n
        self._prompt_only = prompt_only
        self._arrived: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._usages = [[Usage(0, 0)] * self._n for _ in requests]
        self.count = len(requests) * self._n
        self._running = self.count
        self.timing = Timing()  # of the first choice
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Choices:
        """Start every generation."""
        for place, request in enumerate(self._requests):
            task = asyncio.create_task(self._read(place, request))
            task.add_done_callback(self._ended)
            self._tasks.append(task)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Cancel what still runs and wait until the engine has let it go."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def next(self, patience_s: float | None = None) -> list[Piece] | None:
        """Wait for something and return all that is ready, merged by choice.

        Args:
            patience_s: how long to wait at the most; None is for ever.

        Returns:
            [] at the end, and None when nothing came in time.

        Raises:
            ServeAppError: the first error of any prompt, at once.
        """
        if not self._running:
            return []
        if self._arrived.empty() and patience_s is not None:
            try:
                async with asyncio.timeout(patience_s):
                    first = await self._arrived.get()
            except TimeoutError:
                return None
        else:
            first = await self._arrived.get()
        return self._merged(first)

    def _merged(self, first: Piece | BaseException) -> list[Piece]:
        pieces: dict[int, list[Piece]] = {}
        piece = first
        while True:
            if isinstance(piece, BaseException):
                raise piece
            # Counted where it is read, so that `[]` comes after the last piece and not before.
            self._running -= piece.finish_reason is not None
            pieces.setdefault(piece.index, []).append(piece)
            if self._arrived.empty():
                # All that is there at once: one chunk costs as much as ten small ones.
                return [join(several) for several in pieces.values()]
            piece = self._arrived.get_nowait()

    @property
    def usage(self) -> Usage:
        """Totals of all choices so far; a prompt counts once, however many choices it has."""
        usages = [usage for choices in self._usages for usage in choices]
        if len(usages) == 1:
            return usages[0]
        return Usage(
            # The largest: a completion that has not begun to report still says 0.
            prompt_tokens=sum(max(u.prompt_tokens for u in choices) for choices in self._usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(max(u.cached_tokens for u in choices) for choices in self._usages),
        )

    async def _read(self, place: int, request: GenerationRequest) -> None:
        deltas = self._engine.generate(request)
        unfinished = request.n
        try:
            async for shown in deltas:
                delta = _without_completion(shown) if self._prompt_only else shown
                self._usages[place][delta.index] = delta.usage
                if place == delta.index == 0:
                    self.timing = delta.timing
                self._add(_piece(place * self._n, delta))
                unfinished -= delta.finish_reason is not None
                if not unfinished:
                    return
        finally:
            await _close(deltas)
        raise EngineError("generation ended without a reason")

    def _add(self, piece: Piece) -> None:
        self.weight += piece.weight
        if self._max_bytes is not None and self.weight > self._max_bytes:
            raise AnswerTooLarge(
                f"the answer grew over {self._max_bytes} bytes; ask for fewer choices, tokens or "
                "probabilities"
            )
        self._arrived.put_nowait(piece)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = (
            RequestCancelled("cancelled by the engine") if task.cancelled() else task.exception()
        )
        if error is not None:
            self._arrived.put_nowait(error)


def _piece(first: int, delta: TokenDelta) -> Piece:
    return Piece(
        index=first + delta.index,
        text=delta.text,
        finish_reason=delta.finish_reason,
        logprobs=delta.logprobs,
        prompt_logprobs=delta.prompt_logprobs,
        reasoning=delta.reasoning,
        token_ids=delta.token_ids,
        prompt_token_ids=delta.prompt_token_ids,
    )


def _without_completion(delta: TokenDelta) -> TokenDelta:
    return replace(
        delta,
        text="",
        reasoning="",
        token_ids=(),
        logprobs=(),
        usage=replace(delta.usage, completion_tokens=0),
        finish_reason=delta.finish_reason and FinishReason.LENGTH,
    )


async def _close(deltas: AsyncIterator[TokenDelta]) -> None:
    close = getattr(deltas, "aclose", None)  # async generators have it, other iterators need not
    if close is not None:
        await close()
