"""One completion as its reader sees it: ids in, deltas out, one end."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.engine.detokenizer import Decode, Detokenizer
from serve_app.engine.sequence import Update
from serve_app.engine.stop import StopMatcher
from serve_app.protocol import FinishReason, TokenDelta, Usage


class Completion:
    """Turns updates into deltas.

    Args:
        decode: ids to text without special tokens.
        stop: strings that end the text.
        prompt_tokens: for the usage.
        context: ids whose text the completion continues; empty for an answer of its own.
    """

    def __init__(
        self, decode: Decode, *, stop: Sequence[str], prompt_tokens: int, context: Sequence[int]
    ) -> None:
        self.finished = False
        self._detokenizer = Detokenizer(decode, context)
        self._stop = StopMatcher(stop)
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._ids: list[int] = []  # sampled, not in a delta yet

    def take(self, updates: Sequence[Update]) -> TokenDelta | None:
        """Take what is ready together and return it as one delta, if there is text or the end.

        Ids without text yet (half a character, the beginning of a stop string) come with the
        delta that shows their text.
        """
        text = ""
        reason: FinishReason | None = None
        for update in updates:
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
        usage = Usage(self._prompt_tokens, self._completion_tokens)
        return TokenDelta(text, ids, usage, reason)
