"""START HERE: which files of a repository are the model. One rule, transformers' rule.

`model.safetensors` wins over an index beside it; of an index only the shards that it names
count; everything else that is read is a small file of the top folder. Checkpoints of a
training, copies in other precisions and other engines' formats are not the model. A repository
without a whole model may hold an adapter, in PEFT's names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from serve_app.checkpoint.names import conflict, shown, store_fault
from serve_app.errors import ModelLoadError

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SIGNATURE = "model.sig"  # of OpenSSF Model Signing; read with the model, whoever asks for it
TEMPLATES = "additional_chat_templates"  # the one folder that transformers' tokenizers look into
# Tokenizers, configs, templates, licenses and the signature, at the top.
_SMALL = (
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "USE_POLICY*",
    SIGNATURE,
)
# Of them what describes other files or a training, and never the model.
_OTHER = ("*.index.json", "trainer_state.json", "training_args.json", "all_results.json")

MIB = 1 << 20
CONFIG_BYTES = 4 * MIB  # real ones have a few KB
INDEX_BYTES = 32 * MIB  # DeepSeek-V3's, of 91,991 tensors, has 9 MB
TEMPLATE_BYTES = MIB  # a chat template; real ones stay below 50 KB
TOKENIZER_BYTES = 256 * MIB  # Gemma 3's, of 262,144 entries, has 33 MB
SMALL_BYTES = 16 * MIB  # any other file that is read whole
FILES = 4096  # of one model; the largest have a few hundred shards
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")


@dataclass(frozen=True, slots=True)
class Index:
    """A weights index, parsed.

    Args:
        shards: the files that it names, sorted.
        total_bytes: size of all tensors, as it says; None if it does not.
        has_metadata: transformers loads none without.
    """

    shards: tuple[str, ...]
    total_bytes: int | None = None
    has_metadata: bool = True


def weights_entry(names: Collection[str], config: Mapping[str, Any] | None = None) -> str | None:
    """Return the file that leads to the weights: one file, an index, or an adapter; else None.

    Args:
        names: of the repository's files.
        config: the parsed config.json, which may name the file; None if it was not read.

    Raises:
        ModelLoadError: config.json names a file that cannot be one.
    """
    named = (config or {}).get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or not named.endswith(
            (".safetensors", ".safetensors.index.json")
        ):
            raise ModelLoadError(
                f"config.json's transformers_weights names no safetensors file: {shown(named)}"
            )
        if fault := store_fault(named):
            raise ModelLoadError(f"config.json's transformers_weights {fault}: {shown(named)}")
        return named
    return next((name for name in (SINGLE, INDEX, ADAPTER) if name in names), None)


def is_index(entry: str) -> bool:
    """Return whether a weights entry is an index of shards."""
    return entry.endswith(".index.json")


def parse_index(raw: bytes, *, name: str = INDEX) -> Index:
    """Read a weights index.

    Args:
        raw: its content; the caller has bounded it by `INDEX_BYTES`.
        name: for messages.

    Raises:
        ModelLoadError: it is no index, or names what cannot be a file of the repository.
    """
    index = parse_json(raw)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{name} is damaged: it names no files.")
    names = list(weight_map.values())
    for shard in names:
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise ModelLoadError(f"{name} names a file that is no safetensors file: {shown(shard)}")
    shards = sorted(set(names))
    for shard in shards:
        if fault := store_fault(shard):
            raise ModelLoadError(f"{name} names a file whose name {fault}: {shown(shard)}")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(total, int | float) or not 0 < total < 2**60:
        total = None
    size = None if total is None else int(total)
    return Index(tuple(shards), size, has_metadata=isinstance(metadata, dict))


def parse_json(raw: bytes) -> Any:
    """Return parsed JSON; None for what is none, nests too deep or holds endless numbers."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def read_limited(path: Path, limit: int) -> bytes:
    """Return a small file's content; empty if there is no such file.

    Raises:
        ModelLoadError: it has more bytes than such a file may have.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except FileNotFoundError:
        return b""
    if len(raw) > limit:
        raise ModelLoadError(f"{path.name} has more than {limit:,} bytes")
    return raw


def size_limit(path: str) -> int | None:
    """Return how many bytes a small file may have; None for weights, which the disk limits."""
    if path.endswith(".safetensors"):
        return None
    if path.endswith(".index.json"):
        return INDEX_BYTES
    if path.endswith(".jinja"):
        return TEMPLATE_BYTES
    if path in _VOCABULARIES or path.endswith((".model", ".tiktoken")):
        return TOKENIZER_BYTES
    configs = (CONFIG, ADAPTER_CONFIG, "generation_config.json")
    return CONFIG_BYTES if path in configs else SMALL_BYTES


def model_files(sizes: Mapping[str, int], entry: str | None, index: Index | None) -> list[str]:
    """Choose the files of a listing that are the model.

    Args:
        sizes: bytes of every listed file, by name.
        entry: from `weights_entry`.
        index: parsed, if the entry is one.

    Returns:
        Sorted names; without weights where the listing has none.

    Raises:
        ModelLoadError: a name under which no file may be stored, two that are the same, too
            many files, a shard that is not listed, or a file that is too large for what it is.
    """
    weights = [] if entry is None else [entry, *(index.shards if index else ())]
    if missing := [name for name in weights if name not in sizes]:
        listed = ", ".join(missing[:5])
        raise ModelLoadError(
            f"{entry} needs {len(missing)} files that the repository lacks: {listed}"
        )
    chosen = sorted({*weights, *(name for name in sizes if _is_small(name, sizes[name]))})
    if len(chosen) > FILES:
        raise ModelLoadError(
            f"the listing has {len(chosen)} model files; more than {FILES} are refused"
        )
    for name in chosen:
        if fault := store_fault(name):
            raise ModelLoadError(f"the listing has a file whose name {fault}: {shown(name)}")
    if fault := conflict(chosen):
        raise ModelLoadError(f"the listing's names exclude each other: {fault}")
    _refuse_oversized(chosen, sizes)
    return chosen


def is_read(name: str) -> bool:
    """Return whether a file is of those that are read beside the weights."""
    folder, _, base = name.rpartition("/")
    if folder == TEMPLATES:
        return base.endswith(".jinja") and not base.startswith(".")
    if folder or base.startswith(".") or any(fnmatchcase(base, other) for other in _OTHER):
        return False
    return any(fnmatchcase(base, pattern) for pattern in _SMALL)


def _is_small(name: str, size: int) -> bool:
    """Return whether a file belongs to the model; a huge one that nobody needs does not."""
    if not is_read(name):
        return False
    return _is_needed(name) or size <= (size_limit(name) or 0)


def _is_needed(name: str) -> bool:
    return name in (CONFIG, "tokenizer_config.json", "chat_template.jinja", *_VOCABULARIES)


def _refuse_oversized(chosen: Iterable[str], sizes: Mapping[str, int]) -> None:
    for name in chosen:
        limit = size_limit(name)
        if limit is not None and sizes[name] > limit:
            raise ModelLoadError(
                f"{name} has {sizes[name]:,} bytes; more than {limit:,} are refused for such a file"
            )
