"""Sampling defaults that a model's authors publish in its generation_config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from serve_app.protocol import SamplingParams

log = structlog.get_logger()

FILE = "generation_config.json"
# The ones that vLLM takes over, with the ranges of a request.
_RANGES: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 <= value <= 2,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: value >= -1 and value == int(value),
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: 0.01 <= value <= 100,
}


def read_defaults(model_dir: Path) -> dict[str, float]:
    """Return the defaults of a model's directory, by the names of `SamplingParams`.

    A value that no request could ask for is left out and logged; a file that is absent or
    damaged has no defaults.
    """
    try:
        published = json.loads((model_dir / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(published, dict):
        return {}
    found = {name: published[name] for name in _RANGES if published.get(name) is not None}
    usable = {name: value for name, value in found.items() if _is_usable(name, value)}
    if unusable := sorted(found.keys() - usable.keys()):
        log.warning("model.defaults_unusable", file=FILE, fields=unusable)
    return {name: max(0, int(v)) if name == "top_k" else v for name, v in usable.items()}


def _is_usable(name: str, value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return _RANGES[name](value)


def resolved(params: SamplingParams, defaults: Mapping[str, Any]) -> SamplingParams:
    """Return a request's parameters with the defaults where it left them out."""
    own = {name: value for name, value in defaults.items() if name in params.unset}
    return replace(params, **own) if own else params
