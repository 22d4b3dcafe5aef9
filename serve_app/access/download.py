"""The pinned commit into the node's cache, once per node, after the gate said yes.

huggingface_hub downloads; here are the limits (safetensors, tokenizer and configs, never code
or pickles), the token, and the words when it fails: huggingface_hub's exceptions hold the
request with its Authorization header, so none of them ever leaves this file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from serve_app import __version__
from serve_app.access.hub import endpoint_of
from serve_app.access.report import sanitise
from serve_app.access.token import resolve_token
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import AccessDenied, ModelLoadError

# Weights as transformers looks for them at the top, tokenizers, templates and licenses.
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "USE_POLICY*")
# Other engines' copies of the same weights, and anything that could run.
UNWANTED = ("original/*", "onnx/*", "consolidated*", "*.bin", "*.py", "*.pt", "*.pth", "*.pkl")


def download_snapshot(
    model: ModelConfig, access: AccessConfig, commit: str | None, *, offline: bool = False
) -> Path:
    """Bring the pinned commit into this node's cache; replicas of one node share the download.

    Args:
        model: what is to be read; a local `path` is returned as it is.
        access: which token, which Hub.
        commit: 40 hex digits, from the gate.
        offline: take the copy that is here; the Hub is known not to answer.

    Returns:
        The directory with config, tokenizer and weights.

    Raises:
        AccessDenied: the Hub refuses although the probe was granted a moment ago.
        ModelLoadError: the files cannot be brought here (network, disk).
    """
    if model.path is not None:
        return Path(model.path).expanduser()
    repo_id = str(model.repo_id)
    if commit is None:
        raise ModelLoadError(f"no commit of {repo_id} was pinned; the gate must come first")
    if offline:
        return cached_snapshot(repo_id, commit)
    with _single_flight(repo_id):
        return _download(repo_id, access, commit)


def cached_snapshot(repo_id: str, commit: str) -> Path:
    """Return this node's copy of a commit, without any request.

    Raises:
        ModelLoadError: there is none, or files are missing from it.
    """
    try:
        directory = snapshot_download(
            repo_id,
            revision=commit,
            cache_dir=_cache(),
            local_files_only=True,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        message = f"{_cache()} has no complete copy of {repo_id} at {commit}"
        raise ModelLoadError(message) from None
    return Path(directory)


def _download(repo_id: str, access: AccessConfig, commit: str) -> Path:
    resolved = resolve_token(access)
    if resolved.fault is not None:
        raise AccessDenied(f"cannot download {repo_id}: {resolved.fault.message}")
    try:
        directory = snapshot_download(
            repo_id,
            revision=commit,
            cache_dir=_cache(),
            token=False if resolved.token is None else resolved.token.reveal(),
            endpoint=endpoint_of(access),
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
            library_name="serve-app",
            library_version=__version__,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _refused(repo_id, commit, error) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelLoadError(f"{repo_id} cannot be stored in {_cache()}: {reason}") from None
    except (httpx2.HTTPError, RuntimeError, ValueError) as error:  # hf_xet raises RuntimeError
        kind = type(error).__name__
        raise ModelLoadError(f"the download of {repo_id} at {commit} broke off ({kind})") from None
    return Path(directory)


def _refused(repo_id: str, commit: str, error: Exception) -> AccessDenied | ModelLoadError:
    # huggingface_hub 2.4 says "check your connection" for a 403; what happened is its cause.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    if not isinstance(cause, HfHubHTTPError):
        name = type(cause or error).__name__
        return ModelLoadError(f"{repo_id} at {commit} cannot be downloaded ({name})")
    status = cause.response.status_code
    words = sanitise(cause.response.headers.get("x-error-message", ""))
    said = f"the Hub answered {status}" + (f": {words}" if words else "")
    denied = isinstance(cause, GatedRepoError | RepositoryNotFoundError) or status in (401, 403)
    message = f"the download of {repo_id} at {commit} failed; {said}"
    if denied:
        return AccessDenied(message, status=status)
    return ModelLoadError(message, status=status)


def _cache() -> Path:
    return Path(constants.HF_HUB_CACHE)


@contextmanager
def _single_flight(repo_id: str) -> Iterator[None]:
    """Let one process of this node download a repository at a time; the next finds it done."""
    lock = _cache() / ".serve-app" / (repo_id.replace("/", "--") + ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
    except OSError as error:
        raise ModelLoadError(f"the cache {_cache()} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
