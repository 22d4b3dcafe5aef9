"""The model as far as it can be checked before it is downloaded: its small files, its headers.

Drawn into a folder and checked there by the very code that checks a directory (`model.path`). The
files that are only weighed are there with their size and without their content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve_app.access.hub.client import Failed
from serve_app.access.license import CARD, CARD_BYTES, LICENSES
from serve_app.access.sources.source import Item, Source, whole
from serve_app.access.verdict import Outcome
from serve_app.checkpoint import files
from serve_app.checkpoint.directory import TOKENIZERS
from serve_app.checkpoint.headers import HEADER_BYTES
from serve_app.checkpoint.names import store_fault
from serve_app.errors import ModelLoadError
from serve_app.redaction import sanitise

AT_ONCE = 8
FIRST_BYTES = 128 << 10  # of a file of weights: most headers are shorter
_READ = frozenset({files.CONFIG, "tokenizer_config.json", *LICENSES})


def model_items(source: Source, items: Mapping[str, Item]) -> tuple[list[Item], list[str]]:
    """Choose the files that are the model, by the one rule.

    Returns:
        They, and the names of those that hold its weights.

    Raises:
        Failed: it is no model, or not whole.
    """
    try:
        raw = whole(source, items[files.CONFIG]) if files.CONFIG in items else b""
        config = files.parse_json(raw)
        entry = files.weights_entry(items.keys(), config if isinstance(config, dict) else None)
        index = None
        if entry in items and files.is_index(str(entry)):
            index = files.parse_index(whole(source, items[str(entry)]), name=str(entry))
        sizes = {name: item.size for name, item in items.items()}
        chosen = files.model_files(sizes, entry, index)
    except ModelLoadError as error:
        raise Failed(Outcome.WEIGHTS_MISSING, sanitise(error.message)) from None
    weights = list(index.shards) if index else [str(entry)] if entry else []
    return [items[name] for name in chosen], weights


def draw(place: Path, source: Source, items: Mapping[str, Item], weights: Iterable[str]) -> None:
    """Draw a model into an empty folder.

    Args:
        place: the folder.
        source: where it lies.
        items: its listing.
        weights: names of the files that hold its weights.

    Raises:
        Failed: what is needed of it does not come.
    """
    headed = set(weights)
    counted = {*headed, *TOKENIZERS, CARD}
    wanted = [
        item
        for name, item in items.items()
        if (files.is_read(name) or files.is_index(name) or name in counted)
        and not store_fault(name)
    ]

    def put(item: Item) -> None:
        if item.name in headed:
            content = _head(source, item)
        elif _is_read_here(item):
            content = whole(source, item, CARD_BYTES if item.name == CARD else None)
        else:
            content = b""
        target = place / item.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as stream:
            stream.write(content)
            stream.truncate(item.size)

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="sketch") as pool:
        for _ in pool.map(put, wanted):
            pass


def _is_read_here(item: Item) -> bool:
    """Return whether a file's content is looked at, and it is no larger than such a file may be."""
    if item.name == CARD:
        return item.size <= CARD_BYTES
    looked_at = item.name in _READ or files.is_index(item.name)
    return looked_at and item.size <= (files.size_limit(item.name) or 0)


def _head(source: Source, item: Item) -> bytes:
    """Return the header of a file of weights, and perhaps some of what follows."""
    content = source.read(item, 0, min(item.size, FIRST_BYTES)) if item.size else b""
    end = 8 + int.from_bytes(content[:8], "little")
    if len(content) < end <= min(item.size, 8 + HEADER_BYTES):
        content += source.read(item, len(content), end)
    return content
