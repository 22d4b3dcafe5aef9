"""Limits that make a request a good one."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields

import numpy as np

from serve_app.errors import ConfigError
from serve_app.loadtest.client import Sample

_LIMIT = re.compile(r"(ttft|itl|tpot|e2e)=(\d+(?:\.\d+)?)(ms|s)")


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper limits in seconds; None does not matter.

    Args:
        ttft_s: of the first text.
        itl_s: of 95 % of the request's own gaps between texts.
        tpot_s: of the mean time of a token after the first.
        e2e_s: of the whole answer.
    """

    ttft_s: float | None = None
    itl_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read `ttft=500ms,itl=60ms`.

        Raises:
            ConfigError: it is not of this form.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            match = _LIMIT.fullmatch(part.strip())
            if not match:
                raise ConfigError(f"{part!r} is not a limit; write --slo ttft=500ms,itl=60ms")
            limits[f"{match[1]}_s"] = float(match[2]) / (1000 if match[3] == "ms" else 1)
        return cls(**limits)

    def met(self, sample: Sample) -> bool:
        """Tell whether a request was answered whole and within every limit."""
        if sample.error is not None:
            return False
        measured = times(sample)
        limits = ((f.name, getattr(self, f.name)) for f in fields(self))
        return all(
            limit is None or measured[name] is None or measured[name] <= limit
            for name, limit in limits
        )

    def to_json(self) -> dict[str, float | None]:
        """Return the limits by name."""
        return asdict(self)


def times(sample: Sample) -> dict[str, float | None]:
    """Return a request's own times in seconds; None for what it was too short to have."""
    gaps = sample.gaps_s
    return {
        "ttft_s": sample.ttft_s,
        "itl_s": float(np.quantile(gaps, 0.95)) if gaps else None,
        "tpot_s": sample.tpot_s,
        "e2e_s": sample.e2e_s,
    }
