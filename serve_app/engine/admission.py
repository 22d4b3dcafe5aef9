"""Whether one more request may wait for the engine, and when to come back if not.

What is open is bounded twice: in requests and in tokens, prompt and possible completion
together, because a few long requests can keep the engine busy for as long as many short ones.
What fits beside the running requests does not count as waiting. Where one client has filled the
line, there is some more room for those that have less than their share of it, and where a lower
class has, for the higher one: not for the lowest, which could leave none, and a part of it for the
highest alone, of which others leave nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from serve_app.config import ApiConfig, EngineConfig
from serve_app.engine.drain import DrainRate
from serve_app.engine.stats import EngineStats
from serve_app.errors import InvalidRequest, Overloaded
from serve_app.protocol import Priority

MAX_RETRY_AFTER_S = 600
SPARE_PART = 4  # of what is taken on, one in so many more is for clients that have little


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine takes on.

    Args:
        running: requests in the batch at the most.
        queued: requests that may wait.
        queued_tokens: tokens that the waiting requests may come to.
    """

    running: int
    queued: int
    queued_tokens: int

    @classmethod
    def of(cls, engine: EngineConfig, api: ApiConfig) -> Limits:
        """Return the limits that a config asks for."""
        return cls(engine.max_running_requests, api.max_queued_requests, api.max_queued_tokens)

    @property
    def open(self) -> int:
        """Requests at the most, running or waiting."""
        return self.running + self.queued

    @property
    def spare(self) -> int:
        """Requests over `open` that are for clients below their share, and higher classes."""
        return self.open // SPARE_PART

    @property
    def most(self) -> int:
        """Requests at the most; those over `open` and `spare` are for the highest class."""
        return self.open + self.spare + math.ceil(self.spare / 2)


class Load(Protocol):
    """What an engine has to do, and how fast it does it; any thread asks."""

    @property
    def waiting(self) -> int:
        """Requests that found no place in the batch."""
        ...

    def stats(self) -> EngineStats:
        """Return the present numbers."""
        ...

    def drain_rate(self) -> DrainRate | None:
        """Return how fast requests finish; None before two have."""
        ...


class Admission:
    """Counts what is open; calls come from one thread at a time.

    Args:
        loop: knows what runs and how fast it drains.
        limits: what is taken on.
    """

    def __init__(self, loop: Load, limits: Limits) -> None:
        self._loop = loop
        self._limits = limits
        # Tokens at the most, client and class, by the key.
        self._open: dict[int, tuple[int, str, Priority]] = {}
        self._clients: Counter[str] = Counter()

    def add(self, key: int, tokens: int, client: str, priority: Priority = Priority.NORMAL) -> None:
        """Note a sequence, the tokens it can come to, who sent it, and its class."""
        self._open[key] = tokens, client, priority
        self._clients[client] += 1

    def drop(self, key: int) -> None:
        """Forget a sequence that is over; one that is unknown is not an error."""
        if (gone := self._open.pop(key, None)) is not None:
            self._clients -= Counter({gone[1]: 1})  # which keeps no zeros

    def require(
        self,
        count: int,
        tokens: int = 0,
        client: str = "",
        priority: Priority = Priority.NORMAL,
    ) -> None:
        """Refuse what is too much now.

        Args:
            count: completions of a request, each a sequence.
            tokens: that they can come to together; 0 while that is not known.
            client: who sent it.
            priority: its class.

        Raises:
            InvalidRequest: more completions than the engine ever takes on.
            Overloaded: no room now; `retry_after_s` is when there should be, in seconds.
        """
        if count > self._limits.open:
            raise InvalidRequest(
                f"The server computes {self._limits.open} completions at the most; lower n.",
                param="n",
            )
        if priority is not Priority.LOW and self._may_use_spare(client, count, priority):
            return
        waiting = self._loop.waiting
        if len(self._open) + count > self._limits.open or waiting >= self._limits.queued:
            raise self._overloaded(
                f"{self._limits.queued} waiting requests", requests=max(1, waiting)
            )
        stats = self._loop.stats()
        # A sum over what is open, and no counter: it cannot drift from what is counted by request.
        queued = sum(tokens for tokens, _, _ in self._open.values()) - stats.running_tokens
        room = max(0, stats.kv_tokens_total - stats.running_tokens)
        excess = queued + tokens - room - self._limits.queued_tokens
        if queued > 0 and excess > 0:  # alone, a request of any size gets its turn
            raise self._overloaded(f"{self._limits.queued_tokens} waiting tokens", tokens=excess)

    def _may_use_spare(self, client: str, count: int, priority: Priority) -> bool:
        """Return whether there is room for who has less than its share, or goes before the rest.

        A client that stays below its share leaves as much room once more. A request of a class
        with less than a half of what is open goes before the other half.
        """
        own, everything = self._clients[client] + count, len(self._open)
        limits = self._limits
        most = limits.most if priority is Priority.HIGH else limits.open + limits.spare
        room = most - everything
        if own * len({*self._clients, client}) <= everything and own <= room:
            return True
        ahead = count + sum(one <= priority for _, _, one in self._open.values())
        return 2 * ahead <= everything and count <= room

    def _overloaded(self, limit: str, *, requests: int = 0, tokens: int = 0) -> Overloaded:
        rate = self._loop.drain_rate()
        # Before two requests have ended nothing is measured; a second is worth a try.
        wait_s = 1.0
        if rate is not None:
            wait_s = max(requests / rate.requests, tokens / rate.tokens)
        retry_after_s = min(max(1, math.ceil(wait_s)), MAX_RETRY_AFTER_S)
        return Overloaded(
            f"The server is at its limit of {limit}. Please try again in {retry_after_s} s.",
            retry_after_s=retry_after_s,
        )
