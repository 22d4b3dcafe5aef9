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

IMPORT_PATH = "serve_app.app:build_app"


@dataclass(frozen=True, slots=True)
class ServedApp:
    """One application of the YAML that this package builds.

    Args:
        name: of the application.
        config: its args.
        runtime_env: Ray's runtime environment of the application.
        deployments: what the YAML overrides of single deployments; Serve never shows it to the
            builder, and it decides where replicas go and with which environment.
    """

    name: str
    config: AppConfig
    runtime_env: dict[str, Any]
    deployments: tuple[DeploymentSchema, ...] = ()


def read(path: Path) -> tuple[ServedApp, ...]:
    """Read and check a Serve config file.

    Returns:
        Our applications in it, at least one, in order.

    Raises:
        ConfigError: every fault found, one line each.
    """
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
    ours = tuple(_ours(applications))
    if not ours:
        raise ConfigError(f"{path.name}: no application has `import_path: {IMPORT_PATH}`")
    overrides = {app.name: tuple(app.deployments) for app in _checked(document).applications}
    return tuple(replace(app, deployments=overrides[app.name]) for app in ours)


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
        if application.get("import_path") != IMPORT_PATH:
            continue
        name = str(application.get("name", "default"))
        try:
            config = parse_args(application.get("args") or {})
        except ConfigError as error:
            raise ConfigError(f"application {name}:\n{error.message}") from None
        yield ServedApp(name, config, application.get("runtime_env") or {})


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
