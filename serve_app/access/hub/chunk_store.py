"""The chunk store (Xet) as a way to the weights: its key, its plan, and a byte from where it lies.

Three hosts take part: the Hub hands out a short-lived key, the store says which chunks make a
file, and a third one has the chunks, behind signed URLs. A firewall may let two of them through,
so the proof ends with a byte of the third. The Hub's token goes to the Hub alone, the store's
key to the store that the Hub named, and neither to the chunks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants

from serve_app.access.hub.bounded_client import origin
from serve_app.access.hub.classify import Answer, Step
from serve_app.access.hub.client import Failed, Wire
from serve_app.access.hub.network import host_of
from serve_app.access.verdict import Outcome
from serve_app.endpoint import is_plain_http
from serve_app.redaction import sanitise

PLAN_BYTES = 1 << 20  # of the plan for one byte of a file
WORDS_BYTES = 64 << 10  # of an answer that is read for its words only
TRIES = 2
_HASH = re.compile(r"[0-9a-f]{64}")
_RANGES = 64  # of one signed URL; more would not fit a header


def downloads_by_xet() -> bool:
    """Return whether huggingface_hub 2.4 would use the chunk store in this process."""
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def chunk_hash(headers: Mapping[str, str]) -> str | None:
    """Return a file's hash in the chunk store if huggingface_hub would fetch it from there.

    It does where the Hub also says how to get a key for it; a mirror that passes on the hash
    alone has no such route.
    """
    found = headers.get("x-xet-hash", "")
    has_route = 'rel="xet-auth"' in headers.get("link", "") or "x-xet-refresh-route" in headers
    return found if _HASH.fullmatch(found) and has_route and downloads_by_xet() else None


class ChunkStore:
    """One file's way through the chunk store.

    Args:
        wire: asks.
        endpoint: the Hub.
        key_url: of the Hub's route that hands out keys for the commit.
    """

    def __init__(self, wire: Wire, endpoint: str, key_url: str) -> None:
        self._wire = wire
        self._endpoint = endpoint
        self._key_url = key_url

    def key(self) -> Answer:
        """Ask the Hub for a key; the answer may be a refusal."""
        return self._wire.ask(Step.XET_TOKEN, "GET", self._key_url, limit=WORDS_BYTES)

    def prove(self, key: Answer, answer: Answer, name: str, xet_hash: str) -> None:
        """Read a byte of a file.

        Args:
            key: a granted answer of `key`.
            answer: of the Hub about the file.
            name: of the file, for messages.
            xet_hash: from `chunk_hash`.

        Raises:
            Failed: the byte does not come; names the host and the way around it.
        """
        try:
            self._read(self._plan(key, answer, xet_hash), name)
        except Failed as failed:
            host = failed.host or "the storage hosts of the Hub"
            way = failed.remedy or (
                f"The Hub says yes but the bytes do not come: let this node reach {host} "
                "(firewall, proxy, TLS inspection, DNS)."
            )
            remedy = f"{way} Or set HF_HUB_DISABLE_XET=1 on it: the weights then come over HTTP."
            raise Failed(
                failed.outcome,
                failed.message,
                status=failed.status,
                host=failed.host,
                remedy=remedy,
            ) from None

    def _plan(self, key: Answer, answer: Answer, xet_hash: str) -> Answer:
        store = key.headers.get("x-xet-cas-url", "").rstrip("/")
        self._refuse_place(store, "the storage's URL")
        url = _linked(answer, store) or f"{store}/v2/reconstructions/{xet_hash}"
        secret = key.headers.get("x-xet-access-token", "")
        wanted = {"authorization": f"Bearer {secret}", "range": "bytes=0-0"}
        plan = self._wire.ask(
            Step.XET_STORE, "GET", url, limit=PLAN_BYTES, headers=wanted, tries=TRIES
        )
        if not plan.is_ok:
            raise _not_served(plan, "the plan of the weights")
        return plan

    def _read(self, plan: Answer, name: str) -> None:
        place = _first_place(plan.payload())
        if place is None:
            raise _not_served(plan, f"where the bytes of {name} lie")
        url, ranges = place
        self._refuse_place(url, "where the bytes lie")
        # The whole range, since the URL is signed for it; the first byte ends it.
        answer = self._wire.ask(
            Step.XET_BYTES, "GET", url, limit=1, headers={"range": ranges}, tries=TRIES
        )
        if answer.status not in (200, 206) or not answer.body:
            raise _not_served(answer, f"the bytes of {name}")

    def _refuse_place(self, url: str, what: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            message = f"{what} is none: {sanitise(host_of(url))}"
            raise Failed(Outcome.WEIGHTS_UNREACHABLE, message)
        if is_plain_http(url) and not is_plain_http(self._endpoint):
            message = f"{what} is plain http, on {sanitise(host_of(url))}"
            raise Failed(Outcome.WEIGHTS_UNREACHABLE, message)


def _first_place(plan: Any) -> tuple[str, str] | None:
    """Return URL and range of the first chunks, from the store's answer of version 1 or 2."""
    try:
        chunks = plan["terms"][0]["hash"]
        if "xorbs" in plan:
            found = plan["xorbs"][chunks][0]
            spans = [entry["bytes"] for entry in found["ranges"][:_RANGES]]
        else:
            found = plan["fetch_info"][chunks][0]
            spans = [found["url_range"]]
        url = found["url"]
        ranges = ",".join(f"{int(span['start'])}-{int(span['end'])}" for span in spans)
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        return None
    return (url, f"bytes={ranges}") if isinstance(url, str) and ranges else None


def _not_served(answer: Answer, what: str) -> Failed:
    host = host_of(answer.url)
    outcome = Outcome.RATE_LIMITED if answer.status == 429 else Outcome.WEIGHTS_UNREACHABLE
    message = sanitise(f"{host} answered {answer.status}, not {what}")
    return Failed(outcome, message, status=answer.status, host=host)


def _linked(answer: Answer, store: str) -> str | None:
    """Return the store's URL that the Hub names for this file, if it is on the store's origin."""
    pattern = r'<([^>]+)>;\s*rel="xet-reconstruction-info"'
    match = re.search(pattern, answer.headers.get("link", ""))
    try:
        return match[1] if match and origin(match[1]) == origin(store) else None
    except ValueError:
        return None
