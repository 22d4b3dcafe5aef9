"""The files of a pinned commit: what the Hub says about them, and their bytes.

huggingface_hub does the network's part: lists, redirects, the chunk store. Here are the limits
(safetensors, tokenizer and configs, never code or pickles), the resuming of a file that a dead
process left half done, the token, and the words when it fails: huggingface_hub's exceptions
hold the request with its Authorization header, so none of them ever leaves this file.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)

# Private in huggingface_hub 2.4: the listing of a commit where all its tools look for it.
from huggingface_hub._tree_cache import TreeCacheEntry, read_tree_cache, write_tree_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._paths import filter_repo_objects
from huggingface_hub.utils.tqdm import disable_progress_bars

from serve_app import __version__
from serve_app.access.hub import USER_AGENT, endpoint_of
from serve_app.access.proof import downloads_by_xet
from serve_app.access.report import sanitise
from serve_app.access.token import resolve_token
from serve_app.config import AccessConfig
from serve_app.errors import AccessDenied, ModelLoadError

# Weights as transformers looks for them at the top, tokenizers, templates and licenses.
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "USE_POLICY*")
# Other engines' copies of the same weights, and anything that could run.
UNWANTED = ("original/*", "onnx/*", "consolidated*", "*.bin", "*.py", "*.pt", "*.pth", "*.pkl")
TRIES = 4  # of a file, as long as not one more byte of it comes
TRANSIENT = (408, 429, 500, 502, 503, 504)
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit, as the Hub describes it.

    Args:
        path: its place in the repository, with `/`.
        size: bytes.
        etag: its name in the cache: the SHA-256 of a large file, the Git object id of others.
        in_xet: huggingface_hub fetches it from the chunk store.
    """

    path: str
    size: int
    etag: str
    in_xet: bool = False


def cache() -> Path:
    """Return huggingface_hub's cache of this process."""
    return Path(constants.HF_HUB_CACHE)


def repo_folder(repo_id: str) -> Path:
    """Return where the cache keeps a model."""
    return cache() / repo_folder_name(repo_id=repo_id, repo_type="model")


def listed(repo_id: str, commit: str) -> tuple[HubFile, ...] | None:
    """Return what the cache knows of a commit's files.

    Returns:
        The files that are wanted, sorted; None if the commit was never listed here, or only for
        somebody without access, whom the Hub does not tell the hashes.
    """
    entries = read_tree_cache(str(repo_folder(repo_id)), commit)
    if entries is None or _masked(entries):
        return None
    paths = filter_repo_objects(
        entries, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
    )
    return tuple(_described(path, entries[path]) for path in sorted(paths))


def cached_snapshot(repo_id: str, commit: str) -> Path:
    """Return this node's copy of a commit, without any request.

    Raises:
        ModelLoadError: there is none, or files are missing from it.
    """
    try:
        directory = snapshot_download(
            repo_id,
            revision=commit,
            cache_dir=cache(),
            local_files_only=True,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        message = f"{cache()} has no complete copy of {repo_id} at {commit}"
        raise ModelLoadError(message) from None
    return Path(directory)


class HubDownload:
    """Fetches files of one commit with this node's own token.

    Args:
        repo_id: the repository.
        access: which token, which Hub.
        commit: 40 hex digits, from the gate.

    Raises:
        AccessDenied: the token is unusable.
    """

    def __init__(self, repo_id: str, access: AccessConfig, commit: str) -> None:
        self._repo_id = repo_id
        self._commit = commit
        self._endpoint = endpoint_of(access)
        self._token = resolve_token(access)
        if self._token.fault is not None:
            raise AccessDenied(f"cannot download {repo_id}: {self._token.fault.message}")
        disable_progress_bars("huggingface_hub.http_get")

    def files(self) -> tuple[HubFile, ...]:
        """Return the commit's files: from the cache if it was listed here before.

        Raises:
            AccessDenied: the Hub refuses.
            ModelLoadError: the Hub does not answer.
        """
        known = listed(self._repo_id, self._commit)
        if known is None:
            with self._failures():
                self._list()
            known = listed(self._repo_id, self._commit)
        if not known:
            raise ModelLoadError(f"the Hub lists no files of {self._repo_id} at {self._commit}")
        return known

    def fetch(self, file: HubFile, partial: Path) -> None:
        """Bring the rest of a file that may be here in part.

        Args:
            file: not in the chunk store.
            partial: holds its first bytes, or is not there.

        Raises:
            AccessDenied: the Hub refuses although the probe was granted a moment ago.
            ModelLoadError: the bytes cannot be brought here.
        """
        url = hf_hub_url(self._repo_id, file.path, revision=self._commit, endpoint=self._endpoint)
        tries, before = 0, -1
        with self._failures():
            while True:
                have = partial.stat().st_size if partial.exists() else 0
                tries = tries + 1 if have <= before else 1
                before = have
                try:
                    self._append(url, partial, have, file.size)
                except (httpx2.TransportError, HfHubHTTPError) as error:
                    if tries >= TRIES or not _may_pass(error):
                        raise
                    time.sleep(0.5 * 2.0**tries * random.uniform(0.5, 1.5))  # noqa: S311
                else:
                    return

    def fetch_by_xet(self, file: HubFile, *, again: bool) -> Path:
        """Let huggingface_hub fetch a file from the chunk store into the cache.

        Args:
            file: in the chunk store.
            again: what the cache has of it is damaged.

        Raises:
            AccessDenied: the Hub refuses.
            ModelLoadError: the bytes cannot be brought here.
        """
        with self._failures():
            return Path(
                hf_hub_download(
                    self._repo_id,
                    file.path,
                    revision=self._commit,
                    cache_dir=cache(),
                    endpoint=self._endpoint,
                    token=self._secret(),
                    force_download=again,
                    library_name="serve-app",
                    library_version=__version__,
                )
            )

    def _list(self) -> None:
        api = HfApi(
            self._endpoint, self._secret(), library_name="serve-app", library_version=__version__
        )
        tree = api.list_repo_tree(self._repo_id, recursive=True, revision=self._commit)
        entries = {
            file.path: TreeCacheEntry(
                size=file.size,
                blob_id=file.blob_id,
                lfs_sha256=file.lfs.sha256 if file.lfs else None,
                lfs_size=file.lfs.size if file.lfs else None,
                xet_hash=file.xet_hash,
            )
            for file in tree
            if isinstance(file, RepoFile)
        }
        if path := _masked(entries):
            # Asked for the file itself, the Hub says why.
            url = hf_hub_url(self._repo_id, path, revision=self._commit, endpoint=self._endpoint)
            get_hf_file_metadata(url, token=self._secret(), endpoint=self._endpoint)
            raise AccessDenied(f"the Hub hides the hash of {path} in {self._repo_id}")
        write_tree_cache(str(repo_folder(self._repo_id)), self._commit, entries)

    def _append(self, url: str, partial: Path, have: int, size: int) -> None:
        headers = {"user-agent": USER_AGENT}
        if (token := self._token.token) is not None:
            headers["authorization"] = f"Bearer {token.reveal()}"
        if have > size:
            partial.unlink()
            have = 0
        with partial.open("ab") as stream:
            http_get(url, stream, resume_size=have, headers=headers, expected_size=size)

    def _secret(self) -> str | bool:
        return False if self._token.token is None else self._token.token.reveal()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what the libraries raise into the package's errors, without their requests."""
        try:
            yield
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise self._refused(error) from None
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and error.strerror:
                message = f"{self._repo_id} cannot be stored in {cache()}: {error.strerror}"
                raise ModelLoadError(message) from None
            message = f"the download of {self._repo_id} at {self._commit} broke off"
            raise ModelLoadError(f"{message} ({type(error).__name__})") from None

    def _refused(self, error: Exception) -> AccessDenied | ModelLoadError:
        # huggingface_hub 2.4 says "check your connection" for a 403; what happened is its cause.
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        what = f"{self._repo_id} at {self._commit}"
        if not isinstance(cause, HfHubHTTPError):
            return ModelLoadError(f"{what} cannot be downloaded ({type(cause or error).__name__})")
        status = cause.response.status_code
        words = sanitise(cause.response.headers.get("x-error-message", ""))
        said = f"the Hub answered {status}" + (f": {words}" if words else "")
        denied = isinstance(cause, GatedRepoError | RepositoryNotFoundError)
        kind = AccessDenied if denied or status in (401, 403) else ModelLoadError
        return kind(f"the download of {what} failed; {said}", status=status)


def _etag(entry: TreeCacheEntry) -> str:
    return entry.lfs_sha256 or entry.blob_id


def _masked(entries: dict[str, TreeCacheEntry]) -> str | None:
    return next(
        (path for path, entry in entries.items() if not _HASH.fullmatch(_etag(entry))), None
    )


def _described(path: str, entry: TreeCacheEntry) -> HubFile:
    size = entry.size if entry.lfs_size is None else entry.lfs_size
    return HubFile(path, size, _etag(entry), entry.xet_hash is not None and downloads_by_xet())


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in TRANSIENT
