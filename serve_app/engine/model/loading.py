"""A directory of weights to a model on its device, or one clear reason why not.

Safetensors only and never the repository's own code. Every parameter's dtype is asserted
after loading, no weight may be missing (transformers would fill it with random numbers), and
the architecture must attend through transformers' attention interface.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from serve_app.checkpoint.architectures import LAYER_TYPES
from serve_app.checkpoint.directory import Checkpoint, check_checkpoint
from serve_app.checkpoint.runnable import Loader
from serve_app.config import ModelConfig
from serve_app.engine.defaults import read_defaults
from serve_app.engine.model.attention.interface import NAME
from serve_app.engine.text.chat_template import TemplateRefusal, check_template
from serve_app.errors import ModelLoadError

LIBRARY_WORDS = 300  # characters of what a library says; for an unknown type it lists hundreds
# Names that tokenizers give to the ends of a turn and of a message, beside `eos_token`.
TURN_ENDS = ("eot_token", "eom_token")
# Rotary embeddings that change with the longest sequence of a batch beyond the trained window.
BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to compute, and what was learned about it.

    Args:
        model: a transformers causal LM in evaluation mode.
        tokenizer: its tokenizer.
        device: where token ids go in.
        window: tokens that the model can place.
        vocab_size: rows of the embedding.
        eos_token_ids: the model's own end-of-sequence ids, those of its tokenizer included.
        defaults: of sampling parameters, as the model's authors publish them.
        weights_bytes: size of all parameters.
        tokenizer_s: time of the tokenizer.
        weights_s: time of the weights.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    window: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    defaults: dict[str, float]
    weights_bytes: int
    tokenizer_s: float
    weights_s: float

    @property
    def gpus(self) -> tuple[torch.device, ...]:
        """Those that hold weights, in order; none on a CPU."""
        found = {each.device for each in self.model.parameters() if each.device.type == "cuda"}
        return tuple(sorted(found, key=lambda device: device.index))

    @property
    def is_spread(self) -> bool:
        """Whether the model is on several GPUs, were it the embedding alone that is apart."""
        return len(self.gpus) > 1


def load(
    model_dir: Path,
    model: ModelConfig,
    *,
    num_gpus: float,
    num_cpus: float,
) -> LoadedModel:
    """Load a model directory.

    Args:
        model_dir: config, tokenizer and safetensors, as a Hub repository holds them.
        model: the dtype to hold the weights in, and a chat template of one's own.
        num_gpus: 0 computes on the CPU, above 1 spreads the layers over the GPUs.
        num_cpus: threads of one step, rounded down, at least 1.

    Raises:
        ModelLoadError: one sentence that names the file, the setting or the architecture.
    """
    torch.set_num_threads(max(1, int(num_cpus)))
    device_map = _device_map(num_gpus)
    started = time.monotonic()
    check_files(model_dir, Loader(dtype=model.dtype, num_gpus=num_gpus))
    dtype: torch.dtype = getattr(torch, model.dtype)
    loaded = _load_weights(model_dir, dtype, device_map)
    weights_s = time.monotonic() - started

    started = time.monotonic()
    tokenizer = load_tokenizer(model_dir, model)
    tokenizer_s = time.monotonic() - started

    vocab_size = loaded.get_input_embeddings().num_embeddings
    return LoadedModel(
        model=loaded,
        tokenizer=tokenizer,
        device=loaded.get_input_embeddings().weight.device,
        window=model_window(loaded.config),
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids(
            (loaded.generation_config, loaded.config.get_text_config(), tokenizer),
            tokenizer,
            vocab_size,
        ),
        defaults=read_defaults(model_dir),
        weights_bytes=sum(p.numel() * p.element_size() for p in loaded.parameters()),
        tokenizer_s=tokenizer_s,
        weights_s=weights_s,
    )


def _device_map(num_gpus: float) -> str | None:
    if num_gpus == 0:
        return None
    if not torch.cuda.is_available():
        raise ModelLoadError(
            f"replica.num_gpus is {num_gpus:g}, but torch {torch.__version__} sees no CUDA device "
            "here; check the driver and the torch build, or set replica.num_gpus to 0."
        )
    return "auto" if num_gpus > 1 else "cuda:0"


def check_files(model_dir: Path, loader: Loader) -> Checkpoint:
    """Look at every file before a library does: strangers wrote them.

    Raises:
        ModelLoadError: the first thing that is wrong, and what to do.
    """
    try:
        return check_checkpoint(model_dir, loader)
    except ModelLoadError as fault:
        remedy = f" {fault.details['remedy']}" if "remedy" in fault.details else ""
        message = fault.message.rstrip(".")
        raise ModelLoadError(f"The model cannot be loaded: {message}.{remedy}") from None
    except OSError as error:
        raise ModelLoadError(f"{error.filename} cannot be read: {error.strerror}.") from None


def _load_weights(model_dir: Path, dtype: torch.dtype, device_map: str | None) -> Any:
    with in_one_sentence("The model"), _no_progress_bar():
        model, report = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if absent := sorted(report["missing_keys"]):
        raise ModelLoadError(
            f"The weights lack {len(absent)} of the model's tensors, the first is {absent[0]}."
        )
    model.eval()
    _check_model(model, dtype)
    return model


def _check_model(model: Any, dtype: torch.dtype) -> None:
    config = model.config.get_text_config()
    kind = type(model).__name__
    if not model._supports_attention_backend or model._is_stateful or config.is_encoder_decoder:
        raise ModelLoadError(f"{kind} does not use transformers' attention interface.")
    if other := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        raise ModelLoadError(f"{kind} has layers of kind {min(other)}, which is not supported.")
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype:
            raise ModelLoadError(f"{name} was loaded as {parameter.dtype} instead of {dtype}.")
        if parameter.device.type in ("meta", "cpu") and getattr(model, "hf_device_map", None):
            raise ModelLoadError("The weights do not fit the replica's GPUs; raise num_gpus.")


def load_tokenizer(model_dir: Path, model: ModelConfig) -> Any:
    """Return a directory's tokenizer, with the chat template that is to be used.

    Raises:
        ModelLoadError: there is no fast one, or the template cannot be read.
    """
    with in_one_sentence("The tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise ModelLoadError("The repository has no tokenizer.json, or it cannot be made.")
    if model.chat_template is not None:
        tokenizer.chat_template = read_template(Path(model.chat_template))
    return tokenizer


def model_window(config: Any) -> int:
    """Return the tokens that the model can place, one rule for all of them."""
    text = config.get_text_config()
    window: int = getattr(text, "max_position_embeddings", None) or 2**31
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in BATCH_DEPENDENT_ROPE:
            window = min(window, part.get("original_max_position_embeddings") or window)
    return window


def read_template(path: Path) -> str:
    """Return the chat template in a file.

    Raises:
        ModelLoadError: the file cannot be read on this node, or is no template.
    """
    place = path.expanduser().absolute()
    try:
        text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ModelLoadError(
            f"model.chat_template: {place} cannot be read on this node: {why}. The file has to be "
            "at this path on every node that may host a replica."
        ) from None
    if not text.strip():
        raise ModelLoadError(f"model.chat_template: {place} is empty.")
    try:
        check_template(text)
    except TemplateRefusal as error:
        raise ModelLoadError(
            f"model.chat_template: {place} is no chat template: {error}."
        ) from None
    return text


def eos_token_ids(sources: Iterable[Any], tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """Return every id that the files call an end: of a sequence, a turn, or a message.

    Fine-tunes often keep their base model's config and teach another end, which only the
    tokenizer names.

    Args:
        sources: objects with an `eos_token_id`, or without.
        tokenizer: the model's.
        vocab_size: ids are below it.
    """
    ids: set[int] = set()
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        stated = value if isinstance(value, list) else [value]
        ids.update(each for each in stated if isinstance(each, int) and not isinstance(each, bool))
    named = tokenizer.special_tokens_map
    ends = [tokenizer.convert_tokens_to_ids(named[name]) for name in TURN_ENDS if name in named]
    return frozenset(id_ for id_ in (*ids, *ends) if id_ is not None and 0 <= id_ < vocab_size)


@contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Raise whatever a library raises over a stranger's files as one sentence.

    A file, a shape, an unknown architecture, a lack of memory, a number where a mapping was
    expected: the libraries raise anything for it, the tokenizers' `Exception` itself.
    """
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        said = words if len(words) <= LIBRARY_WORDS else words[:LIBRARY_WORDS] + "..."
        raise ModelLoadError(f"{what} cannot be loaded: {said}") from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
