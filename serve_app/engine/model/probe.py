"""One forward that looks at a model: its attention layers, and what the largest step takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serve_app.config import EngineConfig
from serve_app.engine.model.attention.interface import ShapeProbe
from serve_app.engine.model.attention.step import LayerShape
from serve_app.engine.model.loading import LoadedModel
from serve_app.errors import ModelLoadError

# The sampler works in float32 on the kept rows, a few tensors of their size at a time.
SAMPLER_COPIES = 6


@dataclass(frozen=True, slots=True)
class Probed:
    """What a forward showed.

    Args:
        shapes: of every attention layer, by its index.
        step_bytes: what the largest step takes on each GPU besides weights and KV cache.
    """

    shapes: dict[int, LayerShape]
    step_bytes: dict[torch.device, int]


@torch.inference_mode()
def probe(loaded: LoadedModel, engine: EngineConfig) -> Probed:
    """Compute the largest step once, on a CPU a small one.

    Args:
        loaded: the model.
        engine: how large a step may be.

    Raises:
        ModelLoadError: the model cannot run here, or not through the attention interface.
    """
    model, device = loaded.model, loaded.device
    gpus = loaded.gpus
    tokens = engine.max_batch_tokens if gpus else 2
    kept = list(range(min(tokens, engine.max_running_requests)))
    places = torch.arange(tokens, device=device)
    look = ShapeProbe()
    before = {gpu: torch.cuda.memory_allocated(gpu) for gpu in gpus}
    for gpu in gpus:  # what loading took for a while is free again
        torch.cuda.reset_peak_memory_stats(gpu)
    try:
        logits = model(
            input_ids=torch.zeros(1, tokens, dtype=torch.int64, device=device),
            position_ids=places[None] % loaded.window,
            logits_to_keep=kept if loaded.is_spread else torch.tensor(kept, device=device),
            use_cache=False,
            forward_pass=look,
        ).logits
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"{type(model).__name__} cannot run here: {error}") from error
    if logits.shape[1] != len(kept) or not look.shapes:
        raise ModelLoadError(f"{type(model).__name__} does not follow the attention interface.")
    taken = {gpu: torch.cuda.max_memory_allocated(gpu) - before[gpu] for gpu in gpus}
    if gpus:
        taken[logits.device] += SAMPLER_COPIES * logits.numel() * 4
    return Probed(look.shapes, taken)
