"""Which token this process sends to the Hub, and from where it came.

The only place that reads a token, and the only one that looks at the environment for it. What
counts is what huggingface_hub would send from this very process (`get_token_to_send`), unless
the config names a file or another variable. Faults that can be seen in the value are named
before any request, because the Hub answers a broken token like no token at all.

Nothing here calls `login()`: it would change the permissions of a shared HF_HOME.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OIDCError

from serve_app.access import notebook
from serve_app.access.verdict import Outcome, TokenReport
from serve_app.config import AccessConfig
from serve_app.redaction import sanitise

HUB_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
OIDC_VARIABLE = "HF_OIDC_RESOURCE"
NO_VALUE = frozenset({"none", "null", "nil", "undefined", "false", "changeme"})


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
        raise TypeError("a token does not leave its process")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why no usable token came out, said without its value."""

    outcome: Outcome
    message: str


@dataclass(frozen=True, slots=True)
class ResolvedToken:
    """What this process would send.

    Args:
        token: None sends no token at all.
        report: where it came from.
        fault: set if the configured or found token cannot be used; then `token` is None.
    """

    token: Token | None
    report: TokenReport
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    source: str
    raw: str


class _Unusable(Exception):
    """A source that must be used cannot be read."""

    def __init__(self, source: str, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.source = source
        self.fault = Fault(outcome, message)


def resolve_token(access: AccessConfig) -> ResolvedToken:
    """Find the token that this process sends, look at its shape, and name its rivals.

    `access.token_file` wins, then the variable `access.token_env` if it is another one than
    HF_TOKEN, then huggingface_hub's order, in which HF_TOKEN has its place. Files are read at
    every call, so a rotated secret is seen. May ask the network where huggingface_hub would:
    OIDC, OAuth refresh. From now on a crash of this process writes no core file.
    """
    write_no_core_file()
    try:
        found = _configured(access) or _implicit()
    except _Unusable as unusable:
        return ResolvedToken(None, TokenReport(unusable.source), unusable.fault)
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
    report = TokenReport(found.source, token.fingerprint, warnings=warnings)
    return ResolvedToken(token, report)


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


def _is_encoded(value: str) -> bool:
    """Return whether a value is a token in base64, once or several times over."""
    for _ in range(4):
        try:
            decoded = base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
            value = decoded.decode().strip()
        except ValueError:
            return False
        if value.startswith(("hf_", "api_org_")):
            return True
    return False


_QUOTES = "\"'`“”‘’"
_SHAPES: tuple[tuple[Callable[[str], object], str], ...] = (
    (lambda value: not value, "is empty"),
    (lambda value: "\n" in value or "\r" in value, "holds more than one line"),
    (lambda value: value[0] in _QUOTES or value[-1] in _QUOTES, "has quotes around it"),
    (lambda value: value.lower() in NO_VALUE, "is a word that means nothing was filled in"),
    (
        lambda value: re.match(r"(?i)(bearer|authorization:|token)\s", value),
        "starts with words of a header; only the token itself belongs there",
    ),
    (
        lambda value: re.match(r"(?i)(export\s+)?[a-z_]+\s*=", value),
        "is a whole assignment; only what follows the `=` belongs there",
    ),
    (lambda value: re.match(r"\$|<.*>$|\{\{", value), "is a placeholder that was not filled in"),
    (
        _is_encoded,
        "is base64 of a token: the Secret was encoded twice (its `data:` is base64 already; "
        "`stringData:` takes the token itself)",
    ),
    (lambda value: not value.isascii(), "has characters that no token has (not ASCII)"),
    (lambda value: re.search(r"[\s\x00-\x1f\x7f]", value), "has spaces or control characters"),
)


def shape_fault(value: str) -> str | None:
    """Say what is wrong with a value to look at, without repeating it; None if nothing is.

    Args:
        value: already without the white space around it, as huggingface_hub sends it.
    """
    return next((complaint for matches, complaint in _SHAPES if matches(value)), None)


def _configured(access: AccessConfig) -> _Found | None:
    if access.token_file is not None:
        source = f"file:{access.token_file}"
        raw = _read(Path(access.token_file).expanduser(), source)
        if raw is None:
            message = f"{access.token_file} (access.token_file) does not exist on this node"
            raise _Unusable(source, Outcome.NO_TOKEN, message)
        return _Found(source, raw)
    if access.token_env != HUB_VARIABLES[0]:
        raw = os.environ.get(access.token_env, "")
        if raw.strip():
            return _Found(f"env:{access.token_env}", raw)
    return None


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
    except (HfHubHTTPError, httpx2.HTTPError) as error:
        message = f"{OIDC_VARIABLE} is set, but the exchange failed: {type(error).__name__}"
        raise _Unusable("oidc", Outcome.HUB_UNREACHABLE, message) from None
    return _Found("oidc", sent or "")


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
    if access.token_file is not None:
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
