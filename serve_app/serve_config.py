"""The Serve YAML around our `args:`: reading it, the place of every key, secrets in it.

Serve ignores some misplaced keys and prints others' values; here each fault is one line that
names the key and the nearest right one, and no value is echoed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from serve_app.config import AppConfig, parse_args, refuse_secrets
from serve_app.errors import ConfigError
from serve_app.gate_config import GATE_IMPORT_PATH, GatedApp, parse_gated

IMPORT_PATH = "serve_app.app:build_app"
CANARY_IMPORT_PATH = "serve_app.app:build_canary"  # the same without an ingress
SERVER_DEPLOYMENT = "LLMServer"  # whose replicas load the weights
INGRESS_DEPLOYMENT = "Ingress"  # whose replicas speak HTTP


@dataclass(frozen=True, slots=True)
class ServedApp:
    """One application of the YAML that this package builds, or lets through its gate.

    Args:
        name: of the application.
        config: its args.
        runtime_env: Ray's runtime environment of the application.
        deployments: what the YAML overrides of single deployments; Serve never shows it to the
            builder, and it decides where replicas go and with which environment.
        gated: the application is somebody else's behind the gate.
        access_only: another engine than ours loads the weights, so what it can load is its affair.
    """

    name: str
    config: AppConfig
    runtime_env: dict[str, Any]
    deployments: tuple[DeploymentSchema, ...] = ()
    gated: GatedApp | None = None
    access_only: bool = False


def read(path: Path) -> tuple[ServedApp, ...]:
    """Read and check a Serve config file.

    Returns:
        Our applications in it, at least one, in order.

    Raises:
        ConfigError: every fault found, one line each.
    """
    return read_whole(path)[1]


def read_whole(path: Path) -> tuple[dict[str, Any], tuple[ServedApp, ...]]:
    """Read and check a Serve config file; see `read`.

    Returns:
        The file's content, and our applications in it.
    """
    document = _document(path)
    ours = served(document)
    if not ours:
        raise ConfigError(
            f"{path.name}: no application has `import_path: {IMPORT_PATH}`, or our gate, "
            f"`{GATE_IMPORT_PATH}`; to check somebody else's application, name its repository "
            "with --repo-id"
        )
    return document, ours


def served(document: dict[str, Any]) -> tuple[ServedApp, ...]:
    """Return our applications in a Serve config.

    Raises:
        ConfigError: every fault found, one line each.
    """
    ours = tuple(_ours(document["applications"]))
    overrides = {app.name: tuple(app.deployments) for app in _checked(document).applications}
    for app in ours:
        for deployment in overrides[app.name]:
            _require_whole_autoscaling(app.name, deployment)
    return tuple(replace(app, deployments=overrides[app.name]) for app in ours)


def _require_whole_autoscaling(name: str, deployment: DeploymentSchema) -> None:
    """Refuse an override that would silently set both bounds to 1: Serve merges nothing here."""
    scaling = deployment.model_dump(exclude_unset=True).get("autoscaling_config")
    if deployment.name == SERVER_DEPLOYMENT and scaling and "max_replicas" not in scaling:
        raise ConfigError(
            f"application {name}: autoscaling_config of {SERVER_DEPLOYMENT} takes the place of all "
            "that args.replica says of scaling; set min_replicas, max_replicas and the delays "
            "under args.replica instead",
            param="deployments",
        )


def read_foreign(path: Path, *, repo_id: str, revision: str) -> tuple[ServedApp, ...]:
    """Read a Serve config of other people's applications that load this repository.

    Which deployment loads the weights is not in the file, so every one that asks for a GPU
    counts; where none does, every one that the file names; where it names none, one GPU.

    Returns:
        One entry for each such deployment, with the repository to check.

    Raises:
        ConfigError: every fault found, one line each.
    """
    config = parse_args({"model": {"repo_id": repo_id, "revision": revision}})
    found: list[ServedApp] = []
    for app in _checked(_document(path)).applications:
        runtime_env = app.runtime_env or {}
        chosen = [entry for entry in app.deployments if _asks_for_gpu(entry)] or app.deployments
        found += [
            ServedApp(
                f"{app.name}/{entry.name}",
                config,
                runtime_env,
                (entry.model_copy(update={"name": SERVER_DEPLOYMENT}),),
                access_only=True,
            )
            for entry in chosen
        ] or [ServedApp(app.name, config, runtime_env, access_only=True)]
    return tuple(found)


def _asks_for_gpu(deployment: DeploymentSchema) -> bool:
    overrides = deployment.model_dump(exclude_unset=True)
    options: dict[str, Any] = overrides.get("ray_actor_options") or {}
    bundles: list[dict[str, float]] = overrides.get("placement_group_bundles") or []
    return bool(options.get("num_gpus")) or any(bundle.get("GPU") for bundle in bundles)


def _document(path: Path) -> dict[str, Any]:
    """Return the file as a mapping whose keys stand where they belong and that holds no secret."""
    document = _parse(path)
    refuse_secrets(document, where=path.name)
    faults = list(_misplaced(document, ServeDeploySchema, "the file"))
    applications = document.get("applications")
    if not isinstance(applications, list) or not applications:
        raise ConfigError(f"{path.name}: `applications:` must be a list of applications")
    for index, application in enumerate(applications):
        faults += _misplaced(application, ServeApplicationSchema, f"applications[{index}]")
    if faults:
        raise ConfigError("\n".join(faults))
    return document


def _parse(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path} is not valid YAML{where}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not a Serve config: it must be a mapping")
    return document


def _ours(applications: list[dict[str, Any]]) -> Iterator[ServedApp]:
    for application in applications:
        name, path = str(application.get("name", "default")), application.get("import_path")
        args, runtime_env = application.get("args") or {}, application.get("runtime_env") or {}
        try:
            if path == IMPORT_PATH:
                yield ServedApp(name, parse_args(args), runtime_env)
            elif path == GATE_IMPORT_PATH:
                gated = parse_gated(args)
                yield ServedApp(name, gated.config, runtime_env, gated=gated, access_only=True)
        except ConfigError as error:
            raise ConfigError(f"application {name}:\n{error.message}") from None


def _misplaced(tree: object, schema: type[BaseModel], place: str) -> Iterator[str]:
    if not isinstance(tree, dict):
        yield f"{place} must be a mapping"
        return
    known = list(schema.model_fields)
    for key in tree:
        if key in known:
            continue
        if key in AppConfig.model_fields:
            yield f"{place}: {key} belongs under `args:` of the application"
        else:
            near = difflib.get_close_matches(str(key), known, n=1)
            yield f"{place}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")


def _checked(document: dict[str, Any]) -> ServeDeploySchema:
    try:
        return ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError("\n".join(lines)) from None
