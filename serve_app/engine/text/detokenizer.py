"""Token ids back to text, a few at a time, never half a character.

A token may hold part of a UTF-8 character, and some tokenizers put a space before a word
only when it follows another one. So a short tail of the ids is decoded together with the new
ones and the difference is the new text; it is held while it ends in a replacement character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

Decode: TypeAlias = Callable[[list[int]], str]

REPLACEMENT = "\ufffd"
# Ids decoded again for their influence on the text after them.
CONTEXT_TOKENS = 6
# A character has at most four bytes; more ids than this without a whole one are invalid bytes.
MAX_HELD_TOKENS = 16


class Detokenizer:
    """The text of one growing list of ids.

    Args:
        decode: ids to text, special tokens left out.
        context: ids before the first one, whose text was seen already; the prompt's end.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context[-CONTEXT_TOKENS:])
        self._known = decode(self._ids) if self._ids else ""
        self._held = 0

    def push(self, token: int) -> str:
        """Take one id and return the text it completes, whole characters only."""
        self._ids.append(token)
        self._held += 1
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and self._held < MAX_HELD_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """Return what was held, without an unfinished character at its end."""
        return self._emit(self._decode(self._ids).rstrip(REPLACEMENT)) if self._held else ""

    def _emit(self, text: str) -> str:
        new = text[len(self._known) :]
        self._held = 0
        self._ids = self._ids[-CONTEXT_TOKENS:]
        self._known = self._decode(self._ids)
        return new
