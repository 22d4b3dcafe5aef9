"""A model that is a directory on the node: complete, or what is missing. No network.

Reads names, config.json, the index and the headers of safetensors files, all with limits: the
check must not load a tensor library before the node has proven what it holds.
"""

from __future__ import annotations

from pathlib import Path

from serve_app.access.capacity import room_fault
from serve_app.access.report import sanitise
from serve_app.access.verdict import NodeVerdict, Outcome, TokenReport
from serve_app.checkpoint import files
from serve_app.checkpoint.headers import check_weights_file
from serve_app.checkpoint.runnable import Loader, refusal, weights_bytes
from serve_app.errors import ModelLoadError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


class _Unloadable(Exception):
    """The directory is whole, but no model for this engine; says what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def check_directory(path: str, loader: Loader | None = None) -> NodeVerdict:
    """Check config, tokenizer, index, and the header and size of every weights file.

    Args:
        path: the directory; `~` works.
        loader: what will load it, so that what it cannot load is refused; None asks for
            completeness alone.

    Returns:
        `granted`, or `weights_missing` with the first thing that is wrong.
    """
    directory = Path(path).expanduser()
    try:
        _check(directory, loader)
    except _Unloadable as fault:
        return _verdict(Outcome.WEIGHTS_MISSING, path, str(fault), fault.remedy)
    except ModelLoadError as fault:
        return _verdict(Outcome.WEIGHTS_MISSING, path, fault.message)
    except OSError as error:
        return _verdict(Outcome.WEIGHTS_MISSING, path, f"{error.filename}: {error.strerror}")
    return _verdict(Outcome.GRANTED, path, "")


def weight_files(directory: Path) -> list[Path]:
    """Return the files of a directory that hold its weights, as transformers finds them.

    Raises:
        ModelLoadError: there are none, or the index cannot be read.
        OSError: the directory cannot be read.
    """
    config = files.parse_json(files.read_limited(directory / files.CONFIG, files.CONFIG_BYTES))
    names = {entry.name for entry in directory.iterdir()}
    entry = files.weights_entry(names, config if isinstance(config, dict) else None)
    if entry is None:
        raise ModelLoadError(f"{directory} has no {files.SINGLE} and no {files.INDEX}")
    if not files.is_index(entry):
        return [directory / entry]
    raw = files.read_limited(directory / entry, files.INDEX_BYTES)
    return [directory / shard for shard in files.parse_index(raw, name=entry).shards]


def _check(directory: Path, loader: Loader | None) -> None:
    if not directory.is_dir():
        raise ModelLoadError(f"{directory} is not a directory on this node")
    raw = files.read_limited(directory / files.CONFIG, files.CONFIG_BYTES)
    config = files.parse_json(raw)
    if not isinstance(config, dict):
        raise ModelLoadError(f"{directory / files.CONFIG} is missing or not readable as JSON")
    names = {entry.name for entry in directory.iterdir()}
    if not any(name in names for name in TOKENIZERS):
        raise ModelLoadError(f"{directory} has no tokenizer ({' or '.join(TOKENIZERS)})")
    if loader is not None and (found := refusal(config, names, loader)):
        raise _Unloadable(found.message, found.remedy)
    weights = weight_files(directory)
    for file in weights:
        check_weights_file(file)
    if loader is not None:
        needed = weights_bytes(sum(file.stat().st_size for file in weights), config, loader)
        if found := room_fault(needed, loader):
            raise _Unloadable(found.message, found.remedy)


def _verdict(outcome: Outcome, path: str, message: str, remedy: str | None = None) -> NodeVerdict:
    sentence = "Nothing to do."
    if outcome is not Outcome.GRANTED:
        sentence = remedy or f"Put the complete model into {path} on this node (model.path)."
    return NodeVerdict(
        node_id="",
        node_name="",
        outcome=outcome,
        remedy=sentence,
        hub_message=sanitise(message) or None,
        token=TokenReport(),
    )
