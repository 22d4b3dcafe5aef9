"""A connection to a cluster, made only to one that was named and for as long as it is needed."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray._private.services import get_ray_address_from_environment
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import RayError

from serve_app.cluster.placement import Placement
from serve_app.errors import ConfigError
from serve_app.redaction import sanitise

CONNECT_TIMEOUT_S = 5.0


@contextmanager
def connected(
    placement: Placement, job_env: Mapping[str, Any], address: str | None
) -> Iterator[Placement | None]:
    """Connect to a cluster, unless this process is connected already.

    Args:
        placement: where replicas go and in which environment.
        job_env: the application's part of that environment; a job of its own carries it,
            because only a job may upload a local working directory.
        address: of the cluster; None takes RAY_ADDRESS, or what `ray start` recorded here.

    Yields:
        The placement with the environment that tasks have to ask for; None where no cluster is
        named in any of these ways.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield placement
        return
    found = find_cluster(address)
    if found is None:
        yield None
        return
    # What the job has its tasks inherit; asked for again, Ray would build it a second time.
    with _session(found, dict(job_env) or None):
        asked = placement.runtime_env.items()
        rest = {key: value for key, value in asked if job_env.get(key) != value}
        yield replace(placement, runtime_env=rest)


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """Connect to a running cluster, unless this process is connected already.

    Args:
        address: of the cluster; None takes RAY_ADDRESS, or what `ray start` recorded here.

    Raises:
        ConfigError: there is no cluster at the address, or none is named in any of these ways.
    """
    if ray.is_initialized():
        yield
        return
    found = find_cluster(address)
    if found is None:
        raise ConfigError("no Ray cluster is running here; name one with --address")
    with _session(found):
        yield


@contextmanager
def _session(address: str, runtime_env: dict[str, Any] | None = None) -> Iterator[None]:
    try:
        ray.init(
            address=address,
            runtime_env=runtime_env,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {address}: {sanitise(str(error))}") from None
    try:
        yield
    finally:
        ray.shutdown()


def find_cluster(address: str | None) -> str | None:
    """Find the cluster to connect to, and make sure that it answers.

    Never `auto`: that takes whatever Ray process runs on the machine, also somebody else's.

    Args:
        address: as given by a person; None takes RAY_ADDRESS, or what `ray start` recorded.

    Returns:
        Its address; None if none was given and none is known to run.

    Raises:
        ConfigError: a cluster was named and does not answer, or does not let this process in.
    """
    found = address or get_ray_address_from_environment(None, None)  # type: ignore[arg-type]
    if not found:
        return None
    if "://" in found:  # Ray Client, which has a limit of its own
        return str(found)
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        raise ConfigError(f"no Ray cluster answers at {found}") from None
    answered: list[bool] = []
    # `ray.init` would try for minutes, and neither it nor this can be interrupted.
    thread = threading.Thread(target=lambda: answered.append(_greet(found)), daemon=True)
    thread.start()
    thread.join(CONNECT_TIMEOUT_S)
    # A refusal, silence and another program on the port look alike from here.
    if answered != [True]:
        raise ConfigError(
            f"{found} is no Ray cluster that lets this process in (authentication token?)"
        )
    return str(found)


def _greet(address: str) -> bool:
    try:
        GcsClient(address=address)
    except (RayError, RuntimeError, ValueError, ConnectionError):
        return False
    return True
