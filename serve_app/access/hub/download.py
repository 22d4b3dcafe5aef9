"""The files of a pinned commit: what the Hub says about them, and their bytes.

Limits (only the model's own files, no more bytes than announced, none too slowly), the resuming
of a file that a dead process left half done, the token for the Hub's own origin alone, and the
words when it fails. Where bytes are put is the caller's: `weights/store.py`.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from serve_app.access.hub import transfer, xet
from serve_app.access.hub.bounded_client import ERRORS, BoundedClient, origin
from serve_app.access.hub.chunk_store import ChunkStore
from serve_app.access.hub.classify import Answer, Caller, Step, classify, whole_number
from serve_app.access.hub.client import Failed, Wire
from serve_app.access.hub.listing import (
    Entries,
    HubFile,
    Masked,
    Refusal,
    ask_listing,
    cache,
    keep_listing,
    read_listing,
    repo_folder,
)
from serve_app.access.hub.model_files import choose, content_hash, on_disk
from serve_app.access.hub.network import NoClient, fault_of
from serve_app.access.hub.pace import Pace, Stalled
from serve_app.access.hub.probe import PLAIN_HTTP, PLAIN_HTTP_REMEDY, USER_AGENT, endpoint_of
from serve_app.access.token import ResolvedToken, resolve_token
from serve_app.access.verdict import UNDETERMINED, Outcome
from serve_app.checkpoint import files as rule
from serve_app.config import AccessConfig
from serve_app.endpoint import check_endpoint, is_plain_http
from serve_app.errors import AccessDenied, ModelLoadError
from serve_app.redaction import sanitise

TRIES = 4  # of a file, as long as nothing to speak of comes of it
PROGRESS_BYTES = 64 << 10  # or the rest of the file: what counts as something
BUDGET_S = 120.0  # of the listing, retries and waits included
PAGE_S = 20.0  # of one page of it, at the least
SMALL_S = 60.0  # likewise of a small file that is read before the download
TRANSIENT = (408, 429, 500, 502, 503, 504)
# Faults that are not the caller's access.
_FAULTS = UNDETERMINED | {Outcome.WEIGHTS_UNREACHABLE, Outcome.WEIGHTS_MISSING}

Appending = Callable[[], AbstractContextManager[BinaryIO]]


class HubDownload:
    """Fetches files of one commit with this node's own token.

    Args:
        repo_id: the repository.
        access: which token, which Hub.
        commit: 40 hex digits, from the gate.

    Raises:
        AccessDenied: the token is unusable.
        ModelLoadError: the endpoint is unusable.
    """

    def __init__(self, repo_id: str, access: AccessConfig, commit: str) -> None:
        self._repo_id = repo_id
        self._commit = commit
        self._timeout_s = access.timeout_s
        self._access = access
        self._token = resolve_token(access)
        if self._token.fault is not None:
            raise AccessDenied(f"cannot download {repo_id}: {self._token.fault.message}")
        try:
            self._endpoint = check_endpoint(endpoint_of(access))
        except ValueError as error:
            raise ModelLoadError(f"cannot download {repo_id}: HF_ENDPOINT {error}") from None
        plain = is_plain_http(self._endpoint) and not access.allow_http
        if plain and self._token.token is not None:
            message = f"cannot download {repo_id}: {PLAIN_HTTP}. {PLAIN_HTTP_REMEDY}"
            raise AccessDenied(message)
        self._read: dict[str, bytes] = {}

    def files(self, *, budget_s: float = BUDGET_S) -> tuple[HubFile, ...]:
        """Return the model's files: by the cache if the commit was listed here before.

        Args:
            budget_s: limit of asking for the listing, retries and waits included.

        Raises:
            AccessDenied: the Hub refuses.
            ModelLoadError: the Hub does not answer, or lists no model.
        """
        entries = read_listing(self._repo_id, self._commit)
        with self._failures():
            if entries is None:
                entries = self._list(budget_s)
            chosen = choose(entries, self._small)
        if not any(file.path.endswith(".safetensors") for file in chosen):
            raise ModelLoadError(f"the Hub lists no weights of {self._repo_id} at {self._commit}")
        return chosen

    def listing(self) -> Entries:
        """Return all files of the commit: by the cache if it was listed here before.

        Raises:
            AccessDenied: the Hub refuses.
            ModelLoadError: the Hub does not answer.
        """
        with self._failures():
            return read_listing(self._repo_id, self._commit) or self._list(BUDGET_S)

    def fetch(self, file: HubFile, appending: Appending, *, stop: int | None = None) -> None:
        """Fetch the rest of a file that may be here in part, over HTTP.

        Args:
            file: one of `files`.
            appending: opens what is here of it, at its end.
            stop: the byte before which to end; None is the file's size. Hosts that send no parts
                send all of the file.

        Raises:
            AccessDenied: the Hub refuses although the probe was granted a moment ago.
            ModelLoadError: the bytes cannot be fetched.
        """
        tries, before = 0, -PROGRESS_BYTES
        with self._failures(file):
            while True:
                with appending() as stream:
                    have = stream.tell()
                    # Counted anew after some progress: of 100 GB a connection may break many times.
                    tries = tries + 1 if have - before < PROGRESS_BYTES else 1
                    before = have
                    try:
                        self._append(file, stream, stop)
                    except (transfer.Refused, Stalled, *ERRORS) as error:
                        if tries >= TRIES or not _may_pass(error):
                            raise
                        pause_s = 0.5 * 2.0**tries
                    else:
                        return
                time.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311

    def fetch_by_xet(self, wanted: Sequence[tuple[HubFile, Path]]) -> str | None:
        """Fetch files from the chunk store, as far as it goes.

        Args:
            wanted: files of the chunk store, each with an empty file that was made for it.

        Returns:
            Why not all came; None if they did. Either way the caller checks every byte.
        """
        url = f"{self._endpoint}/api/models/{self._repo_id}/xet-read-token/{self._commit}"
        try:
            with self._wire(SMALL_S) as wire:
                key = self._key(ChunkStore(wire, self._endpoint, url).key(), url)
            files = [xet.XetFile(str(file.xet_hash), file.size, str(path)) for file, path in wanted]
            xet.fetch(key, files, pace=Pace())
        except Failed as failed:
            return failed.message
        except xet.XetFailed as failed:
            return str(failed)
        return None

    def _key(self, answer: Answer, url: str) -> xet.XetKey:
        headers = answer.headers
        store, secret = headers.get("x-xet-cas-url", ""), headers.get("x-xet-access-token", "")
        expires = whole_number(headers.get("x-xet-token-expiration"))
        try:
            check_endpoint(store)
            # A Hub over https must not send its key for the store to plain http.
            is_safe = is_plain_http(self._endpoint) or not is_plain_http(store)
        except ValueError:
            is_safe = False
        if not (answer.is_ok and is_safe and secret and expires is not None):
            raise xet.XetFailed(f"the Hub gives no key for it (status {answer.status})")
        return xet.XetKey(store, secret, expires, url, dict(self._credentials(url)))

    def _list(self, budget_s: float) -> Entries:
        with self._wire(budget_s) as wire:
            try:
                entries = ask_listing(wire, self._endpoint, self._repo_id, self._commit)
            except Masked as masked:
                # Asked for the file itself, the Hub says why.
                answer = wire.ask(Step.WEIGHTS, "HEAD", self._url(masked.path))
                if answer.status < 400:
                    message = f"the Hub hides the hash of {masked.path} in {self._repo_id}"
                    raise AccessDenied(message) from None
                raise transfer.Refused(answer) from None
            except Refusal as refusal:
                raise transfer.Refused(refusal.answer) from None
        with suppress(OSError):  # a cache that cannot be written may hold the model all the same
            keep_listing(self._repo_id, self._commit, entries)
        return entries

    def _small(self, file: HubFile) -> bytes:
        """Return a small file that the choice of the others depends on."""
        known = on_disk(repo_folder(self._repo_id) / "snapshots" / self._commit, file)
        if known is not None:
            return known
        if file.path not in self._read:
            limit = rule.size_limit(file.path) or 0
            if file.size > limit:
                raise ModelLoadError(f"{file.path} has more than {limit:,} bytes")
            self._read[file.path] = self._fetch_small(file)
        return self._read[file.path]

    def _fetch_small(self, file: HubFile) -> bytes:
        held = _Memory()
        self.fetch(file, held.appending)
        content = held.content
        if content_hash(content, file.etag) != file.etag:
            raise ModelLoadError(
                f"{file.path} of {self._repo_id} came with other bytes than listed"
            )
        return content

    def _append(self, file: HubFile, stream: BinaryIO, stop: int | None) -> None:
        # Left by whom we do not know, or of another file: nothing of it is worth keeping.
        if stream.tell() > file.size:
            stream.seek(0)
            stream.truncate()
        if (content := self._read.get(file.path)) is not None:
            stream.seek(0)
            stream.truncate()
            stream.write(content)
            return
        client = BoundedClient(self._credentials)
        try:
            url, pace = self._url(file.path), Pace()
            transfer.append(client, url, stream, file.size, pace, stop=stop)
        finally:
            client.close()

    def _credentials(self, url: str) -> Mapping[str, str]:
        headers = {"user-agent": USER_AGENT}
        token = self._renewed().token
        if token is not None and origin(url) == origin(self._endpoint):
            headers["authorization"] = f"Bearer {token.reveal()}"
        return headers

    def _renewed(self) -> ResolvedToken:
        """Return the token to send now: one by exchange may end while the weights come."""
        if self._access.identity is not None:
            resolved = resolve_token(self._access)
            if resolved.fault is None:  # else the one before, which the Hub judges
                self._token = resolved
        return self._token

    @contextmanager
    def _wire(self, budget_s: float) -> Iterator[Wire]:
        wire = Wire(self._endpoint, self._credentials, timeout_s=self._timeout_s, budget_s=budget_s)
        try:
            yield wire
        finally:
            wire.close()

    def _url(self, path: str) -> str:
        return f"{self._endpoint}/{self._repo_id}/resolve/{self._commit}/{quote(path)}"

    @contextmanager
    def _failures(self, file: HubFile | None = None) -> Iterator[None]:
        """Raise what goes wrong as the package's errors, one sentence each."""
        what = f"{self._repo_id} at {self._commit}"
        try:
            yield
        except transfer.Refused as refused:
            raise self._refused(refused.answer) from None
        except Failed as failed:
            remedy = f" {failed.remedy}" if failed.remedy else ""
            message = f"the download of {what} broke off: {failed.message}.{remedy}"
            raise ModelLoadError(message) from None
        except NoClient as none:
            message = f"{what} cannot be downloaded: {none.fault.message}. {none.fault.remedy}"
            raise ModelLoadError(message) from None
        except Stalled as stalled:
            message = f"the download of {what} stands still: {stalled}"
            raise ModelLoadError(message) from None
        except transfer.Overrun as overrun:
            named = f"{file.path} of " if file else ""
            raise ModelLoadError(f"{named}{what} is not what was listed: {overrun}") from None
        except ERRORS as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> ModelLoadError:
        if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
            return ModelLoadError(
                f"{self._repo_id} cannot be stored in {cache()}: {error.strerror}"
            )
        message = f"the download of {self._repo_id} at {self._commit} broke off"
        fault = fault_of(error, self._endpoint, self._timeout_s)
        remedy = f" {fault.remedy}" if fault.remedy else ""
        return ModelLoadError(f"{message} ({type(error).__name__}): {fault.message}.{remedy}")

    def _refused(self, answer: Answer) -> AccessDenied | ModelLoadError:
        outcome = classify(answer, Caller(has_token=self._token.token is not None))
        # A 403 is a refusal whatever its words: a replica must not take it for an outage and retry.
        is_denied = outcome not in _FAULTS or answer.status in (401, 403)
        words = sanitise(answer.headers.get("x-error-message", ""))
        said = f"the Hub answered {answer.status}" + (f": {words}" if words else "")
        kind = AccessDenied if is_denied else ModelLoadError
        message = f"the download of {self._repo_id} at {self._commit} failed; {said}"
        return kind(message, status=answer.status)


class _Memory:
    """A small file in memory."""

    def __init__(self) -> None:
        self.content = b""

    @contextmanager
    def appending(self) -> Iterator[BinaryIO]:
        """Open it at its end."""
        stream = io.BytesIO(self.content)
        stream.seek(0, io.SEEK_END)
        try:
            yield stream
        finally:
            self.content = stream.getvalue()


def _may_pass(error: Exception) -> bool:
    if isinstance(error, transfer.Refused):
        return error.answer.status in TRANSIENT
    return not isinstance(error, ValueError) and not getattr(error, "errno", None)
