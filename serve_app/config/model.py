"""The part `model`: which weights are served, and the adapters that are served with them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from serve_app.access_config import Part


def _repository(value: str) -> str:
    if ".." in value or not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", value):
        raise ValueError("is not a Hub repository; write it as owner/name")
    return value


_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[^/?#\s]+)*/?")
PIN = re.compile(r"[0-9a-f]{64}")
_MODELSCOPE = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(@[\w.-]{1,200})?")
# Scheme of a URL -> what its place looks like, the extra that reads it, and the extra's module.
_SCHEMES = {
    "s3": (_BUCKET, "s3", "botocore"),
    "gs": (_BUCKET, "gcs", "google.auth"),
    "modelscope": (_MODELSCOPE, None, None),
}


def _place(value: str) -> str:
    scheme, _, place = value.partition("://")
    form, extra, module = _SCHEMES.get(scheme, (_BUCKET, None, None))
    parts = {*place.partition("@")[0].split("/")}
    if scheme not in _SCHEMES or not form.fullmatch(place) or {".", ".."} & parts:
        raise ValueError(
            "is not the URL of a model; write it as s3://bucket/prefix, gs://bucket/prefix or "
            "modelscope://owner/name"
        )
    if module is not None and not _is_installed(module):
        raise ValueError(f"needs the extra `{extra}`: pip install 'serve-app[{extra}]'")
    return value.rstrip("/")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


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
        "main",
        min_length=1,
        description="branch, tag or commit, of `url` the digest of a listing; pinned by the gate",
    )
    dtype: Literal["bfloat16", "float32", "auto"] = Field(
        "bfloat16", description="asserted after loading; `auto`: as stored, with backend vllm"
    )
    served_name: str | tuple[str, ...] | None = Field(
        None, description="name in the API, or a list of them; default, and always taken: repo_id"
    )
    path: str | None = Field(None, description="local directory instead of the Hub")
    url: Annotated[str, AfterValidator(_place)] | None = Field(
        None,
        description="`s3://bucket/prefix`, `gs://bucket/prefix` (extras `s3`, `gcs`) or "
        "`modelscope://owner/name`, then `@revision`, instead of the Hub; its listing is pinned",
    )
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
        # Several would leave open which of them the gate has proven.
        if [self.repo_id, self.path, self.url].count(None) != 2:
            raise ValueError(
                "set exactly one of repo_id (a Hub repository), path (a local directory) and url "
                "(an object store, or ModelScope)"
            )
        if self.url is not None and self.adapters:
            raise ValueError("adapters come from a Hub; with them set repo_id or path, not url")
        if self.url is not None and self.revision != "main" and self.pin is None:
            raise ValueError(
                "revision: of a url it is the digest of a listing (64 hex digits, `commit` of "
                "`serve-app check --json`), or left out; ModelScope's stands in the url, behind @"
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
        """Where the weights come from: the repository, the directory, or the URL."""
        return str(self.repo_id or self.path or self.url)

    @property
    def sends_token(self) -> bool:
        """Whether the token of `access` is sent for it: to a Hub, or to ModelScope."""
        return self.repo_id is not None or str(self.url).startswith("modelscope://")

    @property
    def pin(self) -> str | None:
        """The digest that a source without commits has to list; None takes what it lists now."""
        return self.revision if self.url and PIN.fullmatch(self.revision) else None

    @property
    def cache_id(self) -> str:
        """The repository that the weights have in this node's cache."""
        if self.url is None:
            return str(self.repo_id)
        scheme = self.url.partition("://")[0]
        name = re.sub(r"[^\w-]", "-", self.url.rpartition("/")[2])[:48]
        return f"{scheme}/{name}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"

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
