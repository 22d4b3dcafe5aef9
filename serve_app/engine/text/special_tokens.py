"""What a tokenizer's tokens mean for prompts and texts: which are added, hidden, ends, bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # of tokenizers that fall back to bytes


def _byte_level() -> dict[str, int]:
    """Return the letters that byte-level tokenizers write for bytes, as GPT-2 chose them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_LEVEL = _byte_level()


class SpecialTokens:
    """The added tokens of one tokenizer.

    Args:
        backend: the `tokenizers` library's tokenizer.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._ids = {token.content: id_ for id_, token in added.items()}
        self._byte_level = "ByteLevel" in str(backend.decoder)
        self._special = frozenset(id_ for id_, token in added.items() if token.special)

    def encode(self, text: str, *, add: bool, limit: int | None = None) -> list[int]:
        """Return a text's ids.

        Args:
            text: may hold special tokens by their names.
            add: put those around it that the tokenizer puts around a text; what the text begins
                with already is not put there again.
            limit: keep this many ids at the most: what is added in front, and the last ones.
        """
        # The batched call leaves the interpreter lock, and it alone (see text_work.py).
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add)
        ids: list[int] = encoding.ids
        lead = len(_lead(encoding))
        if lead and ids[lead : 2 * lead] == ids[:lead]:
            ids = ids[lead:]
        if limit is None or len(ids) <= limit:
            return ids
        lead = min(lead, limit)
        return ids[:lead] + ids[len(ids) - (limit - lead) :]

    def id_of(self, text: str) -> int | None:
        """Return the id of the added token that is written so, if there is one."""
        return self._ids.get(text)

    def piece(self, id_: int) -> tuple[str, bytes]:
        """Return one id's text, half characters as U+FFFD, and its bytes."""
        text: str = self._backend.decode([id_], skip_special_tokens=False)
        name = self._backend.id_to_token(id_)
        if name is None:  # a row of the embedding that no token uses
            return "", b""
        if self._byte_level and all(letter in BYTE_LEVEL for letter in name):
            return text, bytes(BYTE_LEVEL[letter] for letter in name)
        if match := BYTE_TOKEN.fullmatch(name):
            return text, bytes([int(match[1], 16)])
        return text, text.encode()

    def stop_ids(self, stop: Sequence[str]) -> dict[int, str]:
        """Return the stop strings that are exactly one added token, by its id."""
        return {self._ids[text]: text for text in stop if text in self._ids}

    def decoder(self, *, skip: bool, keep: Collection[str]) -> Callable[[list[int]], str]:
        """Return a decoder: ids to text.

        Args:
            skip: special tokens have no text.
            keep: those that have one nevertheless, by their names.
        """
        kept = {self._ids[name] for name in keep if name in self._ids}
        decode = self._backend.decode
        if not skip or not kept & self._special:
            return lambda ids: str(decode(ids, skip_special_tokens=skip))
        hidden = self._special - kept
        return lambda ids: str(
            decode([id_ for id_ in ids if id_ not in hidden], skip_special_tokens=False)
        )


def _lead(encoding: Any) -> list[int]:
    """Return the special tokens that were added in front of a text."""
    mask = encoding.special_tokens_mask
    count = next((place for place, added in enumerate(mask) if not added), 0)
    return list(encoding.ids[:count])


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return a tokenizer's class and settings as JSON data, without the places of its files."""
    settings = {
        name: _plain(value)
        for name, value in tokenizer.init_kwargs.items()
        if not name.endswith(("_file", "_path")) and name not in ("is_local", "local_files_only")
    }
    return {
        **settings,
        **tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
        "tokenizer_class": type(tokenizer).__name__,
    }


def _plain(value: object) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | None) else str(value)
