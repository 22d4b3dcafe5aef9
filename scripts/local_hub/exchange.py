"""`POST /oauth/token`: an identity token of a trusted publisher for a token of the Hub (RFC 8693).

It judges by the claims alone and verifies no signature: who may reach the loopback interface may
say who he is.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from scripts.local_hub.behaviours import Account, Behaviour

AUDIENCE = "https://huggingface.co"
SKEW_S = 60.0  # by which the clock of an issuer may be ahead
_GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
_ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"  # noqa: S105


@dataclass(frozen=True, slots=True)
class Publisher:
    """Who may exchange an identity token for what.

    Args:
        issuer: the `iss` claim.
        subject: the `sub` claim.
        account: the user that the token acts as.
        behaviour: how the Hub treats the token.
        lifetime_s: for which it holds.
    """

    issuer: str
    subject: str
    account: str = "alice"
    behaviour: Behaviour = Behaviour.granted
    lifetime_s: float = 3600


@dataclass(slots=True)
class Publishers:
    """The trusted publishers of every resource: `NAME`, or `OWNER/NAME`."""

    audience: str = AUDIENCE
    clock_ahead_s: float = 0.0  # of the Hub
    by_resource: dict[str, list[Publisher]] = field(default_factory=dict)
    _issued: dict[str, Account] = field(default_factory=dict)

    def trust(self, resource: str, publisher: Publisher) -> None:
        """Let a publisher exchange its identity tokens for a resource."""
        self.by_resource.setdefault(resource, []).append(publisher)

    def account_of(self, token: str) -> Account:
        """Return the account of a token that was issued a moment ago, once."""
        return self._issued.pop(token)

    def answer(self, method: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return status and JSON of an exchange."""
        try:
            asked = json.loads(body)
            claims = _claims(asked["subject_token"])
            resource = asked["resource"]
            is_right = (asked["grant_type"], asked["subject_token_type"]) == (_GRANT, _ID_TOKEN)
        except (ValueError, LookupError, TypeError):
            is_right = False
        if not is_right or method != "POST":
            return _no("invalid_request", "The request is not a token exchange")
        publishers = self.by_resource.get(resource)
        if publishers is None:
            return _no("invalid_target", "The resource has no trusted publisher")
        if fault := self._fault(claims):
            return _no("invalid_grant", fault)
        identity = (claims.get("iss"), claims.get("sub"))
        for publisher in publishers:
            if (publisher.issuer, publisher.subject) == identity:
                return 200, self._issue(publisher)
        return _no("invalid_grant", "No trusted publisher matches the claims of the token")

    def _fault(self, claims: dict[str, Any]) -> str | None:
        now = time.time() + self.clock_ahead_s
        if claims.get("aud") not in (self.audience, [self.audience]):
            return "The audience of the token is not the Hub"
        if claims.get("exp", 0) <= now:
            return "The token is expired"
        if claims.get("nbf", claims.get("iat", 0)) > now + SKEW_S:
            return "The token is not valid yet"
        return None

    def _issue(self, publisher: Publisher) -> dict[str, Any]:
        token = "hf_oauth_" + secrets.token_urlsafe(32)
        ends_at = time.monotonic() + publisher.lifetime_s
        self._issued[token] = Account(publisher.account, publisher.behaviour, ends_at=ends_at)
        return {
            "access_token": token,
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
            "token_type": "bearer",
            "expires_in": publisher.lifetime_s,
            "scope": "gated-repos",
        }


def identity_token(issuer: str, subject: str, *, lifetime_s: float = 600, **claims: Any) -> str:
    """Make an unsigned identity token; `claims` add to the usual ones or replace them."""
    now = time.time()
    usual = {"iss": issuer, "sub": subject, "aud": [AUDIENCE], "iat": now, "nbf": now}
    whole = {**usual, "exp": now + lifetime_s, "jti": secrets.token_hex(8), **claims}
    parts = [json.dumps(part).encode() for part in ({"alg": "none", "typ": "JWT"}, whole)]
    encoded = [base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts]
    return ".".join((*encoded, secrets.token_urlsafe(32)))


def _claims(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return dict(claims)


def _no(error: str, description: str) -> tuple[int, dict[str, Any]]:
    return 400, {"error": error, "error_description": description}
