"""LoRA adapters: what vLLM is started with for them, and what a request names one by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest

from serve_app.checkpoint.adapter import check_adapter
from serve_app.checkpoint.directory import Checkpoint
from serve_app.errors import ModelLoadError

IN_A_BATCH = 8  # adapters whose requests one step computes together, if engine.vllm says nothing


@dataclass(frozen=True, slots=True)
class Loras:
    """The adapters of a replica.

    Args:
        requests: what vLLM knows each by, by its name in the API.
        rank: the largest of all.
    """

    requests: Mapping[str, LoRARequest] = field(default_factory=dict)
    rank: int = 0

    @property
    def names(self) -> Collection[str]:
        """Their names."""
        return self.requests.keys()

    def request(self, name: str) -> LoRARequest | None:
        """Return what vLLM is asked with; None for "", the model itself."""
        return self.requests[name] if name else None

    def arguments(self) -> dict[str, Any]:
        """Return vLLM's engine arguments for them; none without adapters."""
        if not self.requests:
            return {}
        return {
            "enable_lora": True,
            "max_loras": min(len(self.requests), IN_A_BATCH),
            "max_cpu_loras": len(self.requests),
            "max_lora_rank": min(step for step in get_args(MaxLoRARanks) if step >= self.rank),
        }


def read_adapters(directories: Mapping[str, Path], checkpoint: Checkpoint) -> Loras:
    """Look at adapters before vLLM opens them.

    Args:
        directories: by name.
        checkpoint: the model that they have to fit.

    Raises:
        ModelLoadError: one is damaged, or of a kind that vLLM does not serve.
    """
    requests, largest = {}, 0
    tensors = checkpoint.tensors() if directories else {}
    for number, (name, directory) in enumerate(directories.items(), 1):
        try:
            largest = max(largest, check_adapter(directory, tensors))
        except ModelLoadError as error:
            raise ModelLoadError(f"adapter {name}: {error.message}") from None
        except OSError as error:
            raise ModelLoadError(f"adapter {name}: {error.strerror}") from None
        requests[name] = LoRARequest(name, number, str(directory))
    return Loras(requests, largest)
