"""Who is next: the higher class, within one clients take turns, and so do a client's requests.

A request counts by what it runs: one with 128 completions that has a place for each of them
comes after one that has none. Among equals the oldest is first, so with one completion a request
and one client this is first come, first served.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from serve_app.engine.sequence import Row, Sequence

# A long prompt: what somebody who comes now and then has computed before it shares with a burst.
CREDIT_TOKENS = 8192
MAX_CLIENTS = 10_000  # whose tokens are known; then all begin anew


class Shares:
    """How many sequences run, by client and by request, and whose prompts were computed lately."""

    def __init__(self) -> None:
        self._clients: Counter[str] = Counter()
        self._requests: Counter[int] = Counter()
        self._ahead: Counter[str] = Counter()  # prompt tokens over those of whoever had least

    def add(self, sequence: Sequence) -> None:
        """Count one that begins to run."""
        self._clients[sequence.client] += 1
        self._requests[sequence.request] += 1

    def drop(self, sequence: Sequence) -> None:
        """Count one that runs no more."""
        self._clients -= Counter({sequence.client: 1})  # which keeps no zeros
        self._requests -= Counter({sequence.request: 1})

    def of(self, sequence: Sequence) -> tuple[int, int]:
        """Return what the sequence's client and its request run."""
        return self._clients[sequence.client], self._requests[sequence.request]

    def rank(self, sequence: Sequence) -> tuple[int, int, int]:
        """Return what orders sequences: the first begins, the last makes room."""
        return sequence.priority, *self.of(sequence)

    def in_turn(self, prompts: list[Sequence]) -> list[Sequence]:
        """Return prompts that are on their way in the order of their turns.

        Of a class the client is first that had the fewest tokens of prompts computed, then the
        one that runs least; of a client the oldest. Who had none for a while is first for
        `CREDIT_TOKENS` at the most.
        """
        if len(clients := {one.client for one in prompts}) > 1:
            least = min(self._ahead[client] for client in clients)
            self._ahead -= Counter(dict.fromkeys(self._ahead, least))  # which keeps no zeros
        return sorted(
            prompts,
            key=lambda one: (one.priority, self._ahead[one.client], self._clients[one.client]),
        )

    def computed(self, prompts: Iterable[Row]) -> None:
        """Count a step's rows of prompts."""
        if len(self._ahead) > MAX_CLIENTS:
            self._ahead.clear()
        for row in prompts:
            client = row.sequence.client
            self._ahead[client] = min(self._ahead[client] + row.count, CREDIT_TOKENS)

    def owes(self, running: Sequence, waiting: Sequence) -> bool:
        """Return whether a running sequence has to make room for a waiting one.

        It has to if its class is lower. Within a class it has to if its client, or, within one
        client, its request, still has at least as many places after the change.
        """
        if running.priority != waiting.priority:
            return running.priority > waiting.priority
        clients, requests = self.of(running)
        theirs, own = self.of(waiting)
        if running.client != waiting.client:
            return clients > theirs + 1
        return running.request != waiting.request and requests > own + 1


class WaitingLine:
    """The sequences without a place, oldest first within each request.

    Args:
        shares: what runs; the caller keeps it.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._requests: dict[int, deque[Sequence]] = {}
        self._suspects: dict[int, Sequence] = {}  # of those, by key: asked for at every admission
        self._length = 0  # counted, because other threads ask while the engine's changes the rest

    def __len__(self) -> int:
        """Return how many wait; any thread."""
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """Yield all that wait, by request."""
        for line in self._requests.values():
            yield from line

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait behind those of its request."""
        self._requests.setdefault(sequence.request, deque()).append(sequence)
        self._length += 1

    def put_back(self, sequence: Sequence) -> None:
        """Let a sequence that ran wait before those of its request."""
        self._requests.setdefault(sequence.request, deque()).appendleft(sequence)
        if sequence.suspect:
            self._suspects[sequence.key] = sequence
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        line = self._requests[sequence.request]
        line.remove(sequence)
        self._suspects.pop(sequence.key, None)
        self._length -= 1
        if not line:
            del self._requests[sequence.request]

    def find(self, key: int) -> Sequence | None:
        """Return the sequence of a key, if it waits."""
        return next((sequence for sequence in self if sequence.key == key), None)

    def next(self) -> Sequence | None:
        """Return whose turn it is, of those that may begin; None if nobody may."""
        heads = [line[0] for line in self._requests.values() if not line[0].waits_for_parent]
        if not heads:
            return None
        return min(heads, key=lambda head: (*self._shares.rank(head), head.key))

    def oldest_suspect(self) -> Sequence | None:
        """Return the oldest of those that have to run alone; None if there is none.

        They ran in a step that failed, so each of them was put back.
        """
        return self._suspects[min(self._suspects)] if self._suspects else None
