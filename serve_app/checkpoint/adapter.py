"""Can vLLM serve this LoRA adapter, and does it fit its model?

The first is answered from adapter_config.json and the names of the files, the second from the
headers of both weights. vLLM refuses much of it as well, but in a replica, after the rollout began
and minutes after its start; what it does not look at, it computes nonsense with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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
MAX_ALPHA = 1 << 20  # published ones stay below 2^12
REMEDY = "Convert it to a plain LoRA adapter with PEFT, or merge it and serve the merged model."
WHOLE = "Name a repository that holds an adapter alone, or serve the whole model by itself."
# Keys of adapter_config.json that change what the adapter means, and must be off; the list is that
# of vLLM's PEFTHelper, and what it would find in the weights.
_OFF = (
    "modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication",
    "use_bdlora", "use_qalora", "trainable_token_indices",
)  # fmt: skip
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # they leave the base as it is
# vLLM matches a pattern's keys as expressions with every module's name, and without a limit.
_PATTERN_KEY = re.compile(r"[^(){}*+?]{0,200}(\.\*[^(){}*+?]{0,200})?")
_PATTERN_KEYS = 4096
_NAME_CHARS = 512  # of a tensor
_MATRIX = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")
# The model's own, which PEFT keeps where the vocabulary may have grown; vLLM leaves it out.
_OWN = re.compile(r"(?:base_model\.model\.)?(.*(?:embed_tokens|lm_head))\.base_layer\.weight")
# Dtypes in which a tensor's shape is its matrix's; others are packed.
_PLAIN = ("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2")
_LAYER = re.compile(r"layers\.\d+\.")


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
    if fault := _settings_fault(config):
        return Refusal(f"{ADAPTER_CONFIG} {fault}", REMEDY)
    if ADAPTER not in names:
        message = f"the repository has no {ADAPTER}; other formats can run code and are refused"
        return Refusal(message, "Choose a revision with safetensors weights.")
    return None


def _settings_fault(config: Mapping[str, Any]) -> str | None:
    for key in ("rank_pattern", "alpha_pattern"):
        if fault := _pattern_fault(config.get(key)):
            return f"has a {key} {fault}"
    if any(not 0 < rank <= MAX_RANK for rank in ranks(config)):
        return f"has a rank that is not from 1 to {MAX_RANK}"
    if not all(_is_alpha(alpha) for alpha in _values(config, "lora_alpha", "alpha_pattern")):
        return f"has a lora_alpha that is no number from -{MAX_ALPHA} to {MAX_ALPHA}"
    if "target_modules" not in config:
        return "has no target_modules"
    init = config.get("init_lora_weights")
    off = {
        **{key: config.get(key) for key in _OFF},
        "init_lora_weights": isinstance(init, str) and init.lower() not in _INITS,
        "bias": config.get("bias", "none") != "none",
    }
    sets = next((key for key, is_set in off.items() if is_set), None)
    return None if sets is None else f"sets {sets}, which vLLM does not implement"


def _pattern_fault(pattern: object) -> str | None:
    if pattern is None:
        return None
    if not isinstance(pattern, dict) or len(pattern) > _PATTERN_KEYS:
        return f"that is no object of {_PATTERN_KEYS} keys at the most"
    for key in pattern:
        try:
            if not _PATTERN_KEY.fullmatch(key):
                return "with an expression that is refused; write the modules' names out"
            re.compile(key)
        except re.error:
            return "with an expression that is none"
    return None


def _is_alpha(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -MAX_ALPHA <= value <= MAX_ALPHA  # NaN is not


def _values(config: Mapping[str, Any], key: str, pattern: str) -> list[Any]:
    """Return what a key says, and what its pattern says for single modules."""
    return [config.get(key), *(config.get(pattern) or {}).values()]


def ranks(config: Mapping[str, Any]) -> list[int]:
    """Return the ranks of an adapter's matrices; 0 for one that is no number."""
    return [rank if type(rank) is int else 0 for rank in _values(config, "r", "rank_pattern")]


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
    tensors = check_weights_file(directory / ADAPTER)
    if fault := _matrices_fault(tensors, config):
        raise ModelLoadError(fault, remedy=REMEDY)
    if model is not None and (fault := _fit_fault(tensors, config, model)):
        raise ModelLoadError(f"it is for another model: {fault}")
    return max(ranks(config))


@dataclass(slots=True)
class _Pair:
    """The shapes of one module's matrices.

    Args:
        a: takes what comes in, (rank, in); None if it is missing.
        b: gives what goes out, (out, rank); None if it is missing.
        is_embedding: of tokens, so that the model's own matrix is (in, out).
    """

    a: tuple[int, ...] | None = None
    b: tuple[int, ...] | None = None
    is_embedding: bool = False

    @property
    def rank(self) -> int | None:
        """Of both; None if they have not the same or are no matrices."""
        if not (self.a and self.b and len(self.a) == len(self.b) == 2 and self.a[0] == self.b[1]):
            return None
        return self.a[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the module's own matrix, (out, in)."""
        out, into = (self.b or (0,))[0], (self.a or (0,))[-1]
        return (into, out) if self.is_embedding else (out, into)


def _matrices_fault(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Say which tensor of an adapter is none of a pair of matrices of its rank."""
    known = set(ranks(config))
    pairs = _pairs(tensors)
    for name, tensor in tensors.items():
        if _OWN.fullmatch(name):
            continue
        match = _MATRIX.fullmatch(name)
        if match is None or len(name) > _NAME_CHARS:
            return f"{ADAPTER} holds {shown(name)}, which is no LoRA matrix"
        pair = pairs[match[1]]
        if pair.a is None or pair.b is None:
            return f"{ADAPTER} holds {shown(name)} without its other half"
        if pair.rank not in known:
            rank = " or ".join(map(str, sorted(known)))
            return f"{shown(name)} has a shape that is not of rank {rank}"
        if not tensor["dtype"].startswith(("F", "BF")):
            return f"{shown(name)} holds no floating-point numbers"
    return None


def _fit_fault(
    tensors: Mapping[str, Any], config: Mapping[str, Any], model: Mapping[str, Any]
) -> str | None:
    """Say why an adapter's matrices do not fit a model; vLLM would compute nonsense with them."""
    known = _shapes(model)
    layers = {match[0] for place in known if (match := _LAYER.match(place))}
    # (name, shape): what the adapter says of the model's own matrices.
    said = [(m[1], tuple(tensors[m[0]]["shape"])) for m in map(_OWN.fullmatch, tensors) if m]
    for module, pair in _pairs(tensors).items():
        is_stored_so = config.get("fan_in_fan_out") is True and not pair.is_embedding
        said.append((module, pair.shape[::-1] if is_stored_so else pair.shape))
    found = 0
    for module, shape in said:
        place = _place(module)
        layer = _LAYER.match(place)
        if layer and layers and layer[0] not in layers:
            return f"it is for {shown(module)}, and this one has no such layer"
        shapes = known.get(place)
        found += shapes is not None
        if shapes and shape not in shapes:
            return f"{shown(module)} is {_size(shape)} there, the model's is {_size(min(shapes))}"
    return None if found else f"{ADAPTER} has no matrices for a module of this one"


def _pairs(tensors: Mapping[str, Any]) -> dict[str, _Pair]:
    """Return an adapter's pairs of matrices by module."""
    pairs: dict[str, _Pair] = {}
    for name, tensor in tensors.items():
        if match := _MATRIX.fullmatch(name):
            pair = pairs.setdefault(match[1], _Pair(is_embedding=match[3] is not None))
            setattr(pair, (match[2] or match[3]).lower(), tuple(tensor["shape"]))
    return pairs


def _shapes(model: Mapping[str, Any]) -> dict[str, set[tuple[int, ...]]]:
    """Return the shapes of a model's matrices by their places; none where they are not known."""
    known: dict[str, set[tuple[int, ...]]] = {}
    for name, tensor in model.items():
        module, _, kind = name.rpartition(".")
        shape = tuple(tensor["shape"])
        # Of quantised weights, which have other names or dtypes, no shape is known.
        is_plain = kind == "weight" and tensor["dtype"] in _PLAIN and len(shape) == 2
        known.setdefault(_place(module), set()).update({shape} if is_plain else ())
    return known


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _place(module: str) -> str:
    """Return a module's name without what wrappers and PEFT put before its layer."""
    _, layers, within = module.rpartition("layers.")
    return layers + within if layers else module.rpartition(".")[2]
