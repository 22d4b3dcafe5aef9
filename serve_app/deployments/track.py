"""One of two versions behind an ingress, and what became of its requests."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

from serve_app.deployments.canary import Seen
from serve_app.errors import Overloaded, RequestCancelled, RequestError, ServeAppError
from serve_app.protocol import GenerationRequest, LLMEngine, TokenDelta


class TrackMetrics(Protocol):
    """Where the two versions are compared by people."""

    def first_token(self, track: str, seconds: float) -> None: ...  # noqa: D102
    def ended(self, track: str, outcome: str) -> None: ...  # noqa: D102
    def share(self, share: float) -> None: ...  # noqa: D102


class Track:
    """A version in one step of a canary.

    Args:
        name: `stable` or `canary`.
        engine: of the version.
        metrics: where it is counted for people.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        engine: LLMEngine,
        metrics: TrackMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.engine = engine
        self.seen = Seen()
        self._metrics = metrics
        self._clock = clock
        self._waiting: dict[str, float] = {}  # since when, by request

    async def generate(
        self, request: GenerationRequest, *, copy: bool = False
    ) -> AsyncGenerator[TokenDelta, None]:
        """Continue one prompt, and count it.

        Args:
            request: of a client.
            copy: nobody reads the answer; having no room for it is no error.
        """
        began = self._clock()
        first_at = None
        tokens = 0  # after the first delta
        unfinished = request.n
        self._waiting[request.request_id] = began
        answer: Any = self.engine.generate(request)  # a generator, whatever engine it is
        try:
            async with aclosing(answer) as deltas:
                async for delta in deltas:
                    now = self._clock()
                    if first_at is None:
                        first_at = now
                        del self._waiting[request.request_id]
                        self.seen.first.add(first_at - began)
                        self._metrics.first_token(self.name, first_at - began)
                    else:
                        tokens += len(delta.token_ids)
                    unfinished -= delta.finish_reason is not None
                    if not unfinished:  # whoever reads may go now
                        self._metrics.ended(self.name, "ok")
                        if tokens:
                            self.seen.token.add((now - first_at) * request.n / tokens)
                    yield delta
        except ServeAppError as error:
            self._waiting.pop(request.request_id, None)
            self._failed(error, answered=first_at is not None, copy=copy)
            raise
        finally:
            if self._waiting.pop(request.request_id, None) is not None:  # its client has left
                self.seen.waiting.add(self._clock() - began)

    def _failed(self, error: ServeAppError, *, answered: bool, copy: bool) -> None:
        if copy and isinstance(error, Overloaded):
            self.seen.dropped += 1
        elif not isinstance(error, RequestError | RequestCancelled):
            self.fail(answered=answered)

    def fail(self, *, answered: bool) -> None:
        """Count an error that is not the client's."""
        self.seen.failed += 1
        self.seen.unanswered += not answered
        self._metrics.ended(self.name, "error")

    def snapshot(self) -> Seen:
        """Return what was seen until now, with those that wait."""
        seen = Seen()
        seen.add(self.seen)
        now = self._clock()
        for began in self._waiting.values():
            seen.waiting.add(now - began)
        return seen
