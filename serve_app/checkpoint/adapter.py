"""Can vLLM serve this LoRA adapter? Answered from adapter_config.json and the names of the files.

What changes the meaning of an adapter and vLLM does not implement is refused by vLLM as well, but
by a replica, after the rollout began; the list is that of its PEFTHelper.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from serve_app.checkpoint.directory import names_in
from serve_app.checkpoint.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG_BYTES,
    parse_json,
    read_limited,
)
from serve_app.checkpoint.headers import check_weights_file
from serve_app.checkpoint.names import shown
from serve_app.checkpoint.runnable import Refusal
from serve_app.errors import ModelLoadError

MAX_RANK = 512  # vLLM's own limit
REMEDY = "Convert it to a plain LoRA adapter with PEFT, or merge it and serve the merged model."
WHOLE = "Name a repository that holds an adapter alone, or serve the whole model by itself."
# Keys of adapter_config.json that change what the adapter means, and must be off.
_OFF = (
    "modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication",
    "use_bdlora", "use_qalora",
)  # fmt: skip
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_PLAIN = ("BF16", "F16", "F32")
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # they leave the base as it is


def adapter_refusal(config: object, names: Collection[str]) -> Refusal | None:
    """Return why vLLM cannot serve an adapter; None if nothing speaks against it.

    Args:
        config: the parsed adapter_config.json, whatever it is.
        names: of the repository's files.
    """
    if not isinstance(config, dict):
        return Refusal(f"{ADAPTER_CONFIG} is no JSON object", "Choose a revision with a whole one.")
    kind = config.get("peft_type")
    if kind != "LORA":
        return Refusal("the adapter is no LoRA adapter (peft_type LORA)", REMEDY)
    if any(not 0 < rank <= MAX_RANK for rank in ranks(config)):
        return Refusal(f"{ADAPTER_CONFIG} has a rank that is not from 1 to {MAX_RANK}", REMEDY)
    init = config.get("init_lora_weights")
    off = {**config, "init_lora_weights": isinstance(init, str) and init.lower() not in _INITS}
    for key in (*_OFF, "init_lora_weights"):
        if off.get(key):
            return Refusal(f"{ADAPTER_CONFIG} sets {key}, which vLLM does not implement", REMEDY)
    if ADAPTER not in names:
        message = f"the repository has no {ADAPTER}; other formats can run code and are refused"
        return Refusal(message, "Choose a revision with safetensors weights.")
    return None


def ranks(config: Mapping[str, Any]) -> list[int]:
    """Return the ranks of an adapter's matrices; 0 for one that is no number."""
    pattern = config.get("rank_pattern")
    found = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return [rank if type(rank) is int else 0 for rank in found]


def check_adapter(directory: Path, model: Mapping[str, Any] | None = None) -> int:
    """Look at an adapter's directory before a library opens it.

    Args:
        directory: its config and weights.
        model: the tensors of the model that it is for, by name, as the headers describe them.

    Returns:
        Its largest rank.

    Raises:
        ModelLoadError: the first thing that is wrong; `details` may hold a `remedy`.
        OSError: a file cannot be read.
    """
    names = names_in(directory)
    config = parse_json(read_limited(directory / ADAPTER_CONFIG, CONFIG_BYTES))
    if found := adapter_refusal(config, names):
        raise ModelLoadError(found.message, remedy=found.remedy)
    largest = max(ranks(config))
    fault = _fit_fault(check_weights_file(directory / ADAPTER), model, largest)
    if fault is not None:
        raise ModelLoadError(fault)
    return largest


def _fit_fault(
    adapter: Mapping[str, Any], model: Mapping[str, Any] | None, rank: int
) -> str | None:
    """Say why an adapter's matrices do not fit a model; vLLM would compute nonsense with them."""
    known: dict[str, list[tuple[int, ...]]] = {}
    for name, tensor in (model or {}).items():
        module, _, kind = name.rpartition(".")
        # Of quantised weights, which have other names or dtypes, no shape is known.
        is_plain = kind == "weight" and tensor["dtype"] in _PLAIN
        known.setdefault(_place(module), []).extend([tuple(tensor["shape"])] if is_plain else [])
    found = 0
    for name, tensor in adapter.items():
        if (match := _MATRIX.fullmatch(name)) is None:
            continue
        module, half, shape = match[1], match[2], tensor["shape"]
        if len(shape) != 2 or shape[0 if half == "A" else 1] > rank:
            return f"{shown(name)} has a shape that is not of rank {rank}"
        shapes = known.get(_place(module))
        found += shapes is not None
        side = shape[1 if half == "A" else 0]
        if shapes and not any(side in other for other in shapes):
            sizes = " x ".join(map(str, shapes[0]))
            return f"it is for another model: {shown(name)} has {side}, the model's is {sizes}"
    if not found and model is not None:
        return f"it is for another model: {ADAPTER} has no matrices for a module of this one"
    return None


def _place(module: str) -> str:
    """Return a module's name without what wrappers and PEFT put before its layer."""
    _, layers, within = module.rpartition("layers.")
    return layers + within if layers else module.rpartition(".")[2]
