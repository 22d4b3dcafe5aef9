"""Who this process is by an identity token, and the Hub token that it was exchanged for.

The identity token is a JWT that somebody else keeps fresh in a file, such as the kubelet in a
projected volume. It is read at every question for a token; what came of an exchange is kept in
this process's memory alone, until shortly before its end or until the file holds another one.

Resource, issuer and subject are the identity: their hash stands for it in receipts and tables, so
a renewed token is the same identity, and two nodes with the same one are said to have the same.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants, is_offline_mode

from serve_app.access.hub.client import Failed
from serve_app.access.hub.exchange import Exchanged, Refused, exchange
from serve_app.access.verdict import Outcome
from serve_app.access_config import AccessConfig, IdentityConfig
from serve_app.endpoint import check_endpoint, is_plain_http
from serve_app.redaction import sanitise

TOKEN_BYTES = 64 << 10
MARGIN_S = 300.0  # before a token's end from which on it is renewed
MARGIN_SHARE = 0.2  # likewise, of the lifetime of one that is short
SHOWN_CLAIMS = ("iss", "sub", "aud")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who somebody is to the Hub: plain data, no secret.

    Args:
        resource: what access is asked for.
        issuer: who says so.
        subject: whom it says it of.
    """

    resource: str
    issuer: str
    subject: str

    @property
    def fingerprint(self) -> str:
        """The first 8 hex digits of the SHA-256 of all three."""
        text = json.dumps([self.resource, self.issuer, self.subject])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]

    def __str__(self) -> str:
        return sanitise(f"{self.subject} of {self.issuer} as {self.resource}", limit=300)


@dataclass(frozen=True, slots=True)
class Proven:
    """What an exchange, now or before, came to.

    Args:
        value: the Hub token.
        identity: whose it is.
        requests: to the Hub, that it took this time.
    """

    value: str = field(repr=False)
    identity: Identity
    requests: int = 0


@dataclass(frozen=True, slots=True)
class _Held:
    value: str = field(repr=False)
    renew_at: float  # of time.monotonic()


_HELD: dict[tuple[str, str, str], _Held] = {}  # by endpoint, resource, hash of the identity token
_LOCK = threading.Lock()


def proven_identity(access: AccessConfig, named: IdentityConfig) -> Proven:
    """Return a token for the identity whose file the config names.

    Raises:
        Refused: no token came of it; says why, with the claims that the Hub judges by.
    """
    endpoint = _endpoint(access)
    raw = _read(Path(named.token_file).expanduser(), named.token_file)
    claims = claims_of(raw)
    if claims is None:
        message = f"{named.token_file} (access.identity.token_file) holds no identity token (JWT)"
        raise _refused(Outcome.MALFORMED_TOKEN, message)
    identity = _identity(named, claims)
    if named.audience not in _audiences(claims):
        message = f"the identity token is not for {named.audience} (access.identity.audience)"
        raise _refused(Outcome.IDENTITY_REFUSED, f"{message}; it has {shown(claims)}")
    key = (endpoint, named.resource, hashlib.sha256(raw.encode()).hexdigest())
    with _LOCK:
        held = _HELD.get(key)
        if held is not None and time.monotonic() < held.renew_at:
            return Proven(held.value, identity)
        try:
            resource = named.resource.partition("/")[2]
            found = exchange(endpoint, raw, resource, timeout_s=access.timeout_s)
        except Refused as refused:
            raise _explained(refused, named.resource, claims) from None
        _hold(key, found)
    return Proven(found.value, identity, found.requests)


def forget(value: str) -> None:
    """Keep a token no longer that the Hub does not know any more, before its end."""
    with _LOCK:
        for key in [key for key, held in _HELD.items() if held.value == value]:
            del _HELD[key]


def identity_here(named: IdentityConfig) -> Identity | None:
    """Return who this node is by its file, which nobody has verified; None if it holds none."""
    try:
        claims = claims_of(_read(Path(named.token_file).expanduser(), named.token_file))
    except Refused:
        return None
    return None if claims is None else _identity(named, claims)


def claims_of(token: str) -> dict[str, Any] | None:
    """Return the claims in a JWT, which nobody has verified; None if it is none."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        padded = parts[1] + "=" * (-len(parts[1]) % 4)
        claims = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None


def shown(claims: Mapping[str, Any]) -> str:
    """Return the claims that identify, by name and value, and whether the token has ended here."""
    parts = [f"{name} {_text(claims.get(name)) or '(none)'}" for name in SHOWN_CLAIMS]
    ends = claims.get("exp")
    if isinstance(ends, int | float) and ends < time.time():
        parts.append(f"and ended {time.time() - ends:.0f} s ago by this node's clock")
    starts = claims.get("nbf", claims.get("iat"))
    if isinstance(starts, int | float) and starts > time.time():
        parts.append(f"and begins in {starts - time.time():.0f} s by this node's clock")
    return sanitise(", ".join(parts), limit=500)


def refusal(resource: str, words: str, status: int | None, claims: Mapping[str, Any]) -> str:
    """Say that an exchange was refused: the Hub's words, and by which claims it judged."""
    said = f"{status}: {words}" if words else str(status)
    text = f"the exchange for {resource} was refused ({said}); the identity token has"
    return sanitise(f"{text} {shown(claims)}", limit=900)


def _identity(named: IdentityConfig, claims: Mapping[str, Any]) -> Identity:
    return Identity(named.resource, _text(claims.get("iss")), _text(claims.get("sub")))


def _hold(key: tuple[str, str, str], found: Exchanged) -> None:
    now = time.monotonic()
    for old in [old for old, held in _HELD.items() if held.renew_at <= now]:
        del _HELD[old]
    margin_s = min(MARGIN_S, found.lifetime_s * MARGIN_SHARE)
    _HELD[key] = _Held(found.value, now + found.lifetime_s - margin_s)


def _endpoint(access: AccessConfig) -> str:
    try:
        endpoint = check_endpoint(access.endpoint or constants.ENDPOINT)
    except ValueError as error:
        raise _refused(Outcome.HUB_UNREACHABLE, f"HF_ENDPOINT {error}") from None
    if is_plain_http(endpoint) and not access.allow_http:
        message = "the Hub's URL is plain http, which would send the identity token in clear text"
        raise _refused(Outcome.HUB_UNREACHABLE, message)
    if is_offline_mode():
        message = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set here, so nothing is exchanged"
        raise _refused(Outcome.HUB_UNREACHABLE, message)
    return endpoint


def _read(path: Path, name: str) -> str:
    try:
        with path.open("rb") as stream:
            raw = stream.read(TOKEN_BYTES + 1)
    except FileNotFoundError:
        message = f"{name} (access.identity.token_file) does not exist on this node"
        raise _refused(Outcome.NO_TOKEN, message, _REMEDY) from None
    except OSError as error:
        message = f"{name} (access.identity.token_file) cannot be read: {error.strerror}"
        raise _refused(Outcome.NO_TOKEN, message, _REMEDY) from None
    return raw.decode("ascii", "replace").strip() if len(raw) <= TOKEN_BYTES else ""


_REMEDY = (
    "Mount the identity token where access.identity.token_file says, on every node: a projected "
    "volume with the audience https://huggingface.co (configs/kubernetes/keyless)."
)


def _refused(outcome: Outcome, message: str, remedy: str | None = None) -> Refused:
    return Refused(Failed(outcome, sanitise(message, limit=900), remedy=remedy), requests=0)


def _explained(refused: Refused, resource: str, claims: Mapping[str, Any]) -> Refused:
    message = f"the exchange for {resource} failed: {refused.message}"
    if refused.outcome is Outcome.IDENTITY_REFUSED:
        message = refusal(resource, refused.words, refused.status, claims)
    failed = Failed(
        refused.outcome, message, status=refused.status, host=refused.host, remedy=refused.remedy
    )
    return Refused(failed, requests=refused.requests, words=refused.words)


def _text(claim: Any) -> str:
    if isinstance(claim, list):
        return " ".join(_text(each) for each in claim)
    return sanitise(claim, limit=200) if isinstance(claim, str) else ""


def _audiences(claims: Mapping[str, Any]) -> list[Any]:
    found = claims.get("aud")
    return found if isinstance(found, list) else [found]
