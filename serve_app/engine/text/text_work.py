"""Work over a client's text: a bounded amount at a time, off the event loop.

Encoding a long text takes a core for as long as a step of the engine takes both, and a client may
send many. So long ones share a few threads, what waits for them is bounded in characters, and
more is answered 429. The `tokenizers` library leaves the interpreter lock only in its batched
calls (0.23): `encode` of 2 MB would stop every thread of the process for seconds.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from serve_app.errors import ContextLengthExceeded, EngineDead, Overloaded

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 2
# Below this many characters the work takes a millisecond and stays on the event loop.
INLINE_CHARS = 8192
# Characters that may wait or be worked on: about a million tokens, some seconds of one core.
MAX_PENDING_CHARS = 4_000_000
# A text is measured in pieces of so many characters before all of it is encoded.
PIECE_CHARS = 32_768
# Tokens that a cut between two words can add.
CUT_TOKENS = 8
RETRY_AFTER_S = 2


class TextWork:
    """A few threads for long texts; calls come from event loops."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="text")
        self._pending = 0
        self._is_closed = False
        self._lock = threading.Lock()

    async def run(self, chars: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do some work: here and now if it is short, else when its turn comes.

        Args:
            chars: what it works on.
            work: what to do.
            *args: for `work`.
            **kwargs: for `work`.

        Raises:
            Overloaded: too much waits already.
            EngineDead: it was closed before the turn came.
        """
        if chars <= INLINE_CHARS:
            return work(*args, **kwargs)
        closed = EngineDead("The engine was closed.", untouched=True)

        def counted() -> T:
            try:
                return work(*args, **kwargs)
            finally:
                self._settle(chars)

        with self._lock:
            if self._is_closed:
                raise closed
            # Alone, a text of any size gets its turn.
            if self._pending and self._pending + chars > MAX_PENDING_CHARS:
                raise Overloaded(
                    "The server has too much text to read now. Please try again in a moment.",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._pending += chars
            future = self._executor.submit(counted)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.cancelled():  # it had not begun
                self._settle(chars)
                if self._is_closed:
                    raise closed from None
            raise

    def close(self) -> None:
        """Begin nothing more; what runs is not waited for."""
        with self._lock:
            self._is_closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _settle(self, chars: int) -> None:
        with self._lock:
            self._pending -= chars


class TextLimit:
    """Refuses a text that cannot fit a window, before all of it is encoded.

    Args:
        backend: the `tokenizers` library's tokenizer.
        max_context_tokens: the window.
    """

    def __init__(self, backend: Any, max_context_tokens: int) -> None:
        self._backend = backend
        self._window = max_context_tokens
        longest = max(map(len, backend.get_vocab(with_added_tokens=True)))
        # A normaliser may join characters, as accents and their letters.
        self._max_chars = max_context_tokens * longest * (1 if backend.normalizer is None else 4)

    def require_length(self, chars: int, *, param: str) -> None:
        """Refuse a text that would not fit if every token were the longest of the vocabulary.

        Raises:
            ContextLengthExceeded: it has too many characters.
        """
        if chars > self._max_chars:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self._window} tokens. However, your "
                f"{param} has {chars} characters, more than so many tokens can hold. Please reduce "
                f"the length of the {param}.",
                param=param,
                max_context_tokens=self._window,
            )

    def require_tokens(self, text: str, *, param: str) -> None:
        """Refuse a text whose first pieces are too many tokens already.

        Raises:
            ContextLengthExceeded: it has more tokens than the window.
        """
        if len(text) <= 2 * PIECE_CHARS:
            return
        count, start = 0, 0
        while start < len(text):
            end = _cut(text, start)
            (encoding,) = self._backend.encode_batch_fast(
                [text[start:end]], add_special_tokens=False
            )
            count += max(0, len(encoding) - CUT_TOKENS)
            start = end
            if count > self._window:
                raise ContextLengthExceeded(
                    f"This model's maximum context length is {self._window} tokens. However, the "
                    f"first {end} of the {len(text)} characters of your {param} are more than "
                    f"that. Please reduce the length of the {param}.",
                    param=param,
                    max_context_tokens=self._window,
                )


def _cut(text: str, start: int) -> int:
    """Return where a piece ends: before the last space of it, or at its length."""
    end = start + PIECE_CHARS
    if end >= len(text):
        return len(text)
    space = text.rfind(" ", start + 1, end)
    return space if space > start else end
