"""Who computes what in the next step; pure Python, no tensors.

A step holds every running sequence's next token first and then prompts in chunks, short ones
while anybody streams, so that a long prompt stalls no stream. Half of a step's room for prompts
goes to the oldest one that is on its way, the other half to short ones that end in it. Higher
classes go first, within one clients take turns, and so do the requests of one (`waiting.py`):
whoever runs more than its share makes room.

A sequence gets one contiguous region of the cache: enough for its prompt and the first part of
its completion; it grows by doubling, in place or by moving. What another sequence computed of
the same beginning is copied. When the cache is full the youngest sequence of the lowest class is
put back and computed again later (its sampled tokens are kept), so the one of the highest that
has run longest always gets on and nothing can deadlock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from serve_app.engine.cache.places import Places
from serve_app.engine.cache.prefix_cache import PrefixCache
from serve_app.engine.sequence import Move, Row, Sequence, StepPlan
from serve_app.engine.speculative import Drafter
from serve_app.engine.waiting import Shares, WaitingLine

# Completion tokens reserved at first. Most clients set no limit and few answers are longer;
# reserving the whole window for each would leave room for a handful of requests.
RESERVE_TOKENS = 256
# Prompt tokens of one step whose logits are all kept: each takes a whole vocabulary of memory and
# of time; fewer while anybody streams.
SCORED_TOKENS = 64
SCORED_TOKENS_STREAMING = 16
# Sequences that make room for others before a step; each has to be computed again.
MAX_YIELDS = 4
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
        self.cache = PrefixCache(kv_tokens, enabled=prefix_cache)
        self._places = Places(self.cache)
        self._shares = Shares()
        self._waiting = WaitingLine(self._shares)
        self._running: dict[int, Sequence] = {}  # by key, the one that runs longest first

    @property
    def sequences(self) -> Iterable[Sequence]:
        """Those with a region, the one that runs longest first."""
        return self._running.values()

    @property
    def running(self) -> int:
        """Sequences with a region."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences without one."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; keys must ascend.

        Raises:
            ValueError: its limit is above the size of the cache, so it could never end.
        """
        if sequence.limit > self.cache.size:
            raise ValueError(f"sequence {sequence.key} can never fit the cache")
        self._waiting.add(sequence)
        self.waiting_tokens += sequence.limit

    def remove(self, key: int) -> Sequence | None:
        """Take a sequence out, finished or not, and free its region; None if it is not here."""
        if running := self._running.pop(key, None):
            self._release(running)
            return running
        if waiting := self._waiting.find(key):
            self._waiting.remove(waiting)
            self.waiting_tokens -= waiting.limit
        return waiting

    def discard(self, key: int) -> Sequence | None:
        """Take a running sequence out whose numbers are broken: nobody may find them."""
        if running := self._running.pop(key, None):
            self._release(running)
            self.cache.distrust(running.chain)
        return running

    def plan(self) -> StepPlan:
        """Choose the rows of the next step.

        Returns:
            A plan without rows only when there is no sequence, or all of them wait for masks.
        """
        moves: list[Move] = []
        # Oldest first: in a full cache it pushes out younger ones, never the other way round.
        for sequence in tuple(self._running.values()):
            if sequence.key in self._running:  # an older one may have pushed it out
                self._make_room(sequence, moves)
        rows: list[Row] = []
        if (suspect := self._suspect(moves)) is not None:
            _add_row(rows, suspect, self._step_tokens, SCORED_TOKENS)
            return StepPlan(tuple(rows), tuple(moves))
        self._share_places(moves)
        budget = self._step_tokens
        for sequence in self._running.values():
            # Decode rows, and prompts that were found computed but for their last token.
            if sequence.missing == 1 and not sequence.sits_out:
                budget -= _add_row(rows, sequence, budget, SCORED_TOKENS)
        guessed = len(rows) * (1 + self._speculative)
        if self._speculative and len(rows) <= SPECULATIVE_ROWS and guessed <= self._step_tokens:
            rows = [self._with_drafts(row) for row in rows]
            budget = self._step_tokens - sum(row.count for row in rows)
        self._add_prompts(rows, budget, moves)
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
            # K and V of wrong guesses stay where they are: the next tokens are written over them.
            sequence.computed += row.count - rejected
            if row.drafts and sequence.drafter:
                right = len(row.drafts) - rejected
                sequence.drafter.learn(len(row.drafts), right, sequence.computed)
            # Whoever has sampled is cleared; a chunk that went well says nothing of the next one.
            sequence.suspect &= not row.samples
            self._places.publish(sequence)
        # A token a step: memory that was short a moment ago is not asked for again at once.
        self._step_tokens = min(self._max_batch_tokens, self._step_tokens + 1)

    def restart(self, *, isolate: bool) -> None:
        """Compute all that runs again, after a step that failed somewhere on its way.

        Args:
            isolate: each of them in a step of its own first, to find whose fault it is.
        """
        # Each goes to the front of its line: the oldest has to be put back last to be first there.
        for sequence in reversed(tuple(self._running.values())):
            sequence.suspect |= isolate
            self._put_back(sequence)
        self.cache.clear()

    def shrink(self) -> bool:
        """Halve the steps, which then grow again slowly; False if they are too short for it."""
        if self._step_tokens // 2 < min(LEAST_STEP_TOKENS, self._max_batch_tokens):
            return False
        self._step_tokens //= 2
        return True

    def _add_prompts(self, rows: list[Row], budget: int, moves: list[Move]) -> None:
        """Fill a step up with prompts, as far as its tokens and those that may be scored go."""
        if rows:
            budget = min(budget, self._chunk)
        scored = SCORED_TOKENS_STREAMING if rows else SCORED_TOKENS
        decoding = len(rows)
        prompts = self._shares.in_turn([s for s in self._running.values() if s.missing > 1])
        while budget > 0:
            lead = prompts.pop(0) if prompts else self._admit(moves)
            if lead is None:
                break
            if lead.missing > budget:
                budget -= self._add_short_prompts(rows, prompts, budget // 2, moves)
            kept = len(rows)
            budget -= _add_row(rows, lead, budget, scored)
            scored -= sum(row.kept for row in rows[kept:] if row.sequence.wants_scores)
        self._shares.computed(rows[decoding:])

    def _add_short_prompts(
        self, rows: list[Row], prompts: list[Sequence], budget: int, moves: list[Move]
    ) -> int:
        """Let prompts that end in this step overtake a long one; returns the tokens they take."""
        left = budget
        for sequence in tuple(prompts):
            if sequence.missing <= left and not sequence.wants_scores:
                prompts.remove(sequence)
                left -= _add_row(rows, sequence, left, 0)
        while (waiting := self._next()) is not None:
            missing = self._places.missing(waiting)
            # Only the first in line is looked at: a search for short ones would be out of turn.
            if missing > left or waiting.wants_scores or (admitted := self._admit(moves)) is None:
                break
            left -= _add_row(rows, admitted, left, 0)
        return budget - left

    def _suspect(self, moves: list[Move]) -> Sequence | None:
        """Return the oldest sequence that has to run alone; those that wait go first."""
        for sequence in self._running.values():
            if sequence.suspect:
                return sequence
        waiting = self._waiting.oldest_suspect()
        return None if waiting is None else self._begin(waiting, moves)

    def _share_places(self, moves: list[Move]) -> None:
        """Begin sequences of a higher class, or below their share of it, at others' cost."""
        yields = 0
        while (waiting := self._next()) is not None:
            debtors = [s for s in self._running.values() if self._shares.owes(s, waiting)]
            if not debtors:
                return
            while self._begin(waiting, moves) is None:  # the youngest has the least to lose
                debtor = max(reversed(debtors), key=self._shares.rank, default=None)
                if debtor is None or yields == MAX_YIELDS:
                    return
                yields += 1
                self.preemptions += 1
                self._put_back(debtor)
                debtors = [s for s in self._running.values() if self._shares.owes(s, waiting)]

    def _admit(self, moves: list[Move]) -> Sequence | None:
        """Begin the sequence whose turn it is; None if it finds no place."""
        waiting = self._next()
        return None if waiting is None else self._begin(waiting, moves)

    def _next(self) -> Sequence | None:
        """Return whose turn it is; nobody's while one waits that has to run alone."""
        # Such a one begins in `_suspect` only. Were others to begin first, it might never.
        return None if self._waiting.oldest_suspect() else self._waiting.next()

    def _begin(self, sequence: Sequence, moves: list[Move]) -> Sequence | None:
        # Every decode row must fit into a step, or a stream could starve.
        if self.running >= min(self._max_running, self._step_tokens):
            return None
        wanted = min(sequence.limit, len(sequence.tokens) + self._reserve)
        if not self._places.take(sequence, wanted, moves):
            return None
        self._waiting.remove(sequence)
        self.waiting_tokens -= sequence.limit
        self.running_tokens += sequence.limit
        self._running[sequence.key] = sequence
        self._shares.add(sequence)
        sequence.parent = None
        self._places.publish(sequence)
        # Once: what is put back finds its own blocks again, which is no hit.
        if sequence.cached is None:
            sequence.began_s = time.monotonic()
            sequence.cached = sequence.computed
            self.queried_tokens += sequence.prompt_tokens
            self.hit_tokens += sequence.cached
        return sequence

    def _with_drafts(self, row: Row) -> Row:
        """Add guesses to a decode row where they fit and can be checked by sampling alone."""
        sequence = row.sequence
        plan = sequence.sampling
        # Penalties and masks at a guess depend on those before it; scores are kept of one place.
        if sequence.holding is None or sequence.adjusts or plan.logprobs is not None:
            return row
        if sequence.drafter is None:
            sequence.drafter = Drafter(self._speculative)
        length = len(sequence.tokens)
        # A guess needs a place for its K and V; a region does not grow, at others' cost, for one.
        end = min(sequence.limit - 1, sequence.holding.region.length)
        drafts = sequence.drafter.propose(sequence.tokens, min(end - length, self._speculative))
        count = row.count + len(drafts)
        return Row(sequence, row.start, count, count, drafts)

    def _make_room(self, sequence: Sequence, moves: list[Move]) -> None:
        """Grow the region if the next token does not fit, at the cost of younger sequences."""
        holding = sequence.holding
        if holding is None or len(sequence.tokens) <= holding.region.length:
            return
        length = holding.region.length
        # Doubling copies a long completion only a few times; where room is short, less has to do.
        lengths = (2 * length, length + self._reserve, len(sequence.tokens))
        while not any(self._places.grow(sequence, length, moves) for length in lengths):
            last = max(reversed(self._running.values()), key=lambda one: one.priority)
            self.preemptions += 1
            self._put_back(last)
            # Nobody else is left to push out, so it waits itself.
            if last is sequence:
                return

    def _put_back(self, sequence: Sequence) -> None:
        """Let a running sequence wait, before the others of its request."""
        del self._running[sequence.key]
        self._release(sequence)
        sequence.computed = 0
        self._waiting.put_back(sequence)
        self.waiting_tokens += sequence.limit

    def _release(self, sequence: Sequence) -> None:
        self.running_tokens -= sequence.limit
        self._shares.drop(sequence)
        self._places.release(sequence)


def _add_row(rows: list[Row], sequence: Sequence, budget: int, scored: int) -> int:
    """Append what fits of a sequence and return how many tokens that is.

    Args:
        rows: of the step.
        sequence: computed as far as it is.
        budget: tokens that the step still takes.
        scored: prompt tokens of those whose logits may all be kept.
    """
    count = min(sequence.missing, budget)
    if sequence.wants_scores:
        count = kept = min(count, scored)
    else:
        kept = int(count == sequence.missing)
    if count:
        rows.append(Row(sequence, sequence.computed, count, kept))
    return count
