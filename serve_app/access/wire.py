"""Requests with limits: bounded in time, in bytes, in redirects and in retries.

Knows HTTP and nothing of outcomes but the two ways in which no answer came. Proxies and
certificates come from the environment as huggingface_hub's own client takes them. Credentials
are asked for per URL, so that each goes only to the origin it belongs to.
"""

from __future__ import annotations

import random
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urljoin, urlsplit

import httpx2

from serve_app.access.answers import STORAGE, Answer, Step, whole_number
from serve_app.access.report import sanitise
from serve_app.access.verdict import Outcome

TRIES = 4  # of a request that fails; a 429 is repeated as long as the budget lasts
HOPS = 3  # a renamed repository is one, its resolve-cache another
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
# ValueError and OSError: what sockets, certificates and header encoding raise below the client.
_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError, ValueError)


class Failed(Exception):
    """Ends a probe with its outcome; words are sanitised, no URL with a signature in them."""

    def __init__(
        self,
        outcome: Outcome,
        message: str,
        *,
        status: int | None = None,
        host: str | None = None,
    ) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message
        self.status = status
        self.host = host


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port; raises ValueError for a port that is no number."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme, 0)


class Wire:
    """One probe's requests.

    Args:
        home: the Hub's URL; redirects are followed on this origin only, those of the weights'
            bytes, which carry no credentials, anywhere.
        credentials: headers for a URL.
        timeout_s: limit of one request.
        budget_s: limit of all of them, retries and waits included.
        transport: replaces the network in tests.
    """

    def __init__(
        self,
        home: str,
        credentials: Callable[[str], Mapping[str, str]],
        *,
        timeout_s: float,
        budget_s: float,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.requests = 0
        self.step = Step.DESCRIPTION
        self._home = origin(home)
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._ends_at = time.monotonic() + budget_s
        self._client = httpx2.Client(transport=transport, follow_redirects=False)

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
            except _ERRORS as error:
                failure = self._failure(step, url, error)
                pause = _backoff(attempt) if attempt < tries and _may_pass(error) else None
            else:
                pause = _pause(answer, attempt, tries)
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
            if answer.status not in _REDIRECTS or not location:
                return answer
            target = urljoin(url, location)
            if origin(target) != self._home and step is not Step.BYTES:
                return answer
            url = target
        return answer

    def _send(
        self, step: Step, method: str, url: str, limit: int, headers: Mapping[str, str]
    ) -> Answer:
        if origin(url) == self._home:
            self.requests += 1
        seconds = max(0.05, min(self._timeout_s, self._ends_at - time.monotonic()))
        stop_at = time.monotonic() + seconds
        asked = {**self._credentials(url), **headers}
        with self._client.stream(method, url, headers=asked, timeout=seconds) as response:
            body = _read(response.iter_bytes(), limit, stop_at)
            return Answer(step, response.status_code, dict(response.headers), body, url)

    def _failure(self, step: Step, url: str, error: Exception) -> Failed:
        outcome = Outcome.WEIGHTS_UNREACHABLE if step in STORAGE else Outcome.HUB_UNREACHABLE
        host = urlsplit(url).netloc.rpartition("@")[2]
        return Failed(outcome, _words(error, host, self._timeout_s), host=host)


def _read(chunks: Iterator[bytes], limit: int, stop_at: float) -> bytes:
    body = b""
    if limit <= 0:
        return body
    for chunk in chunks:
        body += chunk
        if len(body) >= limit:
            break
        if time.monotonic() > stop_at:
            raise httpx2.ReadTimeout("the answer comes too slowly")
    return body[:limit]


def _words(error: Exception, host: str, timeout_s: float) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return f"{host} did not answer within {timeout_s:g} s"
    if _is_certificate(error):
        return sanitise(f"the TLS certificate of {host} is not trusted here: {error}")
    if isinstance(error, httpx2.ProxyError):
        return sanitise(f"the proxy on the way to {host} refused: {error}")
    if isinstance(error, httpx2.NetworkError | OSError):
        return sanitise(f"no connection to {host}: {error}")
    if isinstance(error, httpx2.RemoteProtocolError | httpx2.DecodingError):
        return f"what {host} answered is not HTTP, or broke off"
    return f"{host} could not be asked ({type(error).__name__})"


def _is_certificate(error: BaseException | None) -> bool:
    if error is None:
        return False
    if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY" in str(error):
        return True
    return _is_certificate(error.__cause__ or error.__context__)


def _may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed a moment later."""
    passing = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    return isinstance(error, passing) and not _is_certificate(error)


def _pause(answer: Answer, attempt: int, tries: int) -> float | None:
    """Return how many seconds to wait before asking again; None says not to."""
    if answer.status == 429 and tries > 1:
        return _told_to_wait(answer) + random.uniform(0, 0.5)  # noqa: S311
    if answer.status in (408, 500, 502, 503, 504) and attempt < tries:
        return _backoff(attempt)
    return None


def _told_to_wait(answer: Answer) -> float:
    after = whole_number(answer.headers.get("retry-after"))
    quota = re.search(r";\s*t\s*=\s*(\d{1,9})", answer.headers.get("ratelimit", ""))
    waits = [] if after is None else [float(after)]
    if quota is not None:
        waits.append(float(quota[1]))
    return max(1.0, *waits) if waits else 5.0


def _backoff(attempt: int) -> float:
    return min(8.0, 0.25 * 2.0**attempt) * random.uniform(0.5, 1.5)  # noqa: S311
