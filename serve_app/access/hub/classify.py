"""What an answer of the Hub means. Pure: answers in, outcomes out, no network.

The error code in the headers decides first, the Hub's exact words second, the status last;
words that nobody has seen before block and are shown verbatim. One table, in the order of the
evidence: recorded answers of huggingface.co, and huggingface_hub 2.4's `hf_raise_for_status`.
`Outcome.GRANTED` is none of its results: access is proven by bytes, see `steps.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from serve_app.access.verdict import Outcome
from serve_app.checkpoint.headers import HEADER_BYTES
from serve_app.redaction import sanitise


class Step(StrEnum):
    """The question that an answer belongs to; the words stand in messages."""

    DESCRIPTION = "model description"
    LICENSE = "license text"
    CONFIG = "config.json"
    LISTING = "list of files"
    SIGNATURE = "signature"
    INDEX = "weights index"
    WEIGHTS = "weights file"
    BYTES = "first bytes of the weights"
    XET_TOKEN = "storage token"  # noqa: S105
    XET_STORE = "storage query"
    XET_BYTES = "first bytes from the storage"
    WHOAMI = "account"
    EXCHANGE = "token exchange"


STORAGE = frozenset({Step.BYTES, Step.XET_STORE, Step.XET_BYTES})


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer, cut to what matters.

    Args:
        step: the question.
        status: HTTP status.
        headers: names in lower case.
        body: at most the first bytes that were wanted.
        url: where it came from, after redirects.
    """

    step: Step
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    url: str = ""

    @property
    def code(self) -> str:
        """The Hub's error code; empty without one."""
        return self.headers.get("x-error-code", "")

    @property
    def words(self) -> str:
        """What the answer says in words, sanitised: header, JSON error, or the page's text."""
        return sanitise(self.headers.get("x-error-message") or self._body_words())

    @property
    def is_ok(self) -> bool:
        """Return whether the status is a success."""
        return 200 <= self.status < 300

    def payload(self) -> Any:
        """Return the JSON body; None if it is no JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    def _body_words(self) -> str:
        payload = self.payload()
        if isinstance(payload, dict):
            return _stated(payload)
        if payload is not None:
            return ""
        text = self.body[:4096].decode("utf-8", "replace")
        return re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", text)


def _stated(payload: dict[str, Any]) -> str:
    """Return the words of a JSON error: the Hub's `error`, or Artifactory's list of `errors`."""
    if isinstance(payload.get("error"), str):
        return str(payload["error"])
    errors = payload.get("errors")
    listed = errors if isinstance(errors, list) else []
    words = [each.get("message") for each in listed if isinstance(each, dict)]
    return "; ".join(word for word in words if isinstance(word, str))


@dataclass(frozen=True, slots=True)
class Caller:
    """What is known of who asks; a refusal without a token means another thing.

    Args:
        has_token: whether a token was sent.
        of_mirror: whether a mirror is asked, whose bare 401 is about itself.
    """

    has_token: bool
    of_mirror: bool = False


_Match = Callable[[Answer, Caller], object]


def _code(code: str) -> _Match:
    return lambda answer, _caller: answer.code == code


def _gate(words: str) -> _Match:
    """Match a refusal of the gate; its words say which of its states."""
    return lambda answer, _caller: answer.code == "GatedRepo" and words in answer.words


def _status(*statuses: int, words: str = "") -> _Match:
    return lambda answer, _caller: (
        answer.status in statuses and words.lower() in answer.words.lower()
    )


def _unauthorized(*, has_token: bool, code: str | None = None) -> _Match:
    return lambda answer, caller: (
        answer.status == 401
        and caller.has_token is has_token
        and (code is None or answer.code == code)
    )


RULES: tuple[tuple[_Match, Outcome], ...] = (
    (_status(429), Outcome.RATE_LIMITED),
    (lambda answer, _: answer.step in STORAGE, Outcome.WEIGHTS_UNREACHABLE),
    (lambda answer, _: answer.status >= 500, Outcome.HUB_UNREACHABLE),
    (_status(407, 408), Outcome.HUB_UNREACHABLE),
    (_code("RevisionNotFound"), Outcome.REVISION_NOT_FOUND),
    (_code("EntryNotFound"), Outcome.WEIGHTS_MISSING),
    (
        lambda answer, _: answer.words == "Access to this resource is disabled.",
        Outcome.REPO_DISABLED,
    ),
    (_status(401, words="is expired"), Outcome.EXPIRED_TOKEN),
    (_unauthorized(has_token=True), Outcome.INVALID_TOKEN),
    (_unauthorized(has_token=False, code="GatedRepo"), Outcome.NO_TOKEN),
    (
        lambda answer, caller: (
            answer.status == 401
            and not caller.has_token
            and (caller.of_mirror or answer.step is not Step.DESCRIPTION)
        ),
        Outcome.NO_TOKEN,
    ),
    # A repository that does not exist, or is private, when nobody in particular asks.
    (_unauthorized(has_token=False), Outcome.REPO_NOT_FOUND),
    (_gate("awaiting a review"), Outcome.REQUEST_PENDING),
    (_gate("has been rejected"), Outcome.REQUEST_REJECTED),
    (_gate("has been reset"), Outcome.REQUEST_RESET),
    (_code("GatedRepo"), Outcome.LICENSE_NOT_ACCEPTED),
    (_code("RepoNotFound"), Outcome.REPO_NOT_FOUND),
    (_status(403, words="in your fine-grained token settings"), Outcome.TOKEN_SCOPE),
    (_status(403, words="organization token policy"), Outcome.ORG_POLICY),
    (_status(403, words="revoked by the organization"), Outcome.ORG_POLICY),
    (_status(403, 451), Outcome.CONTENT_BLOCKED),
)


def classify(answer: Answer, caller: Caller) -> Outcome:
    """Return the one meaning of an answer that did not have what was asked for."""
    for matches, outcome in RULES:
        if matches(answer, caller):
            return outcome
    if answer.is_ok and answer.payload() is None:
        return Outcome.HUB_UNREACHABLE  # a captive portal or a proxy answers in its place
    return Outcome.UNKNOWN


def holds_weights(answer: Answer, size: int | None) -> bool:
    """Return whether an answer is the beginning of a safetensors file.

    The format begins with the length of its JSON header, 8 bytes little endian, and the
    header's opening brace.

    Args:
        answer: to a range request for at least the first 9 bytes.
        size: what the Hub says the file's size is, if it does.
    """
    if answer.status not in (200, 206) or len(answer.body) < 9 or answer.body[8:9] != b"{":
        return False
    header = int.from_bytes(answer.body[:8], "little")
    stated = total_bytes(answer)
    if size is not None and stated is not None and stated != size:
        return False
    total = stated if stated is not None else size
    return 2 <= header <= HEADER_BYTES and (total is None or 8 + header <= total)


def total_bytes(answer: Answer) -> int | None:
    """Return the size of the whole file that an answer is the beginning of, as it says."""
    if answer.status == 206:
        match = re.search(r"/(\d+)$", answer.headers.get("content-range", ""))
        return int(match[1]) if match else None
    return whole_number(answer.headers.get("content-length"))


def whole_number(text: str | None) -> int | None:
    """Read a header that holds a number; None if it does not."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,18}", text.strip()) else None


def has_no_route(answer: Answer) -> bool:
    """Return whether a mirror does not know the question; the Hub says with a code what is not."""
    return answer.status in (400, 404, 405, 501) and answer.code in ("", "EntryNotFound")


def product_of(headers: Mapping[str, str]) -> str | None:
    """Return the product that says of itself to have sent an answer; None if none does.

    Artifactory puts X-JFrog-Version and X-Artifactory-Id into every answer, Nexus its name into
    Server.
    """
    if any(name.startswith(("x-jfrog-", "x-artifactory-")) for name in headers):
        return "Artifactory"
    return "Nexus" if "nexus/" in headers.get("server", "").lower() else None
