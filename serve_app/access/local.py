"""A model that is a directory on the node: complete, or what is missing. No network.

Reads names and the headers of safetensors files, by hand: the check must not load a tensor
library before the node has proven what it holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve_app.access.report import sanitise
from serve_app.access.verdict import NodeVerdict, Outcome, TokenReport

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
HEADER_BYTES = 100_000_000  # the safetensors reader's own limit


class _Incomplete(Exception):
    """The directory cannot be served from; the message names the file."""


def check_directory(path: str) -> NodeVerdict:
    """Check config, tokenizer, index, and the header and size of every weights file.

    Returns:
        `granted`, or `weights_missing` with the first thing that is wrong.
    """
    directory = Path(path).expanduser()
    try:
        _check(directory)
    except _Incomplete as fault:
        return _verdict(Outcome.WEIGHTS_MISSING, path, str(fault))
    except OSError as error:
        return _verdict(Outcome.WEIGHTS_MISSING, path, f"{error.filename}: {error.strerror}")
    return _verdict(Outcome.GRANTED, path, "")


def shards_of(index: Any) -> list[str]:
    """Return the file names that a parsed weights index maps to, sorted; [] if it is none."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        return []
    names = set(weight_map.values())
    return sorted(names) if all(isinstance(name, str) and name for name in names) else []


def _check(directory: Path) -> None:
    if not directory.is_dir():
        raise _Incomplete(f"{directory} is not a directory on this node")
    if not isinstance(_json(directory / CONFIG), dict):
        raise _Incomplete(f"{directory / CONFIG} is missing or not readable as JSON")
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise _Incomplete(f"{directory} has no tokenizer ({' or '.join(TOKENIZERS)})")
    for name in _weights(directory):
        _check_header(directory / name)


def _weights(directory: Path) -> list[str]:
    if (directory / SINGLE).is_file():
        return [SINGLE]
    if not (directory / INDEX).is_file():
        raise _Incomplete(f"{directory} has no {SINGLE} and no {INDEX}")
    names = shards_of(_json(directory / INDEX))
    if not names:
        raise _Incomplete(f"{directory / INDEX} names no files")
    return names


def _check_header(file: Path) -> None:
    if not file.is_file():
        raise _Incomplete(f"{file} is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise _Incomplete(f"{file} is cut off or no safetensors file")
        header = _parsed(stream.read(length))
    if not isinstance(header, dict):
        raise _Incomplete(f"{file} has no readable safetensors header")
    ends = [
        entry["data_offsets"][1]
        for name, entry in header.items()
        if name != "__metadata__" and _has_offsets(entry)
    ]
    if size - 8 - length < max(ends, default=0):
        raise _Incomplete(f"{file} is cut off: its tensors end behind its last byte")


def _has_offsets(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and isinstance(offsets[1], int)


def _json(file: Path) -> Any:
    try:
        return _parsed(file.read_bytes())
    except FileNotFoundError:
        return None


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _verdict(outcome: Outcome, path: str, message: str) -> NodeVerdict:
    sentence = "Nothing to do."
    if outcome is not Outcome.GRANTED:
        sentence = f"Put the complete model into {path} on this node (model.path)."
    return NodeVerdict(
        node_id="",
        node_name="",
        outcome=outcome,
        remedy=sentence,
        hub_message=sanitise(message) or None,
        token=TokenReport(),
    )
