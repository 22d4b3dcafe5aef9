"""Stop strings in a stream of text, wherever its pieces are cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until a stop string begins in it.

    Text that could be the beginning of a stop string is held back until it is decided, so
    the result does not depend on how the text was cut into pieces.

    Args:
        stop: strings that end the text; empty ones are not allowed.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Take a piece and return what may be shown; after a match nothing is shown any more."""
        if self.matched:
            return ""
        text = self._held + text
        ends = [(text.find(stop) + len(stop), stop) for stop in self._stop if stop in text]
        if ends:
            # What a reader of single characters would see complete first, the longest of those.
            end, stop = min(ends, key=lambda found: (found[0], -len(found[1])))
            self.matched, self._held = True, ""
            return text[: end - len(stop)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what is held; the text is over and no stop string came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Count the last characters of `text` that are a true prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
