"""The `args:` of `serve_app.gate:build`: which weights the gate asks about, and whose application.

    gate: {model: {repo_id: …}, access: {…}, deployments: [names]}
    app: {import_path: "ray.serve.llm:build_openai_app", args: {…}}

`${gate.commit}` anywhere in `app.args` becomes the commit that was proven; the builder of
`ray.serve.llm` gets it without being asked. `${gate.path}` becomes the directory that the model is
in on every node: it is fetched there, verified, before the builder runs for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from serve_app.access_config import Part
from serve_app.config import AccessConfig, AppConfig, ModelConfig, read_part
from serve_app.errors import ConfigError

GATE_IMPORT_PATH = "serve_app.gate:build"
COMMIT = "${gate.commit}"
PATH = "${gate.path}"
RAY_LLM_BUILDER = "ray.serve.llm.build_openai_app"
UNKNOWN_KEY = "; args are `gate:` (model, access, deployments) and `app:`"


class GateConfig(Part):
    """What has to be readable, and where."""

    model: ModelConfig
    access: AccessConfig = AccessConfig()
    deployments: tuple[str, ...] = Field(
        (), description="those that load the weights; default: all that ask for a GPU, else all"
    )

    @field_validator("model")
    @classmethod
    def _no_adapters(cls, value: ModelConfig) -> ModelConfig:
        if value.adapters:
            raise ValueError("adapters are of this package's own application, serve_app.app")
        return value


class AppSource(Part):
    """Whose application comes after the gate."""

    import_path: str = Field(description="`module:builder` or `module:application`")
    args: dict[str, Any] = Field(default_factory=dict, description="of the builder")

    @field_validator("import_path")
    @classmethod
    def _names_something(cls, value: str) -> str:
        module, _, name = value.replace(":", ".").rpartition(".")
        if not module or not name:
            raise ValueError("must be `module:builder`")
        return value


class GatedApp(Part):
    """The `args:` of an application of somebody else behind the gate."""

    gate: GateConfig
    app: AppSource

    @property
    def config(self) -> AppConfig:
        """The gate's question, as every other part of this package reads it."""
        return AppConfig(model=self.gate.model, access=self.gate.access)

    @property
    def wants_path(self) -> bool:
        """The application loads a directory, which the gate has to fill on every node first."""
        return _filled(self.app.args, {PATH: ""})[1]

    def builder_args(self, commit: str, path: str = "") -> dict[str, Any]:
        """Return the builder's args with commit and directory in their places.

        Args:
            commit: for `${gate.commit}`.
            path: for `${gate.path}`; "" where only the placement is asked for.

        Raises:
            ConfigError: no place for the commit, so the application would load whatever the
                branch means by then.
        """
        args: dict[str, Any]
        args, found = _filled(self.app.args, {COMMIT: commit, PATH: path})
        if self.gate.model.url is not None and not self.wants_path:
            raise ConfigError(
                f"args.app.args: model.url has no commit that could be loaded; write {PATH} where "
                "the model's directory goes",
                param="app.args",
            )
        if not found and self.app.import_path.replace(":", ".") == RAY_LLM_BUILDER:
            found = _pin_ray_llm(args, self.gate.model.source, commit)
        if not found and self.gate.model.path is None:
            raise ConfigError(
                f"args.app.args: nothing takes the commit; write {COMMIT} where the revision goes, "
                f"or {PATH} where a directory does",
                param="app.args",
            )
        return args


def parse_gated(args: Mapping[str, Any]) -> GatedApp:
    """Read the `args:` of `serve_app.gate:build`.

    Raises:
        ConfigError: every fault, one line each; no value is echoed.
    """
    gated = read_part(GatedApp, args, hint=lambda _path: UNKNOWN_KEY)
    gated.builder_args(gated.gate.model.revision)
    return gated


def _filled(tree: Any, values: Mapping[str, str]) -> tuple[Any, bool]:
    """Return a copy with every placeholder replaced, and whether there was one."""
    if isinstance(tree, str):
        found = [placeholder for placeholder in values if placeholder in tree]
        for placeholder in found:
            tree = tree.replace(placeholder, values[placeholder])
        return tree, bool(found)
    if isinstance(tree, Mapping):
        pairs = {key: _filled(value, values) for key, value in tree.items()}
        return {key: value for key, (value, _) in pairs.items()}, any(f for _, f in pairs.values())
    if isinstance(tree, list | tuple):
        parts = [_filled(value, values) for value in tree]
        return [value for value, _ in parts], any(found for _, found in parts)
    return tree, False


def _pin_ray_llm(args: dict[str, Any], repo_id: str, commit: str) -> bool:
    """Set the engine's revisions of each `llm_configs` entry that loads this repository."""
    found = False
    configs = args.get("llm_configs")
    for config in configs if isinstance(configs, list) else ():
        if not isinstance(config, dict):
            continue  # the name of another file, whose args nobody sees here
        loading = config.get("model_loading_config") or {}
        if repo_id == (loading.get("model_source") or loading.get("model_id")):
            pins = {"revision": commit, "tokenizer_revision": commit}
            config["engine_kwargs"] = {**(config.get("engine_kwargs") or {}), **pins}
            found = True
    return found
