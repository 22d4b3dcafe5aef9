"""Requests with limits: bounded in time, in bytes, in redirects and in retries.

Knows HTTP and nothing of outcomes but the two ways in which no answer came. Proxies and
certificates come from the environment as huggingface_hub's own client takes them. Credentials
are asked for per URL, so that each goes only to the origin it belongs to.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping
from urllib.parse import urljoin

import httpx2

from serve_app.access.hub.bounded_client import (
    ERRORS,
    REDIRECTS,
    BoundedClient,
    Credentials,
    may_lead,
    origin,
)
from serve_app.access.hub.classify import STORAGE, Answer, Step, product_of, whole_number
from serve_app.access.hub.network import NoClient, fault_of, host_of, is_certificate
from serve_app.access.verdict import Outcome

TRIES = 4  # of a request that fails; a 429 is repeated as long as the budget lasts
HOPS = 3  # a renamed repository is one, its resolve-cache another
# Their URLs carry what opens them, so they may lead anywhere: no credential goes along.
UNCREDITED = frozenset({Step.BYTES, Step.XET_BYTES})


class Failed(Exception):
    """Ends a probe with its outcome; words are sanitised, no URL with a signature in them."""

    def __init__(
        self,
        outcome: Outcome,
        message: str,
        *,
        status: int | None = None,
        host: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message
        self.status = status
        self.host = host
        self.remedy = remedy  # where the outcome's own does not fit


class Wire:
    """One probe's requests.

    Args:
        home: the Hub's URL; redirects are followed on this origin only, those of the weights'
            bytes, which carry no credentials, anywhere.
        credentials: headers for a URL.
        timeout_s: limit of one request.
        budget_s: limit of all of them, retries and waits included.
        transport: replaces the network in tests.

    Raises:
        Failed: this process's environment names a proxy or certificates that cannot be.
    """

    def __init__(
        self,
        home: str,
        credentials: Credentials,
        *,
        timeout_s: float,
        budget_s: float,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.requests = 0
        self.product: str | None = None  # what answers in the Hub's place, if it says so
        self.step = Step.DESCRIPTION
        self._home = origin(home)
        self._timeout_s = timeout_s
        self._ends_at = time.monotonic() + budget_s
        try:
            self._client = BoundedClient(credentials, transport=transport)
        except NoClient as none:
            fault = none.fault
            raise Failed(Outcome.HUB_UNREACHABLE, fault.message, remedy=fault.remedy) from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(
        self,
        step: Step,
        method: str,
        url: str,
        *,
        limit: int = 0,
        headers: Mapping[str, str] | None = None,
        tries: int = TRIES,
    ) -> Answer:
        """Send a request, follow it on the Hub's origin, repeat it while that can help.

        Args:
            step: the question, for messages and meanings.
            method: GET or HEAD.
            url: absolute.
            limit: bytes of the body to read at the most.
            headers: of this request only; they go wherever it is redirected.
            tries: how often it is sent if it fails.

        Raises:
            Failed: no answer came in time.
        """
        self.step = step
        for attempt in range(1, 10_000):
            failure = None
            try:
                answer = self._follow(step, method, url, limit, headers or {})
            except ERRORS as error:
                failure = self._failure(step, url, error)
                pause = _backoff(attempt) if attempt < tries and _may_pass(error) else None
            else:
                pause = _pause(answer, attempt, tries)
            # A wait that outlasts the budget would only delay the same answer.
            if pause is not None and time.monotonic() + pause < self._ends_at:
                time.sleep(pause)
                continue
            if failure is not None:
                raise failure from None  # the cause holds the request and so the token
            return answer
        raise AssertionError("unreachable: the budget ends every loop")

    def _follow(
        self, step: Step, method: str, url: str, limit: int, headers: Mapping[str, str]
    ) -> Answer:
        for _ in range(HOPS + 1):
            answer = self._send(step, method, url, limit, headers)
            location = answer.headers.get("location")
            if answer.status not in REDIRECTS or not location:
                return answer
            target = urljoin(url, location)
            if not may_lead(url, target):
                return answer
            if origin(target) != self._home and step not in UNCREDITED:
                return answer
            url = target
        return answer

    def _send(
        self, step: Step, method: str, url: str, limit: int, headers: Mapping[str, str]
    ) -> Answer:
        # What is counted is the Hub's quota; storage has none.
        if origin(url) == self._home:
            self.requests += 1
        # Not 0, which the client takes as no time at all: it would blame the host.
        seconds = max(0.05, min(self._timeout_s, self._ends_at - time.monotonic()))
        stop_at = time.monotonic() + seconds
        with self._client.stream(method, url, timeout_s=seconds, headers=headers) as response:
            body = _read(response.iter_bytes(), limit, stop_at) if limit > 0 else b""
            answer = Answer(step, response.status_code, dict(response.headers), body, url)
        if origin(url) == self._home:
            self.product = product_of(answer.headers) or self.product
        return answer

    def _failure(self, step: Step, url: str, error: Exception) -> Failed:
        outcome = Outcome.WEIGHTS_UNREACHABLE if step in STORAGE else Outcome.HUB_UNREACHABLE
        fault = fault_of(error, url, self._timeout_s)
        return Failed(outcome, fault.message, host=host_of(url), remedy=fault.remedy)


def _read(chunks: Iterator[bytes], limit: int, stop_at: float) -> bytes:
    body = bytearray()
    for chunk in chunks:
        body += chunk
        if len(body) >= limit:
            break
        # The client's own limit is of each read: a byte now and then would never reach it.
        if time.monotonic() > stop_at:
            raise httpx2.ReadTimeout("the answer comes too slowly")
    return bytes(body[:limit])


def _may_pass(error: Exception) -> bool:
    """Return whether the same request may succeed a moment later."""
    passing = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    return isinstance(error, passing) and not is_certificate(error)


def _pause(answer: Answer, attempt: int, tries: int) -> float | None:
    """Return how many seconds to wait before asking again; None says not to."""
    if answer.status == 429 and tries > 1:
        # A little more than asked: all nodes were told the same second.
        return _wait_asked_for(answer) + random.uniform(0, 0.5)  # noqa: S311
    if answer.status in (408, 500, 502, 503, 504) and attempt < tries:
        return _backoff(attempt)
    return None


def _wait_asked_for(answer: Answer) -> float:
    after = whole_number(answer.headers.get("retry-after"))
    quota = re.search(r";\s*t\s*=\s*(\d{1,9})", answer.headers.get("ratelimit", ""))
    waits = [] if after is None else [float(after)]
    if quota is not None:
        waits.append(float(quota[1]))
    return max(1.0, *waits) if waits else 5.0


def _backoff(attempt: int) -> float:
    return min(8.0, 0.25 * 2.0**attempt) * random.uniform(0.5, 1.5)  # noqa: S311
