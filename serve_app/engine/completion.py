"""One completion as its reader sees it: ids in, deltas out, one end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from serve_app.engine.detokenizer import Decode, Detokenizer
from serve_app.engine.sequence import Score, Update
from serve_app.engine.stop import StopMatcher
from serve_app.protocol import FinishReason, Logprob, TokenDelta, TokenLogprobs, Usage

Piece: TypeAlias = Callable[[int], tuple[str, bytes]]


class Completion:
    """Turns updates into deltas.

    Args:
        decode: ids to text without special tokens.
        stop: strings that end the text.
        prompt_tokens: for the usage.
        context: ids whose text the completion continues; empty for an answer of its own.
        piece: one id's text and bytes, for logprobs.
        scores_prompt: the first delta has the prompt's logprobs.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        stop: Sequence[str],
        prompt_tokens: int,
        context: Sequence[int],
        piece: Piece,
        scores_prompt: bool = False,
    ) -> None:
        self.finished = False
        self._detokenizer = Detokenizer(decode, context)
        self._stop = StopMatcher(stop)
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._piece = piece
        self._ids: list[int] = []  # sampled, not in a delta yet
        self._logprobs: list[TokenLogprobs] = []  # theirs
        # Nothing comes before the first token, so it has none.
        self._prompt = [TokenLogprobs(None)] if scores_prompt else []

    def take(self, updates: Sequence[Update]) -> TokenDelta | None:
        """Take what is ready together and return it as one delta, if there is text or the end.

        Ids without text yet (half a character, the beginning of a stop string) come with the
        delta that shows their text.
        """
        text = ""
        reason: FinishReason | None = None
        for update in updates:
            self._score(update)
            if update.token is None:
                continue
            self._ids.append(update.token)
            self._completion_tokens += 1
            reason = update.finish_reason
            # The id that ended the completion has no text, even if its tokenizer has one for it.
            if reason is not FinishReason.STOP:
                text += self._stop.push(self._detokenizer.push(update.token))
            if reason is not None:
                text += self._stop.push(self._detokenizer.flush())
            if self._stop.matched:
                reason = FinishReason.STOP
            if reason is not None:
                text += self._stop.flush()
                break
        if not text and reason is None:
            return None
        self.finished = reason is not None
        ids, self._ids = tuple(self._ids), []
        logprobs, self._logprobs = tuple(self._logprobs), []
        prompt, self._prompt = tuple(self._prompt), []
        usage = Usage(self._prompt_tokens, self._completion_tokens)
        return TokenDelta(text, ids, usage, reason, logprobs=logprobs, prompt_logprobs=prompt)

    def _score(self, update: Update) -> None:
        if update.score is not None:
            self._logprobs.append(self._named(update.score))
        self._prompt += [self._named(score) for score in update.prompt]

    def _named(self, score: Score) -> TokenLogprobs:
        return TokenLogprobs(
            self._logprob(score.token, score.logprob),
            tuple(self._logprob(token, logprob) for token, logprob in score.top),
        )

    def _logprob(self, token: int, logprob: float) -> Logprob:
        return Logprob(token, *self._piece(token), logprob)
