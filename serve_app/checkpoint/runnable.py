"""Can an engine load this checkpoint? Answered from config.json and the names of the files.

A function of the engine: what the builtin one refuses (quantised weights, say) another may load.
It costs a few KB before a download that may be hundreds of GB, and says in one sentence what
loading would say in pages afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal

from serve_app.checkpoint.architectures import HYBRID, LAYER_TYPES, MADE_FOR, RUNS
from serve_app.checkpoint.files import CONFIG

Backend = Literal["builtin", "vllm"]
# Far above every published model; the deepest have a few hundred layers.
_LIMITS = {
    "num_hidden_layers": 4096, "n_layer": 4096, "vocab_size": 1 << 24, "hidden_size": 1 << 20,
    "n_embd": 1 << 20, "intermediate_size": 1 << 24, "num_attention_heads": 1 << 16,
    "n_head": 1 << 16, "num_key_value_heads": 1 << 16, "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 31,
}  # fmt: skip
MAX_COUNT = 1 << 20  # of experts, labels, whatever else a model counts
_COUNT = re.compile(r"(num|n)_(?!.*(param|token|step|sample|example|flop))")
_BITS_OF = {"float32": 32, "float64": 64}
_MULTIMODAL = re.compile(r"(vision|audio|image|video|speech|vq)_(config|encoder_config)")
# Files that quantisation tools leave where config.json does not say.
_QUANTISED_BY = {
    "hf_quant_config.json": "ModelOpt", "quantize_config.json": "GPTQ", "quant_config.json": "AWQ",
}  # fmt: skip
_HEADLESS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM"
    r"|RewardModeling|ImageClassification)|RewardModel$"
)

DENSE = "Choose a checkpoint of this model in bfloat16, float16 or float32"
OTHER_MODEL = (
    "Choose a text-only decoder model (Llama, Mistral, Qwen 2 and 3, Gemma, Phi and relatives)"
)


@dataclass(frozen=True, slots=True)
class Loader:
    """What will load the checkpoint on a node.

    Args:
        backend: the engine.
        dtype: that the weights are held in; `bfloat16`, `float32`, or `auto` as they are stored.
        num_gpus: of one replica; 0 computes on the CPU.
        adapter: it is a LoRA adapter for a model that is loaded besides.
    """

    backend: Backend = "builtin"
    dtype: str = "bfloat16"
    num_gpus: float = 0.0
    adapter: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an engine cannot load a checkpoint, and what to do; one sentence each."""

    message: str
    remedy: str


def refusal(
    config: object,
    names: Collection[str],
    loader: Loader,
    *,
    installed: Callable[[str], bool] | None = None,
) -> Refusal | None:
    """Return why the engine cannot load a checkpoint; None if nothing speaks against it.

    Args:
        config: the parsed config.json, whatever it is.
        names: of the repository's files.
        loader: the engine.
        installed: says whether a Python package is here; default: asks this process.
    """
    if not isinstance(config, dict):
        return Refusal(f"{CONFIG} is no JSON object", "Choose a revision with a whole config.json.")
    faults = (_quantised, _architecture, _shape) if loader.backend == "builtin" else (_shape,)
    for fault in faults:
        if found := fault(config, names):
            return found
    return _tokenizer(names, installed or _is_installed)


def weights_bytes(listed: int, config: Mapping[str, Any], loader: Loader) -> int:
    """Return how many bytes weights take in memory, by their size in the checkpoint.

    Args:
        listed: bytes in the repository.
        config: the parsed config.json, which names their dtype.
        loader: the dtype they are held in.
    """
    if loader.dtype == "auto" or _is_quantised(config):
        return listed
    stored = str(_stored_dtype(config)).removeprefix("torch.")
    return listed * (32 if loader.dtype == "float32" else 16) // _BITS_OF.get(stored, 16)


def _is_quantised(config: Mapping[str, Any]) -> bool:
    return next(_quantisations(config, ()), None) is not None


def _stored_dtype(config: Mapping[str, Any]) -> object:
    text = config.get("text_config")
    nested = text if isinstance(text, dict) else {}
    places = (config, nested)
    found = (place.get(key) for place in places for key in ("dtype", "torch_dtype"))
    return next((value for value in found if value is not None), "bfloat16")


def _quantised(config: Mapping[str, Any], names: Collection[str]) -> Refusal | None:
    method = next(_quantisations(config, names), None)
    if method is None:
        return None
    message = f"the weights are quantised ({method}), and engine.backend builtin loads none such"
    original = f"{CONFIG} of a quantised one often names its original"
    return Refusal(message, f"{DENSE} ({original}), or set engine.backend vllm.")


def _quantisations(config: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if entry := place.get(key):
                yield _method(entry)
    dtype = str(_stored_dtype(config))
    if re.search(r"float8|float4|fp8|fp4|u?int[0-9]", dtype):
        yield _word(dtype)
    yield from (tool for name, tool in _QUANTISED_BY.items() if name in names)


def _method(entry: object) -> str:
    if not isinstance(entry, dict):
        return "by an unknown method"
    method = entry.get("quant_method") or entry.get("quant_algo")
    if isinstance(method, str) and method:
        return _word(method)
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"
    bits = entry.get("bits")
    return f"{bits} bits" if isinstance(bits, int) and 0 < bits < 64 else "by an unknown method"


def _architecture(config: Mapping[str, Any], _names: Collection[str]) -> Refusal | None:
    kind, classes = config.get("model_type"), config.get("architectures")
    classes = classes if isinstance(classes, list) else []
    named = [_word(name) for name in classes if isinstance(name, str)][:3]
    what = f"model_type {_word(kind)}" if isinstance(kind, str) else "no model_type"
    what += f" ({', '.join(named)})" if named else ""
    if not isinstance(kind, str):
        return Refusal(f"{CONFIG} names {what}", f"{OTHER_MODEL}.")
    why = _family_fault(kind, config)
    if why is None and named and not any(_predicts(name, config) for name in named):
        why = "has no head that predicts the next token"
    if why is None and (other := sorted(_layer_kinds(config) - LAYER_TYPES)):
        why = f"has layers of kind {_word(other[0])}, which engine.backend builtin lacks"
    return Refusal(f"{CONFIG} names {what}, which {why}", f"{OTHER_MODEL}.") if why else None


def _family_fault(kind: str, config: Mapping[str, Any]) -> str | None:
    if config.get("is_encoder_decoder") is True:
        return "is an encoder-decoder model"
    if kind in RUNS:
        return None
    if any(_MULTIMODAL.fullmatch(str(key)) for key in config):
        return "takes images, audio or video"
    if kind not in HYBRID and _may_be_newer():
        return None
    return "is no text-only decoder that engine.backend builtin runs"


def _predicts(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a class predicts tokens; a bare model may share its embeddings for it."""
    if _HEADLESS.search(name):
        return False
    bare = name.endswith("Model") and not name.endswith("HeadModel")
    return not (bare and config.get("tie_word_embeddings") is False)


def _layer_kinds(config: Mapping[str, Any]) -> set[str]:
    kinds = config.get("layer_types")
    return set(map(str, kinds)) if isinstance(kinds, list) else set()


def _shape(config: Mapping[str, Any], _names: Collection[str]) -> Refusal | None:
    """Refuse numbers that no model has, before a library makes modules and tables of that size."""
    for key, value in config.items():
        least, limit = _bounds(key)
        if limit is None or value is None or isinstance(value, list):  # or one number a layer
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
            message = f"{CONFIG} says {_word(key)}: {_word(value)[:20]}, which no model has"
            return Refusal(message, "Choose a revision with a sound config.json.")
    return None


def _bounds(key: str) -> tuple[int, int | None]:
    """Return the least and the largest value of a key of config.json; None without a limit."""
    if key in _LIMITS:
        return 1, _LIMITS[key]
    return 0, MAX_COUNT if _COUNT.match(key) else None


def _tokenizer(names: Collection[str], installed: Callable[[str], bool]) -> Refusal | None:
    """Refuse what transformers makes no fast tokenizer of with the packages that are here."""
    if "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= set(names):
        return None
    if "tekken.json" in names and installed("mistral_common"):
        return None
    needs = {"tokenizer.model": "sentencepiece", "tiktoken.model": "tiktoken"}
    for name, package in needs.items():
        if name in names and installed(package):
            return None
    found = next((name for name in (*needs, "tekken.json") if name in names), None)
    if found is None:
        message = "the repository has no tokenizer.json"
        return Refusal(message, "Choose a repository or revision with a tokenizer.json.")
    package = needs.get(found, "mistral-common")
    message = (
        f"the repository has {found} and no tokenizer.json, and {package} is not installed here"
    )
    remedy = f"Choose a revision with a tokenizer.json, or `pip install {package}` on every node."
    return Refusal(message, remedy)


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _may_be_newer() -> bool:
    """Return whether this node's transformers may know more architectures than the table."""
    try:
        numbers = re.findall(r"\d+", version("transformers"))
    except PackageNotFoundError:  # a node that only answers probes
        return False
    return tuple(map(int, numbers[:2])) > MADE_FOR


def _word(text: object) -> str:
    """Return a foreign word for a message: short, and of harmless letters."""
    return re.sub(r"[^\w.+-]", "?", str(text)[:60], flags=re.ASCII) or "?"
