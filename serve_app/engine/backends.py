"""Which engine a replica runs, by `engine.backend`; what it is to the replica, and how to get it.

Neither engine is imported before it is asked for: torch takes seconds, and vLLM is not installed
where nobody uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from serve_app.config import AppConfig, EngineConfig
from serve_app.engine.stats import EngineStats, LoadReport
from serve_app.errors import ModelLoadError
from serve_app.protocol import LLMEngine


class ReplicaEngine(LLMEngine, Protocol):
    """What a replica does with its engine, beside generating."""

    load_report: LoadReport
    max_context_tokens: int

    def prepare_grammars(self) -> None:
        """Have structured output ready before it is asked for; blocks for a second."""
        ...

    def check(self) -> None:
        """Raise if the engine has stopped.

        Raises:
            EngineDead: the replica must be replaced.
        """
        ...

    def stats(self) -> EngineStats:
        """Return the present numbers."""
        ...

    def close(self) -> None:
        """End it and fail what is open; calling it again does nothing."""
        ...


def import_libraries(engine: EngineConfig) -> None:
    """Import the engine and what it needs; takes seconds.

    Raises:
        ModelLoadError: vLLM is asked for and not installed on this node.
    """
    if engine.backend == "builtin":
        import serve_app.engine.engine  # noqa: PLC0415

        return
    if not has_vllm():
        raise ModelLoadError(
            "engine.backend is vllm, and vLLM is not installed on this node; use the image's "
            "target vllm, or install serve-app[vllm] there."
        )
    import serve_app.engine.vllm.engine  # noqa: F401, PLC0415


def load(
    model_dir: Path, config: AppConfig, adapters: Mapping[str, Path] | None = None
) -> ReplicaEngine:
    """Load a model directory into the engine that the config names; blocks.

    Args:
        model_dir: config, tokenizer and weights.
        config: of the application.
        adapters: directories of LoRA adapters by their names in the API; vLLM alone takes any.

    Raises:
        ConfigError: vLLM does not take its part of the config.
        ModelLoadError: the model cannot be loaded; one sentence says why.
    """
    import_libraries(config.engine)
    parts: dict[str, Any] = {
        "model": config.model,
        "engine": config.engine,
        "num_gpus": config.replica.num_gpus,
        "num_cpus": config.replica.num_cpus,
        "api": config.api,
    }
    if config.engine.backend == "vllm":
        from serve_app.engine.vllm.engine import VllmEngine  # noqa: PLC0415

        return VllmEngine.load(model_dir, adapters=adapters or {}, **parts)
    from serve_app.engine.engine import Engine  # noqa: PLC0415

    return Engine.load(model_dir, **parts)


def has_vllm() -> bool:
    """Return whether vLLM is installed here."""
    return find_spec("vllm") is not None


def check_vllm_arguments(engine: EngineConfig) -> bool:
    """Check the names in `engine.vllm` against the vLLM that is installed here.

    Returns:
        False if none is, so that nothing is known.

    Raises:
        ConfigError: one that vLLM does not have.
    """
    if not has_vllm():
        return False
    from serve_app.engine.vllm.arguments import check_names  # noqa: PLC0415

    check_names(engine.vllm)
    return True
