"""How the nodes of a cluster reach each other beside Ray: address and certificates."""

from __future__ import annotations

import os
import ssl

import ray


def node_address() -> str:
    """Return this node's address in the cluster's network."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def server_context() -> ssl.SSLContext | None:
    """Return how to accept connections of other nodes; None where Ray itself uses no TLS."""
    return _context(ssl.Purpose.CLIENT_AUTH)


def client_context() -> ssl.SSLContext | None:
    """Return how to connect to other nodes; None where Ray itself uses no TLS."""
    return _context(ssl.Purpose.SERVER_AUTH)


def _context(purpose: ssl.Purpose) -> ssl.SSLContext | None:
    """Follow Ray's own variables: both ends have a certificate of the same authority."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    context = ssl.create_default_context(purpose, cafile=os.environ["RAY_TLS_CA_CERT"])
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    context.check_hostname = False  # nodes are addressed by IP, which few such certificates name
    context.verify_mode = ssl.CERT_REQUIRED
    return context
