"""All choices of one API request, generated at the same time and read as one flow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from serve_app.errors import EngineError, RequestCancelled
from serve_app.protocol import FinishReason, GenerationRequest, LLMEngine, TokenDelta, Usage


@dataclass(frozen=True, slots=True)
class Piece:
    """What came for one choice since the last look, in one piece."""

    index: int
    text: str
    finish_reason: FinishReason | None


class Choices:
    """Runs one generation for each choice; leaving the context frees every one of them.

    Args:
        engine: continues each prompt.
        requests: prompt by prompt, `choices_per_prompt` for each.
        choices_per_prompt: how often a prompt is continued; it is counted once.
    """

    def __init__(
        self, engine: LLMEngine, requests: Sequence[GenerationRequest], choices_per_prompt: int
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._choices_per_prompt = choices_per_prompt
        self._arrived: asyncio.Queue[tuple[int, TokenDelta | BaseException]] = asyncio.Queue()
        self._usages = [Usage(0, 0)] * len(requests)
        self._running = len(requests)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Choices:
        """Start every generation."""
        for index, request in enumerate(self._requests):
            task = asyncio.create_task(self._read(index, request))
            task.add_done_callback(partial(self._ended, index))
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

    async def next(self) -> list[Piece]:
        """Wait for something and return all that is ready, merged by choice; [] is the end.

        Raises:
            ServeAppError: the first error of any choice, at once.
        """
        if not self._running:
            return []
        pieces: dict[int, Piece] = {}
        while not pieces or not self._arrived.empty():
            index, delta = await self._arrived.get()
            if isinstance(delta, BaseException):
                raise delta
            self._usages[index] = delta.usage
            self._running -= delta.finish_reason is not None
            before = pieces.get(index)
            text = delta.text if before is None else before.text + delta.text
            pieces[index] = Piece(index, text, delta.finish_reason)
        return list(pieces.values())

    @property
    def usage(self) -> Usage:
        """Totals of all choices so far; a prompt counts once, however many choices it has."""
        if len(self._usages) == 1:
            return self._usages[0]
        firsts = self._usages[:: self._choices_per_prompt]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in firsts),
            completion_tokens=sum(usage.completion_tokens for usage in self._usages),
            cached_tokens=sum(usage.cached_tokens for usage in firsts),
        )

    async def _read(self, index: int, request: GenerationRequest) -> None:
        deltas = self._engine.generate(request)
        try:
            async for delta in deltas:
                self._arrived.put_nowait((index, delta))
                if delta.finish_reason is not None:
                    return
        finally:
            await _close(deltas)
        raise EngineError("generation ended without a reason")

    def _ended(self, index: int, task: asyncio.Task[None]) -> None:
        error = (
            RequestCancelled("cancelled by the engine") if task.cancelled() else task.exception()
        )
        if error is not None:
            self._arrived.put_nowait((index, error))


async def _close(deltas: AsyncIterator[TokenDelta]) -> None:
    close = getattr(deltas, "aclose", None)  # async generators have it, other iterators need not
    if close is not None:
        await close()
