"""A loaded model to a forward with a KV cache of the size that memory pays for.

On a CPU, Llama-like models compute in compiled code of their own (`native/`); everything else
runs transformers' forward with the attention backend that suits the device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch

from serve_app.config import EngineConfig
from serve_app.engine.cache.allocator import BLOCK_TOKENS, whole_blocks
from serve_app.engine.model.attention.interface import choose_backend
from serve_app.engine.model.attention.sdpa import SdpaBackend
from serve_app.engine.model.attention.varlen import VarlenBackend
from serve_app.engine.model.batch_invariant import FixedForward
from serve_app.engine.model.cuda_graphs import CudaRecorder, DecodeRows, GraphedForward, sizes
from serve_app.engine.model.fused_llama import FusedLlama, compiled_by_torch
from serve_app.engine.model.fused_norms import fuse_norms
from serve_app.engine.model.kv_cache import KVCache, tokens_for
from serve_app.engine.model.llama_like import difference
from serve_app.engine.model.loading import LoadedModel
from serve_app.engine.model.native import library
from serve_app.engine.model.native.forward import NativeForward
from serve_app.engine.model.native.weights import bytes_per_token, take, unsupported
from serve_app.engine.model.probe import Probed, probe
from serve_app.engine.model.runner import Forward
from serve_app.engine.model.transformers_forward import TransformersForward
from serve_app.errors import ModelLoadError

log = structlog.get_logger()

# Outside torch's allocator: the CUDA context, kernels and the recorded graphs. An estimate.
CONTEXT_BYTES = 1 << 29
GIB = 2**30
# Prompt tokens that keep the device busy without stalling those who stream: a CPU computes some
# hundred of a small model in a tenth of a second, a GPU a thousand of a large one; fewer would
# take a GPU less time than Python needs to launch their kernels.
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
CPU_ADVICE = "raise engine.kv_cache_cpu_gib"


@dataclass(frozen=True, slots=True)
class Assembly:
    """A model that can compute steps.

    Args:
        forward: the model with its cache.
        kv_tokens: size of the cache.
        kv_bytes: of all layers.
        max_context_tokens: the configured window, the model's or the cache's: the least.
        attention: what attends.
        prefill_chunk_tokens: prompt tokens of one step at the most while anybody streams.
        speculative_tokens: guesses that a decode row may check; 0 is none.
        graphs_s: seconds it took to record the decode steps as CUDA graphs.
    """

    forward: Forward
    kv_tokens: int
    kv_bytes: int
    max_context_tokens: int
    attention: str
    prefill_chunk_tokens: int
    speculative_tokens: int
    graphs_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Budget:
    """Bytes of one device's KV cache, and what to change where they are too few."""

    size: int
    advice: str


def assemble(loaded: LoadedModel, engine: EngineConfig, *, num_gpus: float = 1) -> Assembly:
    """Give a model its cache and choose how it computes.

    Args:
        loaded: the model; it may be emptied, its weights live on in the result.
        engine: the window, the batch and the cache's budget.
        num_gpus: of the replica; below 1 it is its share of one GPU's memory too.

    Raises:
        ModelLoadError: the model cannot run here, no memory is left for the cache, or
            `deterministic` is asked for where it cannot be.
    """
    compiled = _compiled(loaded, engine)
    return _native(loaded, engine, compiled) if compiled else _general(loaded, engine, num_gpus)


def _compiled(loaded: LoadedModel, engine: EngineConfig) -> Any:
    """Return the CPU's library if it can compute this model, else None; the log says why."""
    if loaded.device.type != "cpu" or not engine.native_cpu:
        return None
    reason = unsupported(loaded.model)
    if reason is None:
        try:
            return library.load()
        except library.Unavailable as error:
            reason = str(error)
    log.warning("engine.native_unavailable", reason=reason)
    return None


def _native(loaded: LoadedModel, engine: EngineConfig, compiled: Any) -> Assembly:
    per_token = bytes_per_token(loaded.model)
    tokens, window = _sizes(
        int(engine.kv_cache_cpu_gib * GIB) // per_token, loaded, engine, CPU_ADVICE
    )
    return Assembly(
        forward=NativeForward(
            compiled,
            take(compiled, loaded.model, window),
            kv_tokens=tokens,
            max_batch_tokens=engine.max_batch_tokens,
        ),
        kv_tokens=tokens,
        kv_bytes=tokens * per_token,
        max_context_tokens=window,
        attention=NativeForward.name,
        prefill_chunk_tokens=_chunk(loaded, engine),
        speculative_tokens=engine.speculative_tokens,
    )


def _general(loaded: LoadedModel, engine: EngineConfig, num_gpus: float) -> Assembly:
    if loaded.device.type == "cuda" and not loaded.is_spread:
        if difference(loaded.model) is None:
            loaded = replace(loaded, model=FusedLlama(loaded.model, compiled_by_torch))
        else:
            fuse_norms(loaded.model)
    probed = probe(loaded, engine)
    shapes = probed.shapes
    budgets = _budgets(probed, engine, num_gpus)
    affordable = tokens_for(shapes, {device: budget.size for device, budget in budgets.items()})
    advice = min(budgets.values(), key=lambda budget: budget.size).advice
    backend = choose_backend(shapes.values())
    # Graphs need the whole model on one device.
    varlen = backend if isinstance(backend, VarlenBackend) and not loaded.is_spread else None
    if engine.deterministic and varlen is None:
        backend = SdpaBackend()  # eager varlen chooses its kernels by the longest of the batch
    # Padding has places in the cache.
    rows = min(engine.max_running_requests, engine.max_batch_tokens)
    rows = rows if varlen or engine.deterministic else 0
    tokens, window = _sizes(affordable - rows, loaded, engine, advice)
    cache = KVCache(shapes, tokens + rows)
    eager = TransformersForward(
        loaded.model, cache, backend, loaded.device, spread=loaded.is_spread
    )
    started = time.monotonic()
    forward: Forward = eager
    if varlen is not None:
        buckets = (rows,) if engine.deterministic else sizes(rows)
        decode = DecodeRows(varlen, buckets, window, tokens, loaded.device)
        forward = _graphed(eager, decode, engine)
    if engine.deterministic:
        forward = FixedForward(forward, rows, tokens)
    return Assembly(
        forward=forward,
        kv_tokens=tokens,
        kv_bytes=cache.bytes,
        max_context_tokens=window,
        attention=backend.name,
        prefill_chunk_tokens=_chunk(loaded, engine),
        speculative_tokens=_speculative(forward, engine),
        graphs_s=time.monotonic() - started,
    )


def _chunk(loaded: LoadedModel, engine: EngineConfig) -> int:
    """Return the tokens of a chunk: as configured, or what suits the device."""
    return engine.prefill_chunk_tokens or CHUNK_TOKENS[loaded.device.type]


def _speculative(forward: Forward, engine: EngineConfig) -> int:
    """Return how many guesses pay: none where they would take decode steps off their graphs."""
    if engine.speculative_tokens and isinstance(forward, GraphedForward):
        log.warning("engine.drafts_off", speculative_tokens=engine.speculative_tokens)
        return 0
    return engine.speculative_tokens


def _graphed(eager: TransformersForward, decode: DecodeRows, engine: EngineConfig) -> Forward:
    try:
        return GraphedForward(eager, decode, CudaRecorder(decode.device))
    except RuntimeError as error:
        if engine.deterministic:
            raise ModelLoadError(
                f"engine.deterministic needs CUDA graphs here, and this model has none: {error}"
            ) from error
        log.warning("engine.graphs_unavailable", reason=str(error))
        return eager


def _sizes(
    affordable: int, loaded: LoadedModel, engine: EngineConfig, advice: str
) -> tuple[int, int]:
    """Return the tokens of the cache, whole blocks, and those of the window."""
    affordable -= affordable % BLOCK_TOKENS
    window = min(engine.max_context_tokens, loaded.window, affordable)
    if window < 2:
        raise ModelLoadError(f"No memory is left for the KV cache; {advice}.")
    wanted = whole_blocks(window) * engine.max_running_requests
    return min(affordable, wanted), window


def _budgets(probed: Probed, engine: EngineConfig, num_gpus: float) -> dict[torch.device, _Budget]:
    """Return what each device can give to the KV cache."""
    return {
        device: _of_gpu(device, engine, probed.step_bytes[device], min(1.0, num_gpus))
        if device.type == "cuda"
        else _Budget(int(engine.kv_cache_cpu_gib * GIB), CPU_ADVICE)
        for device in {shape.device for shape in probed.shapes.values()}
    }


def _of_gpu(device: torch.device, engine: EngineConfig, step_bytes: int, share: float) -> _Budget:
    """Return what is left of a replica's share of a GPU, and is free there.

    Of a share only what this process holds is taken off: others that share the GPU have theirs.
    What is free counts too, less the part of the share that is never given away: somebody may
    hold more than a share, and of a whole GPU everything that is taken is taken from here.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) + CONTEXT_BYTES
    limit = engine.kv_cache_fraction * share * total
    spare = free - (1 - engine.kv_cache_fraction) * share * total
    needs = f"weights and CUDA take {own / GIB:.1f}, a step {step_bytes / GIB:.1f} GiB"
    other = total - free - own
    if spare < limit - own and other > CONTEXT_BYTES:  # that much may be an error of the estimate
        advice = (
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB of the GPU are free, {needs}, and others "
            f"hold {other / GIB:.1f}: stop them, or give each replica there less replica.num_gpus "
            "or engine.kv_cache_fraction"
        )
    else:
        more = "replica.num_gpus or " if share < 1 else ""
        advice = (
            f"engine.kv_cache_fraction {engine.kv_cache_fraction:g} of replica.num_gpus {share:g} "
            f"is {limit / GIB:.1f} of the GPU's {total / GIB:.1f} GiB, and {needs}: raise {more}"
            "engine.kv_cache_fraction, lower engine.max_batch_tokens, or use a larger GPU"
        )
    return _Budget(int(min(limit - own, spare) - step_bytes), advice)
