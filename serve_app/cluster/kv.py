"""Ray's key-value store: small facts that outlive the process that wrote them.

Every name in it is ours, in one namespace. The store lives in the head node's memory; it ends
with the cluster.

    history/              what was decided, and when   telemetry/rollout_history.py
    coldstart/, phase/    starts of replicas           telemetry/cold_start.py
    weights/              which node has which commit  weights/announcements.py
    changed/              whose token changed          access/file_watch.py
    watch/, verdict/      who keeps the watch, and what it found   deployments/shared_watch.py
    canary/               who is tried, and how it does deployments/canary.py
    license/, window/     what replicas found          deployments/status.py
    keys/                 what API keys used lately    deployments/key_exchange.py
"""

from __future__ import annotations

from ray.experimental import internal_kv

NAMESPACE = "serve_app"


def get(key: str) -> bytes | None:
    """Return a key's value; None without one.

    Raises:
        RayError: the store does not answer; so do all functions here.
    """
    value: bytes | None = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
    return value


def put(key: str, value: str, *, overwrite: bool = True) -> bool:
    """Write a key; False if it was there already, and stays as it is unless `overwrite`."""
    return not internal_kv._internal_kv_put(key, value, overwrite, namespace=NAMESPACE)


def delete(key: str) -> None:
    """Remove a key, if it is there."""
    internal_kv._internal_kv_del(key, namespace=NAMESPACE)


def keys(prefix: str) -> list[str]:
    """Return the keys that begin with a prefix, sorted."""
    found = internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)
    return sorted(key.decode() for key in found)
