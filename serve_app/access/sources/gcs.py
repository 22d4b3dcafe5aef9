"""Models in Google Cloud Storage: its JSON API, with this node's own credentials.

The credentials are those of google-auth's chain in this process (Application Default Credentials):
a key file, an identity of the cluster, a login. Every read names the object's generation, so no
bytes of another one are taken.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import google.auth
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError
from google.auth.transport.requests import Request

from serve_app.access.hub.bounded_client import origin
from serve_app.access.hub.classify import Answer, Step
from serve_app.access.hub.client import Failed
from serve_app.access.hub.listing import PAGE_BYTES, PAGES
from serve_app.access.sources.source import Item
from serve_app.access.sources.web import WebSource
from serve_app.access.token import fingerprint
from serve_app.access.verdict import Outcome, TokenReport
from serve_app.config import AccessConfig
from serve_app.redaction import sanitise

ENDPOINT = "https://storage.googleapis.com"
_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_only",)
# https://cloud.google.com/storage/docs/json_api/v1/status-codes
_STATUSES = {
    401: Outcome.INVALID_TOKEN,
    403: Outcome.TOKEN_SCOPE,
    404: Outcome.DIGEST_MISMATCH,  # it was listed a moment ago
    412: Outcome.DIGEST_MISMATCH,
}


class Place(WebSource):
    """One prefix of one bucket.

    Args:
        place: `bucket/prefix`.
        access: the endpoint, if it is not Google's.
        timeout_s: limit of one request.

    Raises:
        Failed: there are credentials, and they cannot be used.
    """

    def __init__(self, place: str, access: AccessConfig, timeout_s: float) -> None:
        super().__init__(access.endpoint or ENDPOINT, timeout_s)
        bucket, _, prefix = place.rstrip("/").partition("/")
        self._place = f"{self.endpoint}/storage/v1/b/{quote(bucket, safe='')}/o"
        self._prefix = f"{prefix}/" if prefix else ""
        self._credentials: Any = None
        try:
            self._credentials, _ = google.auth.default(scopes=_SCOPES)
        except DefaultCredentialsError as error:
            # Without any, a public bucket can still be read; a key file that is none is a fault.
            if "were not found" not in str(error):
                raise Failed(Outcome.MALFORMED_TOKEN, _words(error)) from None
        else:
            self.credentials = _report(self._credentials)
            self.refuse_clear_text(access)
            self.headers(self.endpoint)  # now, so that a refusal to renew them has words

    def items(self) -> Iterator[Item]:
        """Yield every object below the prefix."""
        query = {
            "prefix": self._prefix,
            "fields": "kind,nextPageToken,items(name,size,generation,updated)",
        }
        for _ in range(PAGES):
            page = self.payload(f"{self._place}?{urlencode(query)}", PAGE_BYTES)
            if page.get("kind") != "storage#objects":
                raise Failed(Outcome.UNKNOWN, "the answer is no list of the bucket's objects")
            for each in page.get("items", ()):
                yield Item(
                    name=each["name"].removeprefix(self._prefix),
                    size=int(each["size"]),
                    tag=str(each["generation"]),
                    key=each["name"],
                    modified=str(each.get("updated", "")),
                )
            if "nextPageToken" not in page:
                return
            query["pageToken"] = page["nextPageToken"]
        raise Failed(Outcome.UNKNOWN, f"the list of objects does not end within {PAGES} pages")

    def read(self, item: Item, start: int, stop: int) -> bytes:
        """Return these bytes of an object as it was listed, all of them."""
        return self.part(self._url_of(item, alt="media"), item, start, stop)

    def stated(self, item: Item) -> Mapping[str, str]:
        """Return the MD5 that is stored with an object; one of several parts has none."""
        md5 = self.payload(self._url_of(item), PAGE_BYTES).get("md5Hash")
        return {"md5": base64.b64decode(md5).hex()} if isinstance(md5, str) else {}

    def meaning(self, answer: Answer) -> Outcome | None:
        """Return what a status means here."""
        if answer.status == 404 and answer.step is Step.LISTING:
            return Outcome.REPO_NOT_FOUND
        return _STATUSES.get(answer.status)

    def _url_of(self, item: Item, **query: str) -> str:
        wanted = urlencode({**query, "generation": item.tag})
        return f"{self._place}/{quote(item.key, safe='')}?{wanted}"

    def headers(self, url: str) -> Mapping[str, str]:
        """Return the credentials for a URL, renewed where they have ended."""
        headers: dict[str, str] = {}
        if self._credentials is not None and origin(url) == origin(self.endpoint):
            try:
                self._credentials.before_request(Request(), "GET", url, headers)
            except RefreshError as error:
                raise Failed(Outcome.EXPIRED_TOKEN, _words(error)) from None
            except GoogleAuthError as error:
                raise Failed(Outcome.NO_TOKEN, _words(error)) from None
        return headers


def _report(credentials: Any) -> TokenReport:
    """Name credentials by their kind, and whose they are by a fingerprint."""
    kind = type(credentials)
    account = getattr(credentials, "service_account_email", None) or getattr(
        credentials, "client_id", None
    )
    name = f"gs:{kind.__module__.rpartition('.')[2].lstrip('_')}"
    known = isinstance(account, str) and account != "default"
    is_mail = known and "@" in str(account)
    return TokenReport(
        name,
        fingerprint(str(account)) if known else None,
        account=str(account) if is_mail else None,
    )


def _words(error: Exception) -> str:
    return sanitise(f"{type(error).__name__}: {error.args[0] if error.args else ''}")
