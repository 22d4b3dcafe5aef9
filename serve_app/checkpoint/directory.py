"""A model's directory on this machine, looked at before any library opens a file of it.

The names, the order and the limits are those by which the files were chosen on the Hub, so the
gate, the download and the loader mean the same files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.checkpoint import files
from serve_app.checkpoint.headers import check_weights_file
from serve_app.checkpoint.runnable import Loader, refusal
from serve_app.errors import ModelLoadError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_READ_WHOLE = (".json", ".jinja", ".model", ".txt", ".tiktoken")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory that holds a whole model.

    Args:
        config: the parsed config.json.
        weights: the files of its tensors.
    """

    config: dict[str, Any]
    weights: tuple[Path, ...]

    def tensors(self) -> dict[str, Any]:
        """Return all tensors by name, as the files' headers describe them."""
        return {name: t for file in self.weights for name, t in check_weights_file(file).items()}

    def weights_bytes(self) -> int:
        """Return the size of the files of tensors."""
        return sum(file.stat().st_size for file in self.weights)


def check_checkpoint(directory: Path, loader: Loader | None = None) -> Checkpoint:
    """Look at every file that will be read: there, sound, and no larger than such a file may be.

    Args:
        directory: config, tokenizer and safetensors, as a Hub repository holds them.
        loader: what will load it, so that what it cannot load is refused; None asks for
            completeness alone.

    Raises:
        ModelLoadError: the first thing that is wrong; `details` may hold a `remedy`.
        OSError: a file cannot be read.
    """
    names = names_in(directory)
    if files.CONFIG not in names:
        raise ModelLoadError(f"{directory} has no config.json; it is not a model's directory")
    config = files.parse_json(files.read_limited(directory / files.CONFIG, files.CONFIG_BYTES))
    if not isinstance(config, dict):
        raise ModelLoadError(f"{directory / files.CONFIG} is not readable as JSON")
    if not any(name in names for name in TOKENIZERS):
        raise ModelLoadError(f"{directory} has no tokenizer ({' or '.join(TOKENIZERS)})")
    if loader is not None and (found := refusal(config, names, loader)):
        raise ModelLoadError(found.message, remedy=found.remedy)
    _check_small_files(directory, names)
    weights = _weight_files(directory, names, config, is_loaded=loader is not None)
    tensors = sum(len(check_weights_file(file)) for file in weights)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensors and loader is not None:
        raise ModelLoadError(f"config.json names {layers} layers, and there are {tensors} tensors")
    return Checkpoint(config, weights)


def names_in(directory: Path) -> set[str]:
    """Return the names in a directory.

    Raises:
        ModelLoadError: it is none.
        OSError: it cannot be read.
    """
    if not directory.is_dir():
        raise ModelLoadError(f"{directory} is not a directory on this node")
    return {entry.name for entry in directory.iterdir()}


def _weight_files(
    directory: Path, names: set[str], config: dict[str, Any], *, is_loaded: bool
) -> tuple[Path, ...]:
    entry = files.weights_entry(names, config)
    if entry in (None, files.ADAPTER):
        raise ModelLoadError(
            f"{directory} holds no safetensors weights ({files.SINGLE} or {files.INDEX}); other "
            "formats can run code and are refused"
        )
    if not files.is_index(entry):
        return (directory / entry,)
    index = files.parse_index(files.read_limited(directory / entry, files.INDEX_BYTES), name=entry)
    if is_loaded and not index.has_metadata:
        raise ModelLoadError(f"{entry} is damaged: it has no metadata, which transformers reads")
    return tuple(directory / shard for shard in index.shards)


def _check_small_files(directory: Path, names: set[str]) -> None:
    """Bound what libraries read whole and parse without limits of their own."""
    templates = (directory / files.TEMPLATES).glob("*.jinja")
    for name in (*names, *(f"{files.TEMPLATES}/{path.name}" for path in templates)):
        limit = files.size_limit(name)
        if limit is None or not name.endswith(_READ_WHOLE) or not (directory / name).is_file():
            continue
        if (directory / name).stat().st_size > limit and files.is_read(name):
            raise ModelLoadError(f"{name} has more than {limit:,} bytes")
    name = "tokenizer_config.json"
    if name not in names:
        return
    settings = files.parse_json(files.read_limited(directory / name, files.SMALL_BYTES))
    if not isinstance(settings, dict):
        raise ModelLoadError(f"{name} is not readable as a JSON object")
    template = settings.get("chat_template")
    if len(json.dumps(template)) > files.TEMPLATE_BYTES:
        message = f"the chat template has more than {files.TEMPLATE_BYTES:,} bytes"
        raise ModelLoadError(f"{message} ({name})")
