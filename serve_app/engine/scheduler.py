"""Who computes what in the next step; pure Python, no tensors.

First come, first served. A step holds every running sequence's next token first and then
prompts in chunks, short ones while anybody streams, so that a long prompt stalls no stream. A
sequence gets one contiguous region of the cache: enough for its prompt and the first part of
its completion; it grows by doubling, in place or by moving. What another sequence computed of
the same beginning is copied. When the cache is full the youngest sequence is put back and
computed again later (its sampled tokens are kept), so the oldest one always gets on and
nothing can deadlock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping

from serve_app.engine.drafting import Drafter
from serve_app.engine.prefix_cache import Holding, PrefixCache
from serve_app.engine.regions import BLOCK_TOKENS
from serve_app.engine.sequence import Move, Row, Sequence, StepPlan

# Completion tokens reserved at first. Most clients set no limit and few answers are longer;
# reserving the whole window for each would leave room for a handful of requests.
RESERVE_TOKENS = 256
# Prompt tokens of one step whose logits are all kept: each takes a whole vocabulary of memory.
SCORED_TOKENS = 64
# Decode rows beyond which guesses do not pay: the products are no longer waiting for weights.
SPECULATIVE_ROWS = 4
# A device that cannot compute this many tokens in one step cannot serve.
LEAST_STEP_TOKENS = 16


class Scheduler:
    """Owns the waiting queue, the running batch and the places of the cache.

    Args:
        kv_tokens: size of the cache; no sequence's limit may be above it.
        max_batch_tokens: tokens of one step at the most.
        max_running_requests: sequences in the batch at the most.
        reserve_tokens: completion tokens reserved on admission.
        prefill_chunk_tokens: prompt tokens of one step at the most while anybody streams.
        prefix_cache: whether what was computed stays for others.
        speculative_tokens: guesses a decode row may check; 0 is none.
    """

    def __init__(  # noqa: PLR0913 - sizes, by keyword
        self,
        *,
        kv_tokens: int,
        max_batch_tokens: int,
        max_running_requests: int,
        reserve_tokens: int = RESERVE_TOKENS,
        prefill_chunk_tokens: int | None = None,
        prefix_cache: bool = True,
        speculative_tokens: int = 0,
    ) -> None:
        self.preemptions = 0
        self.queried_tokens = 0  # of prompts, on their first admission
        self.hit_tokens = 0  # of those
        self.waiting_tokens = 0  # limits of what waits
        self.running_tokens = 0  # limits of what runs
        self._max_batch_tokens = max_batch_tokens
        self._step_tokens = max_batch_tokens  # less for a while after memory ran out
        self._chunk = prefill_chunk_tokens or max_batch_tokens
        self._max_running = max_running_requests
        self._reserve = reserve_tokens
        self._speculative = speculative_tokens
        self._cache = PrefixCache(kv_tokens, enabled=prefix_cache)
        self._waiting: deque[Sequence] = deque()  # oldest first, all younger than the running
        self._running: dict[int, Sequence] = {}  # by key, oldest first

    @property
    def sequences(self) -> Iterable[Sequence]:
        """Those with a region, oldest first."""
        return self._running.values()

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
        """Tokens of the cache in regions of running sequences."""
        return self._cache.used_tokens

    @property
    def kv_tokens_cached(self) -> int:
        """Tokens of the cache that others may find, in room that nobody needs."""
        return self._cache.cached_tokens

    @property
    def kv_tokens_total(self) -> int:
        """Size of the cache."""
        return self._cache.size

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; keys must ascend.

        Raises:
            ValueError: its limit is above the size of the cache, so it could never end.
        """
        if sequence.limit > self._cache.size:
            raise ValueError(f"sequence {sequence.key} can never fit the cache")
        self._waiting.append(sequence)
        self.waiting_tokens += sequence.limit

    def remove(self, key: int) -> Sequence | None:
        """Take a sequence out, finished or not, and free its region; None if it is not here."""
        if running := self._running.pop(key, None):
            self._release(running)
            return running
        for waiting in self._waiting:
            if waiting.key == key:
                self._waiting.remove(waiting)
                self.waiting_tokens -= waiting.limit
                return waiting
        return None

    def discard(self, key: int) -> Sequence | None:
        """Take a running sequence out whose numbers are broken: nobody may find them."""
        if running := self._running.pop(key, None):
            self._release(running)
            self._cache.distrust(running.chain)
        return running

    def plan(self) -> StepPlan:
        """Choose the rows of the next step.

        Returns:
            A plan without rows only when there is no sequence, or all of them wait for masks.
        """
        moves: list[Move] = []
        for sequence in tuple(self._running.values()):
            if sequence.key in self._running:  # an older one may have pushed it out
                self._make_room(sequence, moves)
        rows: list[Row] = []
        if (suspect := self._suspect(moves)) is not None:
            _add_rows(rows, (suspect,), self._step_tokens)
            return StepPlan(tuple(rows), tuple(moves))
        decoding = [s for s in self._running.values() if s.missing == 1 and not s.sits_out]
        prefilling = [s for s in self._running.values() if s.missing > 1]
        budget = _add_rows(rows, decoding, self._step_tokens)
        guessed = len(rows) * (1 + self._speculative)
        if self._speculative and len(rows) <= SPECULATIVE_ROWS and guessed <= self._step_tokens:
            rows = [self._with_drafts(row) for row in rows]
            budget = self._step_tokens - sum(row.count for row in rows)
        if rows:
            budget = min(budget, self._chunk)
        budget = _add_rows(rows, prefilling, budget)
        while budget > 0 and not self._isolates and (admitted := self._admit(moves)):
            budget = _add_rows(rows, (admitted,), budget)
        return StepPlan(tuple(rows), tuple(moves))

    def commit(self, plan: StepPlan, wrong: Mapping[int, int] | None = None) -> None:
        """Count a step's tokens as computed; call it before tokens are appended.

        Args:
            plan: of the step.
            wrong: guesses that were wrong, by the sequence's key.
        """
        for row in plan.rows:
            sequence = row.sequence
            rejected = wrong.get(sequence.key, 0) if wrong else 0
            sequence.computed += row.count - rejected
            if row.drafts and sequence.drafter:
                right = len(row.drafts) - rejected
                sequence.drafter.learn(len(row.drafts), right, sequence.computed)
            sequence.suspect &= not row.samples
            self._publish(sequence)
        self._step_tokens = min(self._max_batch_tokens, self._step_tokens + 1)

    def restart(self, *, isolate: bool) -> None:
        """Compute all that runs again, after a step that failed somewhere on its way.

        Args:
            isolate: each of them in a step of its own first, to find whose fault it is.
        """
        for sequence in reversed(tuple(self._running.values())):
            sequence.suspect |= isolate
            self._put_back(sequence)
        self._cache.clear()

    def shrink(self) -> bool:
        """Halve the steps, which then grow again slowly; False if they are too short for it."""
        if self._step_tokens // 2 < min(LEAST_STEP_TOKENS, self._max_batch_tokens):
            return False
        self._step_tokens //= 2
        return True

    @property
    def _isolates(self) -> bool:
        """Whether the next to be admitted has to run alone."""
        return bool(self._waiting) and self._waiting[0].suspect

    def _suspect(self, moves: list[Move]) -> Sequence | None:
        """Return the oldest sequence that has to run alone; those that wait go first."""
        for sequence in self._running.values():
            if sequence.suspect:
                return sequence
        return self._admit(moves) if self._isolates else None

    def _admit(self, moves: list[Move]) -> Sequence | None:
        # Every decode row must fit into a step, or a stream could starve.
        if not self._waiting or self.running >= min(self._max_running, self._step_tokens):
            return None
        sequence = self._waiting[0]
        parent = sequence.parent
        if parent is not None and parent.holding and parent.computed < parent.prompt_tokens:
            return None  # its prompt is on its way
        wanted = min(sequence.limit, len(sequence.tokens) + self._reserve)
        holding = self._place(sequence, wanted, moves)
        if holding is None:
            return None
        self._waiting.popleft()
        self.waiting_tokens -= sequence.limit
        self.running_tokens += sequence.limit
        self._running[sequence.key] = sequence
        sequence.holding, sequence.parent = holding, None
        self._publish(sequence)
        if sequence.cached is None:
            sequence.began_s = time.monotonic()
            sequence.cached = sequence.computed
            self.queried_tokens += sequence.prompt_tokens
            self.hit_tokens += sequence.cached
        return sequence

    def _place(self, sequence: Sequence, wanted: int, moves: list[Move]) -> Holding | None:
        """Find a place for `wanted` tokens, with what is known of the beginning in it."""
        source, known = self._known(sequence)
        if source is not None:
            whole = known == source.tokens
            if whole and self._cache.take_over(source, wanted):
                sequence.computed = known
                return source
            if holding := self._cache.place(wanted, spare=source):
                moves.append(Move(source.region.start, holding.region.start, known))
                sequence.computed = known
                return holding
        return self._cache.place(wanted)

    def _known(self, sequence: Sequence) -> tuple[Holding | None, int]:
        """Return who holds the longest beginning, and how many tokens of it are computed."""
        most = len(sequence.tokens) - 1  # one must be computed to have logits
        if not sequence.reuse:
            return None, 0
        chain = sequence.digests(most)
        known, source = self._cache.find(chain)
        parent = sequence.parent
        if parent is not None and parent.holding is not None:
            shared = min(parent.computed, sequence.prompt_tokens, most)
            if shared > known:
                return parent.holding, shared
        return source, known

    def _with_drafts(self, row: Row) -> Row:
        """Add guesses to a decode row where they fit and can be checked by sampling alone."""
        sequence = row.sequence
        plan = sequence.sampling
        if sequence.holding is None or sequence.adjusts or plan.logprobs is not None:
            return row
        if sequence.drafter is None:
            sequence.drafter = Drafter(self._speculative)
        length = len(sequence.tokens)
        end = min(sequence.limit - 1, sequence.holding.region.length)
        drafts = sequence.drafter.propose(sequence.tokens, min(end - length, self._speculative))
        count = row.count + len(drafts)
        return Row(sequence, row.start, count, count, drafts)

    def _publish(self, sequence: Sequence) -> None:
        """Let others find the blocks that are computed."""
        holding = sequence.holding
        known = min(sequence.computed, len(sequence.tokens))  # guessed tokens do not count
        if holding is not None and known - holding.tokens >= BLOCK_TOKENS:
            done = len(holding.chain)
            self._cache.add(holding, sequence.digests(known)[done:])

    def _make_room(self, sequence: Sequence, moves: list[Move]) -> None:
        """Grow the region if the next token does not fit, at the cost of younger sequences."""
        holding = sequence.holding
        if holding is None or len(sequence.tokens) <= holding.region.length:
            return
        length = holding.region.length
        lengths = (2 * length, length + self._reserve, len(sequence.tokens))
        while not any(self._grow(sequence, length, moves) for length in lengths):
            youngest = next(reversed(self._running.values()))
            self.preemptions += 1
            self._put_back(youngest)
            if youngest is sequence:
                return

    def _grow(self, sequence: Sequence, length: int, moves: list[Move]) -> bool:
        holding = sequence.holding
        length = min(sequence.limit, length)
        if holding is None or length < len(sequence.tokens):
            return False
        before = holding.region.start
        if not self._cache.grow(holding, length):
            return False
        if holding.region.start != before:
            moves.append(Move(before, holding.region.start, sequence.computed))
        return True

    def _put_back(self, sequence: Sequence) -> None:
        """Let the youngest running sequence wait; it is older than everything that waits."""
        del self._running[sequence.key]
        self._release(sequence)
        sequence.computed = 0
        self._waiting.appendleft(sequence)
        self.waiting_tokens += sequence.limit

    def _release(self, sequence: Sequence) -> None:
        self.running_tokens -= sequence.limit
        if sequence.holding is not None:
            self._cache.release(sequence.holding)
            sequence.holding = None


def _add_rows(rows: list[Row], sequences: Iterable[Sequence], budget: int) -> int:
    """Append what fits of each sequence and return the tokens left of the budget."""
    for sequence in sequences:
        count = min(sequence.missing, budget)
        if count == 0:
            break
        if sequence.wants_scores:
            count = kept = min(count, SCORED_TOKENS)
        else:
            kept = int(count == sequence.missing)
        rows.append(Row(sequence, sequence.computed, count, kept))
        budget -= count
    return budget
