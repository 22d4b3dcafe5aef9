"""Where a service runs: from its URL or from its Serve config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Served:
    """A running service.

    Args:
        url: its root.
        name: of its application.
        replicas: that it has.
        document: its Serve config, if that is known.
    """

    url: str
    name: str = "llm"
    replicas: int = 1
    document: dict[str, Any] | None = None


def served(target: str) -> Served:
    """Read a Serve config, or take a URL as it is (with one replica).

    Raises:
        ConfigError: the config is not valid, or the number of its replicas may change.
    """
    if target.startswith(("http://", "https://")):
        return Served(target)
    from serve_app import serve_config  # noqa: PLC0415 - brings Ray; a URL needs none

    path = Path(target)
    app = serve_config.read(path)[0]
    replica = app.config.replica
    if replica.min_replicas != replica.max_replicas:
        raise ConfigError(
            "this config scales between replicas, so what one holds cannot be told; "
            "measure with min_replicas = max_replicas"
        )
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    http = document.get("http_options") or {}
    prefix = next(
        entry.get("route_prefix") or "/"
        for entry in document["applications"]
        if entry.get("name", "default") == app.name
    )
    host = str(http.get("host", "127.0.0.1")).replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    url = f"http://{host}:{http.get('port', 8000)}{prefix}".rstrip("/")
    return Served(url, app.name, replica.min_replicas, document)
