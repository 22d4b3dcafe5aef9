"""The part `model`: which weights are served, and the adapters that are served with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from serve_app.access_config import Part


def _repository(value: str) -> str:
    if ".." in value or not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", value):
        raise ValueError("is not a Hub repository; write it as owner/name")
    return value


def _name(value: str) -> str:
    if not (0 < len(value) <= 256 and value.isprintable()):
        raise ValueError("must be a name of 1 to 256 visible characters")
    return value


Repository = Annotated[str, AfterValidator(_repository)]


class AdapterConfig(Part):
    """A LoRA adapter, proven on every node like the model that it changes."""

    name: Annotated[str, AfterValidator(_name)] = Field(description="name in the API")
    repo_id: Repository = Field(description="Hub repository, `owner/name`")
    revision: str = Field(
        "main", min_length=1, description="branch, tag or commit; pinned by the gate"
    )

    def as_model(self, base: ModelConfig) -> ModelConfig:
        """Return the adapter as what the gate proves and the weights' store fetches."""
        return ModelConfig(
            repo_id=self.repo_id,
            revision=self.revision,
            served_name=self.name,
            share_weights=base.share_weights,
        )


class ModelConfig(Part):
    """Which weights are served, and under which name."""

    repo_id: Repository | None = Field(None, description="Hub repository, `owner/name`")
    revision: str = Field(
        "main", min_length=1, description="branch, tag or commit; pinned by the gate"
    )
    dtype: Literal["bfloat16", "float32", "auto"] = Field(
        "bfloat16", description="asserted after loading; `auto`: as stored, with backend vllm"
    )
    served_name: str | tuple[str, ...] | None = Field(
        None, description="name in the API, or a list of them; default, and always taken: repo_id"
    )
    path: str | None = Field(None, description="local directory instead of the Hub")
    digest: str | None = Field(
        None,
        pattern=r"^sha256:[0-9a-f]{64}$",
        description="of all files and their hashes, as `serve-app digest` prints it; null: any",
    )
    share_weights: bool = Field(
        default=True, description="nodes that proved their access share what the Hub sends once"
    )
    adapters: tuple[AdapterConfig, ...] = Field(
        (), description="LoRA adapters, each proven and fetched like the model; backend vllm"
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="file on every node that replaces the model's chat template; `~` works",
    )
    reasoning: Literal["none", "think"] = Field(
        "none",
        description="`think`: text in `<think>` tags is `reasoning_content`, structure after it",
    )

    @field_validator("served_name")
    @classmethod
    def _names_some(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = (value,) if isinstance(value, str) else value
        if names == ():
            raise ValueError("must be a name, or a list of at least one")
        for name in names or ():
            _name(name)
        return value

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        # Both would leave open which of them the gate has proven.
        if (self.repo_id is None) == (self.path is None):
            raise ValueError(
                "set exactly one of repo_id (a Hub repository) and path (a local directory)"
            )
        names = (*self.names, *(adapter.name for adapter in self.adapters))
        # A request names what it wants by this name alone.
        if len(set(names)) < len(names):
            raise ValueError("an adapter has the name of the model or of another adapter")
        return self

    @property
    def parts(self) -> tuple[ModelConfig, ...]:
        """The model, and each adapter as a model: all that has to be readable."""
        return (self, *(adapter.as_model(self) for adapter in self.adapters))

    def at_commits(self, commits: Mapping[str, str | None]) -> list[tuple[ModelConfig, str]]:
        """Return the model and its adapters, each with its commit.

        Args:
            commits: of the model, under "", and of each adapter by its name; what has none, such
                as a directory, is left out.
        """
        named = [("" if part is self else part.name, part) for part in self.parts]
        return [(part, commit) for name, part in named if (commit := commits.get(name))]

    @property
    def source(self) -> str:
        """Where the weights come from: the repository, or the directory."""
        return str(self.repo_id or self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """The model's names in the API: the served ones, and the repository's."""
        served = self.served_name or ()
        names = (served,) if isinstance(served, str) else served
        own = self.repo_id or self.source.rstrip("/").rsplit("/", 1)[-1]
        # A directory's name is a name only where there is no other.
        return tuple(dict.fromkeys((*names, own) if self.repo_id or not names else names))

    @property
    def name(self) -> str:
        """The model's own name in the API."""
        return self.names[0]
