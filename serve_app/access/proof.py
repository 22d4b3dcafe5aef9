"""The questions that prove access, in order; each ends the probe unless its answer is right.

description -> index -> weights file (not followed) -> its first bytes, or the chunk store.
The description is public and tells the commit and the files; the gate decides at the weights
file; and only bytes, or the store's plan for them, prove that the way to them is open.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from huggingface_hub import constants

from serve_app.access.answers import Answer, Caller, Step, classify, holds_weights, whole_number
from serve_app.access.local import INDEX, SINGLE, shards_of
from serve_app.access.report import sanitise
from serve_app.access.verdict import Outcome
from serve_app.access.wire import Failed, Wire, origin
from serve_app.config import check_endpoint

JSON_BYTES = 16 << 20
WORDS_BYTES = 64 << 10  # of an answer that is read for its words only
FIRST_BYTES = 9  # a safetensors file's header length and the header's opening brace
COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be read, and who asks.

    Args:
        endpoint: the Hub, without a trailing slash.
        repo_id: the repository.
        revision: branch, tag or commit.
        pinned: the commit that the revision was resolved to before, whose index counts as
            proven; None resolves it.
        weights_file: the file of the pinned commit to look at, if it is known.
        has_token: whether the requests carry a token.
    """

    endpoint: str
    repo_id: str
    revision: str
    pinned: str | None
    weights_file: str | None
    has_token: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """What the Hub says about one file of weights."""

    answer: Answer
    name: str
    size: int | None


class Proof:
    """One attempt to read the weights.

    Args:
        subject: what is to be read.
        wire: how it is asked.
    """

    def __init__(self, subject: Subject, wire: Wire) -> None:
        self._subject = subject
        self._wire = wire
        self._repo_id = subject.repo_id
        self.commit = subject.pinned
        self.weights_file = subject.weights_file

    def run(self) -> None:
        """Ask everything; returns only if the weights can be read.

        Raises:
            Failed: with the outcome of the first question that was not answered right.
        """
        if self.weights_file is None:
            self.weights_file = self._shard(self._describe())
        weights = self._locate(self.weights_file)
        xet_hash = weights.answer.headers.get("x-xet-hash", "")
        if re.fullmatch(r"[0-9a-f]{64}", xet_hash) and downloads_by_xet():
            self._ask_xet_store(weights, xet_hash)
        else:
            self._read_first_bytes(weights)

    def _describe(self) -> set[str]:
        """Learn the commit and the names of its files; public, so it proves nothing else."""
        revision = quote(self._subject.pinned or self._subject.revision, safe="")
        url = self._api_url(f"revision/{revision}")
        answer = self._wire.ask(Step.DESCRIPTION, "GET", url, limit=JSON_BYTES)
        payload = answer.payload() if answer.is_ok else None
        if not isinstance(payload, dict):
            raise self._refusal(answer)
        commit, names = payload.get("sha"), _names(payload.get("siblings"))
        if not (isinstance(commit, str) and COMMIT.fullmatch(commit)) or names is None:
            raise Failed(Outcome.UNKNOWN, "the model description names no commit or no files")
        if self._subject.pinned not in (None, commit):
            message = f"asked for commit {self._subject.pinned}, was told about {commit}"
            raise Failed(Outcome.UNKNOWN, message)
        self.commit = commit
        name = payload.get("id")
        if answer.url != url and isinstance(name, str) and _REPO.fullmatch(name):
            self._repo_id = name  # renamed: ask there, not through a redirect each time
        return names

    def _shard(self, names: set[str]) -> str:
        """Choose the weights file to look at, as transformers would find it."""
        if SINGLE in names:
            return SINGLE
        if INDEX not in names:
            raise Failed(Outcome.WEIGHTS_MISSING, f"the repository has no {SINGLE} and no index")
        shards = sorted(name for name in names if _SHARD.fullmatch(name))
        if self._subject.pinned is None or not shards:
            shards = self._indexed()
        missing = sorted(set(shards) - names)
        if missing:
            listed = ", ".join(missing[:5])
            message = f"the index names {len(missing)} files that are not there: {listed}"
            raise Failed(Outcome.WEIGHTS_MISSING, sanitise(message))
        return shards[0]

    def _indexed(self) -> list[str]:
        url = self._file_url(INDEX)
        answer = self._wire.ask(Step.INDEX, "GET", url, limit=JSON_BYTES)
        location = answer.headers.get("location")
        if answer.status in (302, 307) and location:  # an index over 10 MB lies with the weights
            answer = self._wire.ask(
                Step.INDEX, "GET", urljoin(answer.url, location), limit=JSON_BYTES
            )
        if not answer.is_ok or answer.payload() is None:
            raise self._refusal(answer)
        shards = shards_of(answer.payload())
        if not shards:
            raise Failed(Outcome.WEIGHTS_MISSING, f"{INDEX} names no files")
        return shards

    def _locate(self, name: str) -> Weights:
        """Ask for the weights without taking them; here the gate decides."""
        answer = self._wire.ask(Step.WEIGHTS, "HEAD", self._file_url(name))
        if not (answer.is_ok or (300 <= answer.status < 400 and "location" in answer.headers)):
            raise self._refusal(answer)
        told = answer.headers.get("x-repo-commit")
        if told != self.commit:
            message = f"the answer for {name} belongs to commit {told or 'unknown'}"
            raise Failed(Outcome.UNKNOWN, sanitise(message), status=answer.status)
        length = answer.headers.get("content-length") if answer.is_ok else None
        return Weights(answer, name, whole_number(answer.headers.get("x-linked-size") or length))

    def _read_first_bytes(self, weights: Weights) -> None:
        url = urljoin(weights.answer.url, weights.answer.headers.get("location", ""))
        wanted = {"range": f"bytes=0-{FIRST_BYTES - 1}", "accept-encoding": "identity"}
        answer = self._wire.ask(Step.BYTES, "GET", url, limit=FIRST_BYTES, headers=wanted)
        if not holds_weights(answer, weights.size):
            raise self._not_served(answer, weights.name)

    def _ask_xet_store(self, weights: Weights, xet_hash: str) -> None:
        """Ask the chunk store how the file is put together, with the key the Hub gives for it."""
        url = self._api_url(f"xet-read-token/{self.commit}")
        key = self._wire.ask(Step.XET_TOKEN, "GET", url, limit=WORDS_BYTES)
        store = key.headers.get("x-xet-cas-url", "").rstrip("/")
        secret = key.headers.get("x-xet-access-token")
        if not (key.is_ok and store and secret):
            raise self._refusal(key)
        try:
            check_endpoint(store)
        except ValueError as error:
            message = f"the storage's URL {error}"
            raise Failed(Outcome.WEIGHTS_UNREACHABLE, message) from None
        url = _linked(weights.answer, store) or f"{store}/v2/reconstructions/{xet_hash}"
        wanted = {"authorization": f"Bearer {secret}", "range": "bytes=0-0"}
        answer = self._wire.ask(Step.XET_STORE, "GET", url, limit=JSON_BYTES, headers=wanted)
        payload = answer.payload() if answer.is_ok else None
        if not (isinstance(payload, dict) and payload.get("terms")):
            raise self._not_served(answer, weights.name)

    def _refusal(self, answer: Answer) -> Failed:
        outcome = classify(answer, Caller(has_token=self._subject.has_token))
        words = answer.words or f"the {answer.step} was answered with status {answer.status}"
        return Failed(outcome, words, status=answer.status)

    def _not_served(self, answer: Answer, name: str) -> Failed:
        host = urlsplit(answer.url).netloc
        outcome = classify(answer, Caller(has_token=False))
        message = f"{host} answered {answer.status}, not the bytes of {name}"
        return Failed(outcome, sanitise(message), status=answer.status, host=host)

    def _file_url(self, name: str) -> str:
        return f"{self._subject.endpoint}/{self._repo_id}/resolve/{self.commit}/{quote(name)}"

    def _api_url(self, tail: str) -> str:
        return f"{self._subject.endpoint}/api/models/{self._repo_id}/{tail}"


def downloads_by_xet() -> bool:
    """Tell whether huggingface_hub 2.4 would use the chunk store in this process."""
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _names(siblings: Any) -> set[str] | None:
    if not isinstance(siblings, list) or not all(isinstance(entry, dict) for entry in siblings):
        return None
    return {name for entry in siblings if isinstance(name := entry.get("rfilename"), str)}


def _linked(answer: Answer, store: str) -> str | None:
    """Return the store's URL that the Hub names for this file, if it is on the store's origin."""
    pattern = r'<([^>]+)>;\s*rel="xet-reconstruction-info"'
    match = re.search(pattern, answer.headers.get("link", ""))
    return match[1] if match and origin(match[1]) == origin(store) else None
