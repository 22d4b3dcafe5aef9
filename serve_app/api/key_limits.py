"""The limits of API keys: requests and tokens a minute, requests at a time.

A minute is the last one, whenever it is asked. A request counts as one from its arrival. Of tokens
it is taken for what it may come to while it runs, and for what it came to for a minute after its
end: so a long answer counts once, and one that failed for nothing. All of it is by name, since
several keys may have one.

Several ingresses tell each other what they have counted (`publish`, `learn`). Between two rounds
each gives out its part of what was left in the last one: of n ingresses 1/n of it, or one request
of more tokens, if that fits what is left. With one that is all, and the limits are exact. With n a
burst that comes to few of them may be refused some rounds early; and since nobody knows what the
others gave out since their last round, together they count up to half a limit too much, and two
requests for each ingress but one.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from serve_app.api.keys import Key
from serve_app.errors import KeyLimitExceeded

SPAN_S = 60.0
ROUND_S = 1.0  # between two rounds of several ingresses
_TIMED = {"rpm": "requests", "tpm": "tokens"}  # in OpenAI's headers
_WORDS = {
    "rpm": "requests a minute",
    "tpm": "tokens a minute",
    "streams": "requests at a time",
}
HEADERS = tuple(
    f"x-ratelimit-{part}-{what}"
    for what in _TIMED.values()
    for part in ("limit", "remaining", "reset")
)


class Counts(NamedTuple):
    """What counts against the limits of one name."""

    rpm: int = 0
    tpm: int = 0
    streams: int = 0


class _Window:
    """Amounts of the last minute."""

    def __init__(self) -> None:
        self._entries: deque[tuple[float, int]] = deque()  # when it leaves, and how much
        self._total = 0

    def add(self, now: float, amount: int) -> None:
        """Count an amount from now on."""
        self._entries.append((now + SPAN_S, amount))
        self._total += amount

    def total(self, now: float) -> int:
        """Return what counts now."""
        while self._entries and self._entries[0][0] <= now:
            self._total -= self._entries.popleft()[1]
        return self._total

    def wait_s(self, now: float, amount: int | None = None) -> float:
        """Return the seconds until this much of it counts no more; all of it without an amount."""
        for leaves, part in self._entries:
            if amount is not None and (amount := amount - part) <= 0:
                return leaves - now
        return self._entries[-1][0] - now if self._entries else 0.0


class _Use:
    """What one name uses here."""

    def __init__(self) -> None:
        self.windows = {"rpm": _Window(), "tpm": _Window()}
        self.reserved = 0  # tokens of what runs
        self.streams = 0

    def counts(self, now: float) -> Counts:
        requests, tokens = (window.total(now) for window in self.windows.values())
        return Counts(requests, tokens + self.reserved, self.streams)


class Allowance:
    """What one request takes of its key's limit of tokens.

    Args:
        limits: of all keys.
        key: its key.
    """

    def __init__(self, limits: KeyLimits, key: Key) -> None:
        self._limits = limits
        self._key = key
        self._tokens = 0

    def reserve(self, tokens: int) -> None:
        """Take what the request may come to, or the whole limit if that is less.

        Raises:
            KeyLimitExceeded: it is not there now.
        """
        self._tokens = self._limits.reserve(self._key, tokens)

    def settle(self, tokens: int) -> None:
        """Give it back, and count what the request came to."""
        self._limits.settle(self._key, self._tokens, tokens)
        self._tokens = 0


class KeyLimits:
    """What the keys have used of their limits, here and by what other ingresses said.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: defaultdict[str, _Use] = defaultdict(_Use)
        self._published: dict[str, Counts] = {}
        self._own: dict[str, Counts] = {}  # as published in the last round
        self._others: Sequence[Mapping[str, Counts]] = ()  # one for each of them

    @contextmanager
    def admitted(self, key: Key) -> Iterator[Allowance]:
        """Count a request; it runs until the context is left.

        Raises:
            KeyLimitExceeded: too many in this minute, or at this time.
        """
        use = self._uses[key.name]
        self._require(key, "streams")
        self._require(key, "rpm")
        if key.rpm is not None:
            use.windows["rpm"].add(self._clock(), 1)
        use.streams += 1
        try:
            yield Allowance(self, key)
        finally:
            use.streams -= 1

    def reserve(self, key: Key, tokens: int) -> int:
        """Take tokens of a request that begins, and return how many; see `Allowance`."""
        if key.tpm is None:
            return 0
        tokens = min(tokens, key.tpm)
        self._require(key, "tpm", tokens)
        self._uses[key.name].reserved += tokens
        return tokens

    def settle(self, key: Key, reserved: int, tokens: int) -> None:
        """Give reserved tokens back, and count those of a request that has ended."""
        use = self._uses[key.name]
        use.reserved -= reserved
        if key.tpm is not None and tokens:
            use.windows["tpm"].add(self._clock(), tokens)

    def headers(self, key: Key) -> dict[str, str]:
        """Return OpenAI's headers of the limits that a key has."""
        now, use, found = self._clock(), self._uses[key.name], {}
        for kind, what in _TIMED.items():
            if (limit := getattr(key, kind)) is not None:
                left = max(0, limit - self._total(key.name, kind))
                reset_s = math.ceil(use.windows[kind].wait_s(now))
                values = (limit, left, f"{reset_s}s")
                for part, value in zip(("limit", "remaining", "reset"), values, strict=True):
                    found[f"x-ratelimit-{part}-{what}"] = str(value)
        return found

    def publish(self) -> dict[str, Counts]:
        """Begin a round: return what counts here, by name, for the other ingresses."""
        now = self._clock()
        counted = {name: use.counts(now) for name, use in self._uses.items()}
        self._published = {name: counts for name, counts in counted.items() if any(counts)}
        return self._published

    def learn(self, others: Sequence[Mapping[str, Counts]]) -> None:
        """End a round with what each of the others published last."""
        self._own, self._others = self._published, others

    @property
    def _ingresses(self) -> int:
        return 1 + len(self._others)

    def _elsewhere(self, name: str, kind: str) -> int:
        return sum(getattr(counts[name], kind) for counts in self._others if name in counts)

    def _total(self, name: str, kind: str) -> int:
        here: int = getattr(self._uses[name].counts(self._clock()), kind)
        return here + self._elsewhere(name, kind)

    def _require(self, key: Key, kind: str, amount: int = 1) -> None:
        limit = getattr(key, kind)
        if limit is None:
            return
        now, use = self._clock(), self._uses[key.name]
        used, elsewhere = getattr(use.counts(now), kind), self._elsewhere(key.name, kind)
        before = getattr(self._own.get(key.name, Counts()), kind)
        left = limit - before - elsewhere
        if used + amount <= before + (math.ceil(left / self._ingresses) if left > 0 else left):
            return
        wait_s = ROUND_S
        excess = used + elsewhere + amount - limit
        if excess <= 0 and used <= before:  # more than its part, and the first in this round
            return
        if excess > 0 and kind in use.windows:
            wait_s = use.windows[kind].wait_s(now, excess)
        retry_after_s = max(1, math.ceil(wait_s))
        raise KeyLimitExceeded(
            f"This API key is at its limit of {limit} {_WORDS[kind]} ({kind}). "
            f"Please try again in {retry_after_s} s.",
            param=kind,
            retry_after_s=retry_after_s,
        )
