"""What the Hub answers to whom: one behaviour per recorded or quoted row of evidence.

Owns the words, codes and statuses of refusals and the accounts that hold tokens. A token's
value lives in `Accounts` only; everything that leaves it is the fingerprint.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum


class Behaviour(StrEnum):
    """How the Hub treats one token; values are the names on the command line."""

    granted = "granted"
    never_asked = "never_asked"
    pending = "pending"
    rejected = "rejected"
    reset = "reset"
    invalid = "invalid"  # unknown or revoked: on a gated file the same as no token
    expired = "expired"  # bare 401 everywhere, public repositories too
    fine_grained = "fine_grained"  # without "read access to public gated repositories"
    fine_grained_elsewhere = "fine_grained_elsewhere"  # scoped to another repository
    org_policy_pending = "org_policy_pending"
    org_policy_denied = "org_policy_denied"
    org_revoked = "org_revoked"
    disabled = "disabled"
    country_blocked = "country_blocked"  # the real text is not published; this one is made up
    auth_ok_files_denied = "auth_ok_files_denied"  # auth-check says OK, every file is refused
    cdn_denied = "cdn_denied"  # the Hub says 302, the bytes' origin says 403
    cdn_cut = "cdn_cut"  # the bytes stop halfway
    cdn_down = "cdn_down"  # the Hub says 302 to a port where nobody listens
    rate_limited = "rate_limited"
    server_error = "server_error"  # 5xx with an HTML page
    hang = "hang"  # takes the request and never answers
    garbage = "garbage"  # 200 with an HTML page, as a captive portal does
    not_http = "not_http"  # bytes that are no HTTP answer
    flaky = "flaky"  # the first answers fail, then all is granted


FAULTS = frozenset(
    {
        Behaviour.rate_limited,
        Behaviour.server_error,
        Behaviour.hang,
        Behaviour.garbage,
        Behaviour.not_http,
        Behaviour.flaky,
    }
)


class Route(StrEnum):
    """The kinds of requests; a fault can be limited to some of them."""

    exchange = "exchange"
    whoami = "whoami"
    info = "info"
    tree = "tree"
    auth_check = "auth-check"
    resolve = "resolve"
    xet_token = "xet-token"  # noqa: S105
    cdn = "cdn"
    cas = "cas"
    other = "other"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One refusing answer; `{id}` and `{name}` are filled in when it is sent."""

    status: int
    code: str | None
    message: str


BAD_CREDENTIALS = Refusal(401, None, "Invalid username or password.")
EXPIRED = Refusal(401, None, 'User Access Token "{name}" is expired')
REPO_NOT_FOUND = Refusal(404, "RepoNotFound", "Repository not found")
REVISION_NOT_FOUND = Refusal(404, "RevisionNotFound", "Invalid rev id: {name}")
ENTRY_NOT_FOUND = Refusal(404, "EntryNotFound", "Entry not found")
LOG_IN = Refusal(
    401,
    "GatedRepo",
    "Access to model {id} is restricted. You must have access to it and be authenticated to "
    "access it. Please log in.",
)
_FINE_GRAINED = Refusal(
    403,
    None,
    "Please enable access to public gated repositories in your fine-grained token settings to "
    "view this repository.",
)
_ORG_POLICY = Refusal(
    403,
    None,
    "Due to the organization token policy, your token needs to be approved by the organization "
    "before you can access this resource.",
)

GATE: dict[Behaviour, Refusal] = {
    Behaviour.never_asked: Refusal(
        403,
        "GatedRepo",
        "Access to model {id} is restricted and you are not in the authorized list. "
        "Visit https://huggingface.co/{id} to ask for access.",
    ),
    Behaviour.pending: Refusal(
        403,
        "GatedRepo",
        "Your request to access model {id} is awaiting a review from the repo authors.",
    ),
    Behaviour.rejected: Refusal(
        403,
        "GatedRepo",
        "Your request to access model {id} has been rejected by the repo's authors.",
    ),
    Behaviour.reset: Refusal(
        403,
        "GatedRepo",
        "Your request to access model {id} has been reset by the repo's authors. "
        "Visit https://huggingface.co/{id} to submit a new request.",
    ),
    Behaviour.invalid: LOG_IN,
    Behaviour.fine_grained: _FINE_GRAINED,
    Behaviour.fine_grained_elsewhere: _FINE_GRAINED,
    Behaviour.org_policy_pending: _ORG_POLICY,
    Behaviour.org_policy_denied: _ORG_POLICY,
    Behaviour.org_revoked: Refusal(
        403,
        None,
        "Your token has been revoked by the organization administrator, you can no longer access "
        "organization resources. Please contact them for more information.",
    ),
    Behaviour.disabled: Refusal(403, None, "Access to this resource is disabled."),
    Behaviour.country_blocked: Refusal(
        403, None, "This model is not available from your location."
    ),
}
READ_ONLY = Refusal(
    403,
    None,
    "You have read access but not the required permissions for this operation",
)
FILES_DENIED = Refusal(403, None, "Downloads of this content are blocked by an access policy.")


def fingerprint(value: str) -> str:
    """Name a token without its value: the first 8 hex digits of its SHA-256."""
    return hashlib.sha256(value.encode()).hexdigest()[:8]


@dataclass(slots=True)
class Account:
    """One token and how the Hub treats it now.

    Args:
        name: the user's name, as whoami gives it.
        behaviour: for every repository without its own entry in `by_repo`.
        on: limits a fault to these routes; elsewhere the token is granted. None is all.
        failures: answers of `flaky` that still fail.
        failure_status: what `flaky` (429 or 5xx) and `server_error` (5xx) answer.
        retry_after_s: what a 429 asks to wait.
        ends_at: seconds of time.monotonic() at which the token expires; None never.
    """

    name: str
    behaviour: Behaviour
    on: frozenset[Route] | None = None
    failures: int = 2
    failure_status: int = 503
    retry_after_s: int = 1
    ends_at: float | None = None
    by_repo: dict[str, Behaviour] = field(default_factory=dict)
    key: str = field(default_factory=lambda: secrets.token_hex(8))  # stands for it in signed URLs

    def toward(self, repo_id: str | None) -> Behaviour:
        """Return the behaviour for one repository."""
        return self.by_repo.get(repo_id, self.behaviour) if repo_id else self.behaviour

    def fault(self, route: Route, repo_id: str | None = None) -> Behaviour | None:
        """Return which fault strikes this request, counting down `flaky`."""
        behaviour = self.toward(repo_id)
        if behaviour not in FAULTS or (self.on is not None and route not in self.on):
            return None
        if behaviour is Behaviour.flaky:
            if self.failures <= 0:
                return None
            self.failures -= 1
        return behaviour


class Accounts:
    """All tokens the Hub knows. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_token: dict[str, Account] = {}
        self._by_key: dict[str, Account] = {}
        self.anonymous = Account("anonymous", Behaviour.granted)
        self._by_key[self.anonymous.key] = self.anonymous

    def add(self, token: str, account: Account) -> None:
        """Make a token known, or replace what was known about it."""
        with self._lock:
            self._by_token[token] = account
            self._by_key[account.key] = account

    def find(self, token: str | None) -> Account | None:
        """Return the account of a token value; None for an unknown value."""
        with self._lock:
            account = self.anonymous if token is None else self._by_token.get(token)
            if account and account.ends_at is not None and time.monotonic() >= account.ends_at:
                account.behaviour = Behaviour.expired
            return account

    def by_key(self, key: str) -> Account | None:
        """Return the account a signed URL was made for."""
        with self._lock:
            return self._by_key.get(key)

    def knows(self, token: str) -> bool:
        """Return whether a value is a token of this Hub, whatever its behaviour."""
        with self._lock:
            return token in self._by_token

    def fault(self, account: Account, route: Route, repo_id: str | None) -> Behaviour | None:
        """Return which fault strikes this request; one request at a time counts `flaky` down."""
        with self._lock:
            return account.fault(route, repo_id)

    def change(
        self,
        account: Account,
        behaviour: Behaviour,
        *,
        repo_id: str | None = None,
        on: Collection[Route] | None = None,
        failures: int | None = None,
    ) -> None:
        """Switch a behaviour while the Hub runs, for all repositories or for one."""
        with self._lock:
            if repo_id is None:
                account.behaviour = behaviour
            else:
                account.by_repo[repo_id] = behaviour
            account.on = None if on is None else frozenset(on)
            if failures is not None:
                account.failures = failures
