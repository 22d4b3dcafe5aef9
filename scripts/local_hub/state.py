"""What the Hub's three servers share: repositories, accounts, addresses, the log."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scripts.local_hub.behaviours import Accounts, Behaviour, Route, fingerprint
from scripts.local_hub.exchange import Publishers
from scripts.local_hub.repos import Repo
from scripts.local_hub.signing import Signer
from scripts.local_hub.wire import HubRequest, Origin, Request

if TYPE_CHECKING:
    from scripts.local_hub.mirrors import Mirror

QUOTAS = {"api": 1000, "resolvers": 5000}  # a free account's, per window
WINDOW_S = 300


@dataclass(frozen=True, slots=True)
class Renaming:
    """Where a renamed repository went; `origin` "" is a relative redirect, as the Hub's is."""

    repo_id: str
    origin: str


@dataclass(slots=True)
class State:
    """Everything that can change while the Hub runs."""

    signer: Signer
    repos: dict[str, Repo] = field(default_factory=dict)
    renamed: dict[str, Renaming] = field(default_factory=dict)
    accounts: Accounts = field(default_factory=Accounts)
    urls: dict[Origin, str] = field(default_factory=dict)
    closed_url: str = ""  # an address where nobody listens
    chunks_url: str = ""  # where the Xet store says that chunks lie; "" is the CDN
    dropped_headers: frozenset[str] = frozenset()  # in lower case; a mirror may lose some
    publishers: Publishers = field(default_factory=Publishers)
    mirror: Mirror | None = None  # answers in the Hub's place
    page_size: int = 1000
    outage: Behaviour | None = None
    log: list[HubRequest] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    started: float = field(default_factory=time.monotonic)
    _used: dict[tuple[str | None, str], int] = field(default_factory=dict)

    def record(self, request: Request, origin: Origin, route: Route) -> HubRequest:
        """Append one line to the log."""
        token = request.bearer
        entry = HubRequest(
            origin=origin,
            method=request.method,
            path=request.path,
            route=route,
            token=fingerprint(token) if token else None,
            range=request.headers.get("range"),
            authorization_leaked=self._leaks(request, origin),
            at_s=time.monotonic() - self.started,
        )
        with self.lock:
            self.log.append(entry)
        return entry

    def _leaks(self, request: Request, origin: Origin) -> bool:
        token = request.bearer
        if token is None or origin == "hub":
            return False
        # The CDN's permission is in its URL; the Xet store has short-lived tokens of its own.
        return origin == "cdn" or self.signer.admits(token) is None

    def rate_headers(self, token: str | None, route: Route) -> dict[str, str]:
        """Count a request and send the caller's quota, as every answer of the Hub does."""
        kind = "resolvers" if route is Route.resolve else "api"
        with self.lock:
            used = self._used[token, kind] = self._used.get((token, kind), 0) + 1
        return rate_headers(kind, left=max(1, QUOTAS[kind] - used), reset_s=WINDOW_S)


def rate_headers(kind: str, *, left: int, reset_s: int) -> dict[str, str]:
    """Write a quota the way huggingface_hub's `parse_ratelimit_headers` reads it."""
    return {
        "RateLimit": f'"{kind}";r={left};t={reset_s}',
        "RateLimit-Policy": f'"fixed window";"{kind}";q={QUOTAS[kind]};w={WINDOW_S}',
    }
