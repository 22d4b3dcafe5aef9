"""One frozen tree: the `args:` of a Serve application's YAML.

Unknown and misplaced keys are errors with a suggestion, rejected input is never echoed, and
a token's value is refused wherever it stands. Nothing is read from the environment or from
files here; a component is handed its own part of the tree.

model.py and engine.py: the parts `model` and `engine`. vllm_arguments.py: which of vLLM's
arguments other keys own.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from serve_app.access_config import AccessConfig, Part, parts_in
from serve_app.config.engine import EngineConfig
from serve_app.config.model import AdapterConfig, ModelConfig
from serve_app.errors import ConfigError
from serve_app.redaction import SECRET

__all__ = (
    "TOKEN_VARIABLES",
    "AdapterConfig",
    "ApiConfig",
    "AppConfig",
    "EngineConfig",
    "ModelConfig",
    "config_hash",
    "parse_args",
    "read_part",
    "refuse_secrets",
)

PartT = TypeVar("PartT", bound=Part)
TOKEN_VARIABLES = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
HAND_OVER = (
    "Hand the token over on the nodes instead: the HF_TOKEN environment variable set before Ray "
    "starts, or a file named by access.token_file (a mounted Kubernetes secret)."
)


class ReplicaConfig(Part):
    """What one replica needs, and how many there are."""

    num_gpus: float = Field(1, ge=0, description="GPUs of one replica")
    num_cpus: float = Field(1, gt=0, description="CPU cores of one replica; sets its thread count")
    accelerator_type: str | None = Field(None, description="Ray's name of the GPU model")
    resources: dict[str, float] = Field(default_factory=dict, description="custom Ray resources")
    label_selector: dict[str, str] = Field(default_factory=dict, description="Ray node labels")
    min_replicas: int = Field(1, ge=0, description="replicas kept when idle")
    max_replicas: int = Field(1, ge=1, description="replicas at the most")
    target_ongoing_requests: float = Field(
        16, gt=0, description="requests per replica the autoscaler aims at"
    )
    upscale_delay_s: float = Field(
        30, ge=0, description="how long more are needed before they are started"
    )
    downscale_delay_s: float = Field(
        600, ge=0, description="how long fewer do before some are stopped, the last one too"
    )
    target_ongoing_tokens: int | None = Field(
        None, ge=1, description="prompt and completion tokens likewise; null: its KV cache's"
    )
    routing: Literal["balanced", "prefix"] = Field(
        "balanced",
        description="`prefix`: prompts that begin alike go to one replica, within a bound",
    )

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is larger than max_replicas")
        return self


class ApiConfig(Part):
    """Limits of the HTTP surface."""

    api_keys_file: str | None = Field(
        None, description="file of keys: hashes, names, limits; null: no keys asked"
    )
    max_queued_requests: int = Field(
        256, ge=1, description="waiting requests per replica before 429"
    )
    max_queued_tokens: int = Field(
        1_048_576,
        ge=1,
        description="prompt and possible completion of what waits per replica before 429",
    )
    first_token_timeout_s: float = Field(
        600, gt=0, description="how long a request may wait for its first token; a start included"
    )
    stall_timeout_s: float = Field(
        60, gt=0, description="a stream ends when its replica gave no sign of life for so long"
    )
    max_request_bytes: int = Field(2_097_152, ge=1024, description="largest request body")
    trust_request_chat_template: bool = Field(
        default=False, description="run a `chat_template` that comes with a request"
    )
    body_timeout_s: float = Field(
        20, gt=0, le=3600, description="time for a body to come, and 1 s more for each 16 KiB of it"
    )
    max_answer_bytes: int = Field(
        134_217_728, ge=65_536, description="largest answer, complete or streamed"
    )
    send_timeout_s: float = Field(
        60, gt=0, description="how long a client may take nothing of its answer before it is cut"
    )
    keep_alive_s: float = Field(
        10, ge=0, description="silence of a stream after which it sends a comment; 0: never"
    )
    cors_allow_origins: tuple[str, ...] = Field((), description="allowed browser origins")
    allowed_hosts: tuple[str, ...] | None = Field(
        None,
        description="names in the Host header, `*.` for subdomains, `*` for any; null: any, but "
        "on loopback without keys only this machine's own",
    )


class LoggingConfig(Part):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level")
    format: Literal["json", "console"] = Field(
        "json", description="json for machines, console for people"
    )


class AppConfig(Part):
    """The `args:` of the Serve application."""

    model: ModelConfig
    access: AccessConfig = AccessConfig()
    replica: ReplicaConfig = ReplicaConfig()
    engine: EngineConfig = EngineConfig()
    api: ApiConfig = ApiConfig()
    logging: LoggingConfig = LoggingConfig()

    def at_commit(self, commit: str | None) -> AppConfig:
        """Return the same of this very commit, whatever the branch means by now."""
        if commit is None:
            return self
        model = self.model.model_copy(update={"revision": commit})
        return self.model_copy(update={"model": model})

    def with_adapters_at(self, commits: Mapping[str, str | None]) -> AppConfig:
        """Return the same with adapters of these very commits, by name."""
        adapters = tuple(
            each.model_copy(update={"revision": commits.get(each.name) or each.revision})
            for each in self.model.adapters
        )
        model = self.model.model_copy(update={"adapters": adapters})
        return self.model_copy(update={"model": model})

    @model_validator(mode="after")
    def _has_receipts(self) -> AppConfig:
        if self.model.url is not None and self.access.on_unreachable == "allow_cached":
            raise ValueError("access.on_unreachable allow_cached needs model.repo_id")
        return self

    @model_validator(mode="after")
    def _fits_the_engine(self) -> AppConfig:
        if self.engine.backend == "builtin" and self.model.dtype == "auto":
            raise ValueError(
                "model.dtype auto needs engine.backend vllm; the builtin engine holds the weights "
                "in bfloat16 or float32"
            )
        if self.engine.backend == "builtin" and self.model.adapters:
            raise ValueError("model.adapters needs engine.backend vllm")
        gpus = self.replica.num_gpus
        if self.engine.backend == "vllm" and self.engine.deterministic and not gpus:
            raise ValueError("engine.deterministic needs GPUs, or engine.backend builtin")
        if self.engine.backend == "vllm" and gpus > 1 and gpus != int(gpus):
            raise ValueError("replica.num_gpus must be whole, or below 1, with engine.backend vllm")
        return self


def parse_args(args: dict[str, Any]) -> AppConfig:
    """Turn the raw `args:` into the tree.

    Raises:
        ConfigError: every fault at once, one line each, with the nearest right key.
    """
    return read_part(AppConfig, args, hint=_suggest)


def read_part(
    kind: type[PartT], args: Mapping[str, Any], *, hint: Callable[[tuple[str, ...]], str]
) -> PartT:
    """Turn raw `args:` into a part of a tree; no value is echoed.

    Args:
        kind: the part.
        args: as the YAML has them.
        hint: returns what to say behind an unknown key, of its path.

    Raises:
        ConfigError: every fault at once, one line each.
    """
    refuse_secrets(args, where="args")
    try:
        return kind.model_validate(args)
    except ValidationError as error:
        lines = [_explain(each["loc"], each["type"], each["msg"], hint) for each in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def config_hash(config: Mapping[str, Any] | BaseModel) -> str:
    """Return the first 12 hex digits of a config's SHA-256, the same for any order of its keys.

    Args:
        config: as it was written, or as a tree, of which the defaults count too.
    """
    # Dumped, so that a default that is written out is no other config.
    if isinstance(config, BaseModel):
        config = config.model_dump(mode="json")
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def refuse_secrets(tree: object, *, where: str) -> None:
    """Refuse a token's value, or a variable made to hold one, anywhere in a config tree.

    Raises:
        ConfigError: names the place and the right way, never the value.
    """
    for path, value in _leaves(tree, where):
        # By its form, wherever it stands: Serve logs `args` in clear text at every build.
        if isinstance(value, str) and SECRET.search(value):
            raise ConfigError(f"{path} holds a token's value. {HAND_OVER}", param=path)
        # Whatever its form: Ray shows a runtime_env to everybody on its dashboard.
        if path.rsplit(".", 1)[-1] in TOKEN_VARIABLES and ".env_vars." in path:
            raise ConfigError(
                f"{path} puts a token into the cluster's state. {HAND_OVER}", param=path
            )


def _leaves(tree: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            # A forgotten name makes the value a key, which the message must not repeat.
            if SECRET.search(str(key)):
                yield f"a key of {path}", str(key)
            else:
                yield from _leaves(value, f"{path}.{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, tree


def _explain(
    loc: tuple[int | str, ...], kind: str, message: str, hint: Callable[[tuple[str, ...]], str]
) -> str:
    path = ".".join(("args", *map(str, loc)))
    if kind == "extra_forbidden":
        return f"{path}: unknown key{hint(tuple(map(str, loc)))}"
    return f"{path}: {message.removeprefix('Value error, ')}"


def _suggest(loc: tuple[str, ...]) -> str:
    *parents, key = (part for part in loc if not part.isdigit())  # the place in a list
    places = dict(_keys(AppConfig))
    # A right key at a wrong place is the common mistake, so it is looked for before misspellings.
    homes = [place for place in places if place.rsplit(".", 1)[-1] == key]
    if homes:
        return f"; it belongs at args.{homes[0]}"
    siblings = [place.rsplit(".", 1)[-1] for place in places if place.split(".")[:-1] == parents]
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    anywhere = difflib.get_close_matches(key, [place.rsplit(".", 1)[-1] for place in places], n=1)
    if anywhere:
        home = next(place for place in places if place.rsplit(".", 1)[-1] == anywhere[0])
        return f"; did you mean args.{home}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _keys(part: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, info in part.model_fields.items():
        yield prefix + name, info.description or ""
        for inner in parts_in(info.annotation):
            yield from _keys(inner, f"{prefix}{name}.")
