"""Who computes what in the next step; pure Python, no tensors.

First come, first served. A step holds every running sequence's next token first, so that a
long prompt never stalls a stream, and fills the rest of its token budget with prompts in
chunks. A sequence gets one contiguous region of the cache: enough for its prompt and the
first part of its completion; it grows by doubling, in place or by moving. When the cache is
full the youngest sequence is put back and computed again later (its sampled tokens are
kept), so the oldest one always gets on and nothing can deadlock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from serve_app.engine.regions import RegionAllocator
from serve_app.engine.sequence import Move, Row, Sequence, StepPlan

# Completion tokens reserved at first. Most clients set no limit and few answers are longer;
# reserving the whole window for each would leave room for a handful of requests.
RESERVE_TOKENS = 256


class Scheduler:
    """Owns the waiting queue, the running batch and the regions of the cache.

    Args:
        kv_tokens: size of the cache; no sequence's limit may be above it.
        max_batch_tokens: tokens of one step at the most.
        max_running_requests: sequences in the batch at the most.
        reserve_tokens: completion tokens reserved on admission.
    """

    def __init__(
        self,
        *,
        kv_tokens: int,
        max_batch_tokens: int,
        max_running_requests: int,
        reserve_tokens: int = RESERVE_TOKENS,
    ) -> None:
        self.preemptions = 0
        self._max_batch_tokens = max_batch_tokens
        # Every decode row must fit into a step, or a stream could starve.
        self._max_running = min(max_running_requests, max_batch_tokens)
        self._reserve = reserve_tokens
        self._regions = RegionAllocator(kv_tokens)
        self._waiting: deque[Sequence] = deque()  # oldest first, all younger than the running
        self._running: dict[int, Sequence] = {}  # by key, oldest first

    @property
    def running(self) -> int:
        """Sequences with a region."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences without one."""
        return len(self._waiting)

    @property
    def kv_tokens_used(self) -> int:
        """Tokens of the cache in regions."""
        return self._regions.used_tokens

    @property
    def kv_tokens_total(self) -> int:
        """Size of the cache."""
        return self._regions.size

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; keys must ascend.

        Raises:
            ValueError: its limit is above the size of the cache, so it could never end.
        """
        if sequence.limit > self._regions.size:
            raise ValueError(f"sequence {sequence.key} can never fit the cache")
        self._waiting.append(sequence)

    def remove(self, key: int) -> Sequence | None:
        """Take a sequence out, finished or not, and free its region; None if it is not here."""
        if running := self._running.pop(key, None):
            self._release(running)
            return running
        for waiting in self._waiting:
            if waiting.key == key:
                self._waiting.remove(waiting)
                return waiting
        return None

    def plan(self) -> StepPlan:
        """Choose the rows of the next step; empty only when there is no sequence at all."""
        moves: list[Move] = []
        for sequence in tuple(self._running.values()):
            if sequence.key in self._running:  # an older one may have pushed it out
                self._make_room(sequence, moves)
        rows: list[Row] = []
        decoding = [s for s in self._running.values() if s.missing == 1]
        prefilling = [s for s in self._running.values() if s.missing > 1]
        budget = _add_rows(rows, decoding, self._max_batch_tokens)
        budget = _add_rows(rows, prefilling, budget)
        while budget > 0 and (admitted := self._admit()) is not None:
            budget = _add_rows(rows, (admitted,), budget)
        return StepPlan(tuple(rows), tuple(moves))

    def commit(self, plan: StepPlan) -> None:
        """Count a step's tokens as computed; call it before tokens are appended."""
        for row in plan.rows:
            row.sequence.computed += row.count

    def _admit(self) -> Sequence | None:
        if not self._waiting or self.running >= self._max_running:
            return None
        sequence = self._waiting[0]
        wanted = min(sequence.limit, len(sequence.tokens) + self._reserve)
        region = self._regions.allocate(wanted)
        if region is None:
            return None
        self._waiting.popleft()
        sequence.region = region
        self._running[sequence.key] = sequence
        return sequence

    def _make_room(self, sequence: Sequence, moves: list[Move]) -> None:
        """Grow the region if the next token does not fit, at the cost of younger sequences."""
        region = sequence.region
        if region is None or len(sequence.tokens) <= region.length:
            return
        lengths = (2 * region.length, region.length + self._reserve, len(sequence.tokens))
        while not any(self._grow(sequence, length, moves) for length in lengths):
            youngest = next(reversed(self._running.values()))
            self._preempt(youngest)
            if youngest is sequence:
                return

    def _grow(self, sequence: Sequence, length: int, moves: list[Move]) -> bool:
        region = sequence.region
        length = min(sequence.limit, length)
        if region is None or length < len(sequence.tokens):
            return False
        if grown := self._regions.extend(region, length):
            sequence.region = grown
            return True
        if moved := self._regions.allocate(length):
            moves.append(Move(region.start, moved.start, sequence.computed))
            self._regions.free(region)
            sequence.region = moved
            return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Put the youngest running sequence back; it is older than everything that waits."""
        self.preemptions += 1
        del self._running[sequence.key]
        self._release(sequence)
        sequence.computed = 0
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.region is not None:
            self._regions.free(sequence.region)
            sequence.region = None


def _add_rows(rows: list[Row], sequences: Iterable[Sequence], budget: int) -> int:
    """Append what fits of each sequence and return the tokens left of the budget."""
    for sequence in sequences:
        count = min(sequence.missing, budget)
        if count == 0:
            break
        rows.append(Row(sequence, sequence.computed, count, int(count == sequence.missing)))
        budget -= count
    return budget
