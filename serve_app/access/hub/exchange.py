"""Exchanges an identity token for a Hub token: `POST /oauth/token` (RFC 8693), as huggingface_hub.

The identity token goes to the Hub alone, in one body, over a connection that nobody can listen
to; neither it nor the token that comes back stands in any message.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx2

from serve_app.access.hub.bounded_client import ERRORS, BoundedClient
from serve_app.access.hub.classify import Answer, Step
from serve_app.access.hub.client import Failed
from serve_app.access.hub.network import NoClient, fault_of, host_of
from serve_app.access.verdict import Outcome
from serve_app.redaction import sanitise

ANSWER_BYTES = 64 << 10
WORDS = 300  # characters of what the Hub says to it
TRIES = 3  # while nobody answers, or the Hub fails
LIFETIME_S = 3600.0  # of a token whose answer does not say it
MAX_LIFETIME_S = 86_400.0
_GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
_ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"  # noqa: S105 (a name)
REFUSALS = (400, 401, 403, 422)  # RFC 6749 and 8693 answer 400 or 401
_PASSING = (408, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Exchanged:
    """A token that came back.

    Args:
        value: the token itself.
        lifetime_s: for which it holds, from now on.
        requests: that were sent for it.
    """

    value: str
    lifetime_s: float
    requests: int


class Refused(Failed):
    """No token came; `requests` is how often it was asked for, `words` what the Hub said."""

    def __init__(self, failed: Failed, *, requests: int, words: str = "") -> None:
        super().__init__(
            failed.outcome,
            failed.message,
            status=failed.status,
            host=failed.host,
            remedy=failed.remedy,
        )
        self.requests = requests
        self.words = words


def exchange(endpoint: str, identity_token: str, resource: str, *, timeout_s: float) -> Exchanged:
    """Exchange an identity token.

    Args:
        endpoint: the Hub.
        identity_token: the signed JWT.
        resource: what the Hub calls it: a user's name, or `owner/name` of a model.
        timeout_s: limit of one request.

    Raises:
        Refused: no token came; the words are the Hub's, or the network's.
    """
    body = {
        "grant_type": _GRANT,
        "subject_token_type": _ID_TOKEN,
        "subject_token": identity_token,
        "resource": resource,
    }
    url, content = f"{endpoint}/oauth/token", json.dumps(body).encode()
    for attempt in range(1, TRIES + 1):
        try:
            answer = _post(url, content, timeout_s)
        except Failed as failed:
            # A fault with a remedy of its own, such as a wrong proxy, does not pass by waiting.
            if attempt == TRIES or failed.remedy:
                raise Refused(failed, requests=attempt) from None
        else:
            if answer.status not in _PASSING or attempt == TRIES:
                return _token(answer, attempt)
        time.sleep(0.2 * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311
    raise AssertionError("unreachable: the last try returns or raises")


def _post(url: str, content: bytes, timeout_s: float) -> Answer:
    try:
        # No redirect is followed: the identity token stands in the body, which would go along.
        client = BoundedClient(lambda _url: {"content-type": "application/json"})
    except NoClient as none:
        fault = none.fault
        raise Failed(Outcome.HUB_UNREACHABLE, fault.message, remedy=fault.remedy) from None
    try:
        with client.stream("POST", url, timeout_s=timeout_s, content=content) as response:
            body = _read(response, time.monotonic() + timeout_s)
            return Answer(Step.EXCHANGE, response.status_code, dict(response.headers), body, url)
    except ERRORS as error:
        fault = fault_of(error, url, timeout_s)
        # The cause holds the request, and so the identity token.
        raise Failed(
            Outcome.HUB_UNREACHABLE, fault.message, host=host_of(url), remedy=fault.remedy
        ) from None
    finally:
        client.close()


def _read(response: httpx2.Response, stop_at: float) -> bytes:
    body = b""
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > ANSWER_BYTES or time.monotonic() > stop_at:
            raise httpx2.ReadTimeout("the answer to the exchange is too long or too slow")
    return body


def _token(answer: Answer, requests: int) -> Exchanged:
    payload = answer.payload()
    facts: dict[str, Any] = payload if isinstance(payload, dict) else {}
    value = facts.get("access_token")
    if answer.is_ok and isinstance(value, str) and value:
        return Exchanged(value, _lifetime(facts.get("expires_in")), requests)
    words = words_of(answer.body) or sanitise(answer.words, limit=WORDS)
    failed = Failed(_outcome(answer, payload), words, status=answer.status)
    raise Refused(failed, requests=requests, words=words)


def _outcome(answer: Answer, payload: Any) -> Outcome:
    if answer.status == 429:
        return Outcome.RATE_LIMITED
    if answer.status in REFUSALS:
        return Outcome.IDENTITY_REFUSED
    if answer.status >= 500 or answer.status in (407, 408):
        return Outcome.HUB_UNREACHABLE
    # A page of a captive portal is no answer of a Hub; 404: a mirror that exchanges nothing.
    return Outcome.HUB_UNREACHABLE if answer.is_ok and payload is None else Outcome.UNKNOWN


def words_of(body: bytes) -> str:
    """Return the error code and words of a refused exchange (RFC 6749, 5.2); empty without any."""
    payload = Answer(Step.EXCHANGE, 400, body=body[:ANSWER_BYTES]).payload()
    facts = payload if isinstance(payload, dict) else {}
    said = [facts.get(key) for key in ("error", "error_description")]
    return sanitise(": ".join(each for each in said if isinstance(each, str) and each), limit=WORDS)


def _lifetime(stated: Any) -> float:
    is_number = isinstance(stated, int | float) and not isinstance(stated, bool)
    if not is_number or not math.isfinite(stated) or stated <= 0:
        return LIFETIME_S
    return min(float(stated), MAX_LIFETIME_S)
