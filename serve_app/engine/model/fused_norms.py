"""RMSNorm by torch's one kernel, where a model's own is the same function in eight.

A norm is replaced only where that is sure: it has a weight and an epsilon and nothing else, it is
called with the hidden states alone, and on numbers of any size it gives what torch gives. A
Gemma's, which scales by 1 + weight, does not, and stays.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

# Names of the epsilon in transformers' models.
EPSILONS = ("variance_epsilon", "eps")
# Both compute in float32 and round in another order.
TOLERANCE = 8 * torch.finfo(torch.float32).eps


@torch.inference_mode()
def fuse_norms(model: Any) -> int:
    """Replace what is the same as `torch.nn.RMSNorm` by it, in place; weights are shared.

    Args:
        model: a transformers model on one device.

    Returns:
        How many norms were replaced.
    """
    same: dict[tuple[Any, ...], bool] = {}
    count = 0
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            epsilon = _epsilon(module)
            if epsilon is None:
                continue
            key = (type(module), epsilon, module.weight.shape)
            if key not in same:
                same[key] = _is_the_same(module, epsilon)
            if same[key]:
                fused = torch.nn.RMSNorm(module.weight.shape, epsilon, device="meta")
                fused.weight = module.weight
                setattr(parent, name, fused.eval())
                count += 1
    return count


def _epsilon(module: torch.nn.Module) -> float | None:
    """Return the epsilon of what may be such a norm; None for anything else."""
    if isinstance(module, torch.nn.RMSNorm) or not type(module).__name__.endswith("RMSNorm"):
        return None
    tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    arguments = inspect.signature(module.forward).parameters
    if tensors != ["weight"] or module.weight.dim() != 1 or len(arguments) != 1:
        return None
    found = [getattr(module, name) for name in EPSILONS if hasattr(module, name)]
    return found[0] if len(found) == 1 and isinstance(found[0], float) else None


def _is_the_same(module: torch.nn.Module, epsilon: float) -> bool:
    """Compare a copy, with weights of its own, in float32."""
    shape, device = module.weight.shape, module.weight.device
    steps = torch.arange(3 * shape[0], dtype=torch.float32, device=device).view(1, 3, -1)
    weight = torch.nn.Parameter(1.5 + steps[0, 0].cos(), requires_grad=False)
    trial = copy.deepcopy(module, {id(module.weight): weight})
    # Large ones, some as small as the epsilon, and some far below it.
    sizes = torch.tensor([1e2, epsilon**0.5, 1e-3 * epsilon**0.5], device=device)[:, None]
    hidden = (steps.sin() + 0.1) * sizes
    try:
        own = trial(hidden)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    fused = torch.nn.functional.rms_norm(hidden, shape, weight, epsilon)
    return own.shape == fused.shape and torch.allclose(own, fused, rtol=TOLERANCE, atol=0)
