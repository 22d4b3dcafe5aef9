"""What sources that are asked over HTTP have in common: bounded requests, words for refusals."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from serve_app.access.hub.classify import Answer, Step
from serve_app.access.hub.client import Failed, Wire
from serve_app.access.sources.source import Item
from serve_app.access.verdict import Outcome, TokenReport
from serve_app.config import AccessConfig
from serve_app.endpoint import is_plain_http
from serve_app.redaction import sanitise

LIFETIME_S = 7 * 24 * 3600.0  # of a connection: who asks bounds what is done with it
TRIES = 2


class WebSource:
    """A source behind one origin.

    Args:
        endpoint: who is asked, without a trailing slash.
        timeout_s: limit of one request.
    """

    def __init__(self, endpoint: str, timeout_s: float) -> None:
        self.credentials = TokenReport()
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._own = threading.local()  # a connection is for one thread
        self._wires: list[Wire] = []

    @property
    def requests(self) -> int:
        """How many were sent to the endpoint."""
        return sum(wire.requests for wire in self._wires)

    def close(self) -> None:
        """Close the connections."""
        for wire in self._wires:
            wire.close()

    def refuse_clear_text(self, access: AccessConfig) -> None:
        """Refuse to send credentials over plain http; raises Failed."""
        if is_plain_http(self.endpoint) and not access.allow_http:
            message = "the endpoint is plain http, which would send the token in clear text"
            remedy = (
                "Use an https:// URL, or set access.allow_http: true if the network is trusted."
            )
            raise Failed(Outcome.HUB_UNREACHABLE, message, remedy=remedy)

    def payload(self, url: str, limit: int, step: Step = Step.LISTING) -> dict[str, Any]:
        """Return the JSON object at a URL; raises Failed."""
        found = self._ask(step, url, limit).payload()
        if not isinstance(found, dict):
            raise Failed(Outcome.UNKNOWN, "the answer is no JSON object")
        return found

    def part(self, url: str, item: Item, start: int, stop: int) -> bytes:
        """Return bytes of a file, all of them; raises Failed."""
        wanted = {"range": f"bytes={start}-{stop - 1}"}
        answer = self._ask(Step.BYTES, url, stop - start + 1, wanted)
        is_part = answer.status == 206 or (start == 0 and stop == item.size)
        if not is_part or len(answer.body) != stop - start:
            message = f"other bytes of {item.name} came than were asked for"
            raise Failed(Outcome.WEIGHTS_UNREACHABLE, sanitise(message))
        return answer.body

    def meaning(self, answer: Answer) -> Outcome | None:
        """Return what a refusal means here; None if nobody knows."""
        raise NotImplementedError

    def headers(self, url: str) -> Mapping[str, str]:
        """Return the credentials for a URL, so that they go to their own origin alone."""
        raise NotImplementedError

    def _ask(
        self, step: Step, url: str, limit: int, headers: Mapping[str, str] | None = None
    ) -> Answer:
        answer = self._wire().ask(step, "GET", url, limit=limit, headers=headers, tries=TRIES)
        if answer.is_ok:
            return answer
        outcome = Outcome.RATE_LIMITED if answer.status == 429 else self.meaning(answer)
        if outcome is None:
            outcome = Outcome.HUB_UNREACHABLE if answer.status >= 500 else Outcome.UNKNOWN
        message = f"the {step} was answered with {answer.status}: {_words(answer)}"
        raise Failed(outcome, sanitise(message))

    def _wire(self) -> Wire:
        if not hasattr(self._own, "wire"):
            self._own.wire = Wire(
                self.endpoint, self.headers, timeout_s=self._timeout_s, budget_s=LIFETIME_S
            )
            self._wires.append(self._own.wire)
        wire: Wire = self._own.wire
        return wire


def _words(answer: Answer) -> str:
    """Return what a refusal says: Google's `error.message`, ModelScope's `Message`, or its text."""
    payload = answer.payload()
    facts = payload if isinstance(payload, dict) else {}
    error = facts.get("error")
    said = error.get("message") if isinstance(error, dict) else facts.get("Message")
    said = facts.get("message") if said is None else said
    return said if isinstance(said, str) and said else (answer.words or "no words")
