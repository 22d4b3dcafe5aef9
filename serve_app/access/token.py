"""Which token this process sends to the Hub, and from where it came.

The only place that reads a stored token, and the only one that looks at the environment for it.
What counts is what huggingface_hub would send from this very process (`get_token_to_send`), unless
the config names a file, another variable or an identity (`identity.py`). Faults that can be seen
in the value (`shape.py`) are named before any request, because the Hub answers a broken token
like no token at all.

Nothing here calls `login()`: it would change the permissions of a shared HF_HOME.
"""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OIDCError

from serve_app.access import notebook
from serve_app.access.hub.exchange import REFUSALS, Refused, words_of
from serve_app.access.identity import Identity, claims_of, proven_identity, refusal
from serve_app.access.shape import shape_fault
from serve_app.access.verdict import Outcome, TokenReport
from serve_app.access_config import IdentityConfig
from serve_app.config import AccessConfig
from serve_app.redaction import sanitise

HUB_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
OIDC_VARIABLE, ID_TOKEN_VARIABLE = "HF_OIDC_RESOURCE", "HF_OIDC_ID_TOKEN"


class Token:
    """A token's value, which neither prints nor pickles.

    Args:
        value: the value, already clean.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value, for the one header it belongs in."""
        return self._value

    @property
    def fingerprint(self) -> str:
        """The first 8 hex digits of the value's SHA-256: names it without its value."""
        return fingerprint(self._value)

    def __repr__(self) -> str:
        return f"Token({self.fingerprint})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Token is not pickled: its value goes to no other process of the cluster")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why no usable token came out, said without its value."""

    outcome: Outcome
    message: str
    status: int | None = None
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class ResolvedToken:
    """What this process would send.

    Args:
        token: None sends no token at all.
        report: where it came from.
        fault: set if the configured or found token cannot be used; then `token` is None.
        requests: to the Hub, that it took to get it.
    """

    token: Token | None
    report: TokenReport
    fault: Fault | None = None
    requests: int = 0


@dataclass(frozen=True, slots=True)
class _Found:
    source: str
    raw: str
    identity: Identity | None = None
    requests: int = 0


class _Unusable(Exception):
    """A source that must be used cannot be read."""

    def __init__(self, source: str, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.source = source
        self.fault = Fault(outcome, message)
        self.requests = 0


def resolve_token(access: AccessConfig) -> ResolvedToken:
    """Find the token that this process sends, look at its shape, and name its rivals.

    `access.identity` or `token_file` wins, then the variable `access.token_env` if it is another
    one than HF_TOKEN, then huggingface_hub's order, in which HF_TOKEN has its place. Files are
    read at every call, so a rotated secret is seen. May ask the network: for an exchange, and
    where huggingface_hub would (OIDC, OAuth refresh). From now on a crash of this process writes
    no core file.
    """
    # Before a value is read: a crash dump would hold it.
    write_no_core_file()
    try:
        found = _configured(access) or _implicit()
    except _Unusable as unusable:
        report = TokenReport(unusable.source)
        return ResolvedToken(None, report, unusable.fault, unusable.requests)
    if found is None:
        notes = (*_unused(access), *notebook.reasons())
        return ResolvedToken(None, TokenReport(warnings=notes))
    value = found.raw.strip()
    complaint = shape_fault(value)
    if complaint is not None:
        fault = Fault(Outcome.MALFORMED_TOKEN, f"the token from {found.source} {complaint}")
        return ResolvedToken(None, TokenReport(found.source), fault)
    warnings = (*_unused(access), *_conflicts(found.source, value))
    token = Token(value)
    report = _report(found, token, warnings)
    return ResolvedToken(token, report, requests=found.requests)


def _report(found: _Found, token: Token, warnings: tuple[str, ...]) -> TokenReport:
    """Say whose token it is: an exchanged one, by the identity that stays when it is renewed."""
    identity = found.identity
    if identity is None:
        return TokenReport(found.source, token.fingerprint, warnings=warnings)
    kind, _, name = identity.resource.partition("/")
    account = name if kind == "user" else None
    return TokenReport(found.source, identity.fingerprint, account, warnings, str(identity))


def write_no_core_file() -> None:
    """Keep a crash from putting what this process knows on a disk, or into a crash collector.

    No file fits into one byte, and Linux starts no collector (`core_pattern` with a pipe) at this
    very limit, while it does at 0: core(5). The limit can be raised again by hand.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0 if hard == 0 else 1, hard))


def fingerprint(value: str) -> str:
    """Name a value by the first 8 hex digits of its SHA-256."""
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _configured(access: AccessConfig) -> _Found | None:
    if access.identity is not None:
        return _of_identity(access, access.identity)
    if access.token_file is not None:
        source = f"file:{access.token_file}"
        raw = _read(Path(access.token_file).expanduser(), source)
        if raw is None:
            message = f"{access.token_file} (access.token_file) does not exist on this node"
            raise _Unusable(source, Outcome.NO_TOKEN, message)
        return _Found(source, raw)
    # HF_TOKEN is left to huggingface_hub's own order below, so that both send the same.
    if access.token_env != HUB_VARIABLES[0]:
        raw = os.environ.get(access.token_env, "")
        if raw.strip():
            return _Found(f"env:{access.token_env}", raw)
    return None


def _of_identity(access: AccessConfig, named: IdentityConfig) -> _Found:
    source = f"identity:{named.token_file}"
    try:
        proven = proven_identity(access, named)
    except Refused as refused:
        unusable = _Unusable(source, refused.outcome, refused.message)
        unusable.fault = replace(unusable.fault, status=refused.status, remedy=refused.remedy)
        unusable.requests = refused.requests
        raise unusable from None
    return _Found(source, proven.value, proven.identity, proven.requests)


def _implicit() -> _Found | None:
    """Follow huggingface_hub 2.4's order, to name the source of what it sends."""
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    if os.environ.get(OIDC_VARIABLE):
        return _exchanged()
    # HF_TOKEN=" " hides HUGGING_FACE_HUB_TOKEN in huggingface_hub, an empty one does not.
    name = next((name for name in HUB_VARIABLES if os.environ.get(name)), None)
    if name is not None and os.environ[name].strip():
        return _Found(f"env:{name}", os.environ[name])
    source = f"file:{constants.HF_TOKEN_PATH}"
    raw = _read(Path(constants.HF_TOKEN_PATH), source)
    # huggingface_hub glues lines together, which would hide that two tokens are in the file.
    sent = None if raw is None or _lines(raw) > 1 else get_token()  # may refresh it
    if sent is not None:
        return _Found(source if raw and raw.strip() else "colab", sent)
    return _Found(source, raw) if raw and raw.strip() else None


def _exchanged() -> _Found:
    try:
        sent = get_token()
    except OIDCError as error:
        message = f"{OIDC_VARIABLE} is set, but no token came of it: {sanitise(str(error))}"
        raise _Unusable("oidc", Outcome.NO_TOKEN, message) from None
    except HfHubHTTPError as error:
        raise _refused_exchange(error) from None
    except httpx2.HTTPError as error:
        message = f"{OIDC_VARIABLE} is set, but the exchange failed: {type(error).__name__}"
        raise _Unusable("oidc", Outcome.HUB_UNREACHABLE, message) from None
    issuer, subject = (_text(_oidc_claims().get(name)) for name in ("iss", "sub"))
    if not (issuer or subject):  # minted inside huggingface_hub, on GitHub, which says whose it is
        issuer, subject = "github", os.environ.get("GITHUB_WORKFLOW_REF", "")
    return _Found("oidc", sent or "", Identity(os.environ[OIDC_VARIABLE], issuer, subject))


def _oidc_claims() -> dict[str, Any]:
    return claims_of(os.environ.get(ID_TOKEN_VARIABLE, "").strip()) or {}


def _text(claim: Any) -> str:
    return claim if isinstance(claim, str) else ""


def _refused_exchange(error: HfHubHTTPError) -> _Unusable:
    """Distinguish a no from an answer that did not come, as for an identity of our own."""
    status = error.response.status_code
    if status not in REFUSALS:
        message = f"{OIDC_VARIABLE} is set, but the exchange failed: {type(error).__name__}"
        return _Unusable("oidc", Outcome.HUB_UNREACHABLE, message)
    resource, claims = os.environ[OIDC_VARIABLE], _oidc_claims()
    message = refusal(resource, words_of(error.response.content), status, claims)
    unusable = _Unusable("oidc", Outcome.IDENTITY_REFUSED, message)
    unusable.fault = replace(unusable.fault, status=status)
    return unusable


def _lines(raw: str) -> int:
    return len(raw.strip().splitlines())


def _read(path: Path, source: str) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        complaint = f"{path} is a directory; name the file in it (a secret mounts as a folder)"
    except PermissionError:
        complaint = f"{path} may not be read by this process's user"
    except UnicodeDecodeError:
        complaint = f"{path} is not a text file"
    except OSError as error:
        complaint = f"{path} cannot be read: {error.strerror}"
    raise _Unusable(source, Outcome.MALFORMED_TOKEN, complaint)


def _unused(access: AccessConfig) -> Iterator[str]:
    """Name what a person may believe to be in use and is not."""
    if access.token_file is not None or access.identity is not None:
        return
    named = access.token_env
    if named != HUB_VARIABLES[0] and not os.environ.get(named, "").strip():
        yield f"access.token_env names {named}, which is not set on this node"
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        yield "HF_HUB_DISABLE_IMPLICIT_TOKEN is set, so huggingface_hub sends no token it finds"
    blank = os.environ.get(HUB_VARIABLES[0])
    if blank and not blank.strip():
        yield "HF_TOKEN holds only spaces, which hides HUGGING_FACE_HUB_TOKEN"


def _conflicts(source: str, value: str) -> Iterator[str]:
    """Name every other token of this process that is not the one in use."""
    for name in HUB_VARIABLES:
        other = os.environ.get(name, "").strip()
        if other and source != f"env:{name}" and other != value:
            yield f"{source} is used; {name} holds a different token"
    stored = f"file:{constants.HF_TOKEN_PATH}"
    other = _peek(Path(constants.HF_TOKEN_PATH))
    if other and source != stored and other != value:
        yield f"{source} is used; the stored login in {constants.HF_TOKEN_PATH} is different"
    if any(other != value for other in _git_passwords()):
        yield f"{source} is used; git has a different token stored for huggingface.co"


def _peek(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _git_passwords() -> Iterator[str]:
    """Read the credentials that `git credential-store` keeps for the Hub."""
    for line in _peek(Path("~/.git-credentials").expanduser()).splitlines():
        try:
            parts = urlsplit(line.strip())
            if parts.hostname in ("huggingface.co", "hf.co") and parts.password:
                yield parts.password
        except ValueError:
            continue
