"""What every part of the config tree has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A frozen part of the tree: unknown keys are errors, and no input is echoed in one."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
