"""Models on ModelScope: its listing states a SHA-256 of each file, and no commit to pin.

As `modelscope_hub` 0.5 asks it. Three things that it does silently are asked for or refused: a
token that it does not know is ignored (so whose it is is asked first), a refusal looks like a name
that does not exist (so it is told by the site's words), and a listing ends at 3,000 entries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from serve_app.access.hub.bounded_client import origin
from serve_app.access.hub.classify import Answer, Step
from serve_app.access.hub.client import Failed
from serve_app.access.hub.listing import PAGE_BYTES
from serve_app.access.shape import shape_fault
from serve_app.access.sources.source import Item
from serve_app.access.sources.web import WebSource
from serve_app.access.token import fingerprint
from serve_app.access.verdict import Outcome, TokenReport
from serve_app.access_config import SHA256, AccessConfig
from serve_app.checkpoint.names import shown
from serve_app.redaction import sanitise

ENDPOINT = "https://modelscope.cn"
BRANCH = "master"
TOKEN_VARIABLE = "MODELSCOPE_API_TOKEN"  # noqa: S105
LISTED = 3000  # entries, at which a listing is cut without saying so


class Place(WebSource):
    """One repository at one branch or tag.

    Args:
        place: `owner/name`, or `owner/name@revision`.
        access: the token's file or variable, and the endpoint, if they are not the site's own.
        timeout_s: limit of one request.

    Raises:
        Failed: there is a token, and the site does not know it, or it cannot be sent.
    """

    def __init__(self, place: str, access: AccessConfig, timeout_s: float) -> None:
        super().__init__(access.endpoint or ENDPOINT, timeout_s)
        name, _, revision = place.partition("@")
        self._place = f"{self.endpoint}/api/v1/models/{name}/repo"
        self._revision = revision or BRANCH
        source, self._token = _token(access)
        if self._token:
            self.credentials = TokenReport(source, fingerprint(self._token))
            if fault := shape_fault(self._token):
                raise Failed(Outcome.MALFORMED_TOKEN, f"the token of {source} {fault}")
            self.refuse_clear_text(access)

    def items(self) -> Iterator[Item]:
        """Yield every file of the revision; asks first whose the token is."""
        if self._token:
            self._require_known()
        query = urlencode({"Revision": self._revision, "Recursive": "True"})
        payload = self.payload(f"{self._place}/files?{query}", PAGE_BYTES)
        if payload.get("Success") is not True:
            words = payload.get("Message")
            raise Failed(
                Outcome.CONTENT_BLOCKED, sanitise(f"the list of files is refused: {words}")
            )
        listed = payload["Data"]["Files"]
        if len(listed) >= LISTED:
            message = f"the list of files is cut at {LISTED:,} entries, so it may not be all"
            raise Failed(Outcome.UNKNOWN, message)
        for each in listed:
            if each.get("Type") != "tree":
                yield _item(each)

    def read(self, item: Item, start: int, stop: int) -> bytes:
        """Return these bytes of a file, all of them; of which content, its hash has to show."""
        query = urlencode({"Revision": self._revision, "FilePath": item.key})
        return self.part(f"{self._place}?{query}", item, start, stop)

    def stated(self, item: Item) -> Mapping[str, str]:
        """Return the SHA-256 that the listing states."""
        return {"sha256": str(item.sha256)}

    def meaning(self, answer: Answer) -> Outcome | None:
        """Return what a status means here: a refusal is no more than a refusal."""
        if answer.step is Step.WHOAMI:
            return Outcome.INVALID_TOKEN if answer.status == 401 else None
        return Outcome.CONTENT_BLOCKED if answer.status in (401, 403, 404) else None

    def headers(self, url: str) -> Mapping[str, str]:
        """Return the token for a URL of the site."""
        if not self._token or origin(url) != origin(self.endpoint):
            return {}
        # Its older routes know the token as a session.
        return {"authorization": f"Bearer {self._token}", "cookie": f"m_session_id={self._token}"}

    def _require_known(self) -> None:
        found = self.payload(f"{self.endpoint}/openapi/v1/users/me", PAGE_BYTES, Step.WHOAMI)
        facts = found.get("data")
        name = facts.get("username") if isinstance(facts, dict) else None
        if found.get("success") is not True:
            raise Failed(Outcome.UNKNOWN, "the site does not say whose the token is")
        if isinstance(name, str):
            self.credentials = replace(self.credentials, account=sanitise(name, limit=100))


def _token(access: AccessConfig) -> tuple[str, str]:
    """Return where the token comes from, and its value; a Hub's is never taken for one."""
    if access.token_file is not None:
        try:
            content = Path(access.token_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            message = f"access.token_file {access.token_file} cannot be read on this node"
            raise Failed(Outcome.NO_TOKEN, sanitise(message)) from None
        return f"file:{access.token_file}", content.strip()
    name = TOKEN_VARIABLE if access.token_env == "HF_TOKEN" else access.token_env  # noqa: S105
    return f"env:{name}", os.environ.get(name, "").strip()


def _item(facts: Mapping[str, Any]) -> Item:
    name, sha256 = facts["Path"], facts.get("Sha256")
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise Failed(Outcome.UNKNOWN, f"no SHA-256 of {shown(name)} is listed")
    return Item(name, int(facts["Size"]), tag=sha256, key=name, sha256=sha256)
