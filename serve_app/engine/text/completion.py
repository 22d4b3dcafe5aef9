"""One completion as its reader sees it: ids in, deltas out, one end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from serve_app.engine.sequence import Score, Update
from serve_app.engine.text.detokenizer import Decode, Detokenizer
from serve_app.engine.text.reasoning import Thinking, ThoughtSplitter
from serve_app.engine.text.stop import StopMatcher
from serve_app.protocol import FinishReason, Logprob, TokenDelta, TokenLogprobs, Usage

Piece: TypeAlias = Callable[[int], tuple[str, bytes]]


class Completion:
    """Turns updates into deltas.

    Args:
        decode: ids to the text that was asked for.
        stop: strings that end the text.
        prompt_tokens: for the usage.
        context: ids whose text the completion continues; empty for an answer of its own.
        piece: one id's text and bytes, for logprobs.
        scores_prompt: the first delta has the prompt's logprobs.
        include_stop: the text ends with what stopped it.
        stop_strings: stop strings that are special tokens, by id.
        thinking: what the text begins with, where thoughts are separated from answers.
        shown_prompt: the first delta has these ids of the prompt.
    """

    def __init__(  # noqa: PLR0913 - one completion's rules, by keyword
        self,
        decode: Decode,
        *,
        stop: Sequence[str],
        prompt_tokens: int,
        context: Sequence[int],
        piece: Piece,
        scores_prompt: bool = False,
        include_stop: bool = False,
        stop_strings: Mapping[int, str] = MappingProxyType({}),
        thinking: Thinking | None = None,
        shown_prompt: Sequence[int] = (),
    ) -> None:
        self.finished = False
        self._detokenizer = Detokenizer(decode, context)
        self._stop = StopMatcher(stop, include=include_stop)
        self._include_stop = include_stop
        self._stop_strings = stop_strings
        # With no thoughts to look for all text is the answer.
        self._thoughts = ThoughtSplitter(thinking) if thinking is not None else None
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._piece = piece
        self._ids: list[int] = []  # sampled, not in a delta yet
        self._logprobs: list[TokenLogprobs] = []  # theirs
        # Nothing comes before the first token, so it has none.
        self._prompt = [TokenLogprobs(None)] if scores_prompt else []
        self._shown_prompt = tuple(shown_prompt)

    def take(self, updates: Sequence[Update]) -> TokenDelta | None:
        """Take what is ready together and return it as one delta, if there is text or the end.

        Ids without text yet (half a character, the beginning of a stop string) come with the
        delta that shows their text.
        """
        text = reasoning = ""
        reason: FinishReason | None = None
        for update in updates:
            self._score(update)
            if update.token is None:
                continue
            self._ids.append(update.token)
            self._completion_tokens += 1
            reason = update.finish_reason
            # Thoughts are split off first: a stop string in them ends nothing.
            thoughts, words = self._parted(self._text_of(update.token, reason), reason)
            reasoning += thoughts
            text += self._stop.push(words)
            if self._stop.matched:
                reason = FinishReason.STOP
            if reason is not None:
                # What looked like the beginning of a stop string, and was none.
                text += self._stop.flush()
                if update.finish_reason is FinishReason.STOP and self._include_stop:
                    text += self._unseen(update.token)
                break
        if not text and not reasoning and reason is None:
            return None
        self.finished = reason is not None
        return self._delta(text, reasoning, reason)

    def _delta(self, text: str, reasoning: str, reason: FinishReason | None) -> TokenDelta:
        ids, self._ids = tuple(self._ids), []
        logprobs, self._logprobs = tuple(self._logprobs), []
        prompt, self._prompt = tuple(self._prompt), []
        shown, self._shown_prompt = self._shown_prompt, ()
        return TokenDelta(
            text,
            ids,
            Usage(self._prompt_tokens, self._completion_tokens),
            reason,
            logprobs=logprobs,
            prompt_logprobs=prompt,
            reasoning=reasoning,
            prompt_token_ids=shown,
        )

    def _text_of(self, token: int, reason: FinishReason | None) -> str:
        """Return the text that a token completes; at the end, all that is left."""
        text = ""
        # The id that ended the completion has no text, even if its tokenizer has one for it.
        if reason is not FinishReason.STOP or self._include_stop:
            text = self._detokenizer.push(token)
        return text if reason is None else text + self._detokenizer.flush()

    def _parted(self, text: str, reason: FinishReason | None) -> tuple[str, str]:
        """Return a text's thoughts and its words for the reader."""
        if self._thoughts is None:
            return "", text
        thoughts, words = self._thoughts.push(text)
        if reason is not None:
            more, rest = self._thoughts.flush()
            return thoughts + more, words + rest
        return thoughts, words

    def _unseen(self, token: int) -> str:
        """Return the stop string that a token is, if the token itself has no text."""
        return "" if self._stop.matched else self._stop_strings.get(token, "")

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
