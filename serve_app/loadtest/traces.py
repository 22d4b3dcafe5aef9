"""Recorded loads: when requests came and how long they were, without their text.

Formats, recognised by their content:
    Azure LLM inference trace, CSV: TIMESTAMP,ContextTokens,GeneratedTokens
    Mooncake trace, JSON lines: timestamp (ms), input_length, output_length, hash_ids
    ShareGPT, JSON: conversations of texts; it has lengths and no times
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError
from serve_app.loadtest.stage import Shot

# English text in current vocabularies; ShareGPT stores texts, and a tokenizer would be the
# target model's own, which the client does not have.
CHARACTERS_PER_TOKEN = 4.0


def read_trace(path: Path, *, speed: float = 1.0) -> tuple[Shot, ...]:
    """Read the requests of a trace, the first at 0 seconds, in order.

    Args:
        path: an Azure or Mooncake trace.
        speed: 2 replays twice as fast.

    Raises:
        ConfigError: unreadable, empty, or a file without times.
    """
    text = _text(path)
    try:
        if text.lstrip().startswith("["):
            raise ConfigError(f"{path.name} holds no times; give it as --lengths with a --rate")
        shots = sorted(_shots(text), key=lambda shot: shot.at_s)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path.name} is not an Azure or Mooncake trace: {error!r}") from None
    if not shots:
        raise ConfigError(f"{path.name} holds no request")
    first = shots[0].at_s
    return tuple(
        Shot((shot.at_s - first) / speed, shot.prompt_tokens, shot.output_tokens, shot.blocks)
        for shot in shots
    )


def read_lengths(path: Path) -> tuple[tuple[int, int], ...]:
    """Read pairs of (prompt tokens, completion tokens) from any of the three formats.

    Raises:
        ConfigError: unreadable or empty.
    """
    text = _text(path)
    if not text.lstrip().startswith("["):
        return tuple((shot.prompt_tokens, shot.output_tokens) for shot in read_trace(path))
    try:
        pairs = tuple(_conversations(json.loads(text)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path.name} is not a ShareGPT file: {error!r}") from None
    if not pairs:
        raise ConfigError(f"{path.name} holds no question with an answer")
    return pairs


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}") from None


def _shots(text: str) -> Iterator[Shot]:
    if not text.lstrip().startswith("{"):
        yield from _azure(text)
        return
    for line in filter(str.strip, text.splitlines()):
        entry = json.loads(line)
        yield Shot(
            entry["timestamp"] / 1000,
            max(1, int(entry["input_length"])),
            max(1, int(entry["output_length"])),
            tuple(entry.get("hash_ids", ())),
        )


def _azure(text: str) -> Iterator[Shot]:
    for row in csv.DictReader(text.splitlines()):
        # seven digits of a second, one more than Python 3.11 and newer keep
        moment = datetime.fromisoformat(row["TIMESTAMP"])
        prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        yield Shot(moment.timestamp(), max(1, prompt), max(1, output))


def _conversations(entries: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    for entry in entries:
        turns = [turn["value"] for turn in entry["conversations"]]
        if len(turns) >= 2 and turns[0] and turns[1]:
            yield _tokens(turns[0]), _tokens(turns[1])


def _tokens(text: str) -> int:
    return max(1, round(len(text) / CHARACTERS_PER_TOKEN))
