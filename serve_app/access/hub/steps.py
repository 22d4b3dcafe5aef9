"""The questions that prove access, in order; each ends the probe unless its answer is right.

description -> license -> config.json -> index -> weights file (not followed) -> its first bytes,
directly or from the chunk store. The description is public and names the commit and the files;
from config.json on the gate decides; and only bytes prove that the way to them is open. What the
license and config.json say is compared with the policy and with what the engine can load, before
a byte of weights.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, urljoin

from serve_app.access.capacity import room_fault
from serve_app.access.hub import listing
from serve_app.access.hub.bounded_client import REDIRECTS, may_lead
from serve_app.access.hub.chunk_store import ChunkStore, chunk_hash
from serve_app.access.hub.classify import (
    Answer,
    Caller,
    Step,
    classify,
    has_no_route,
    holds_weights,
    total_bytes,
    whole_number,
)
from serve_app.access.hub.client import Failed, Wire
from serve_app.access.hub.description import read_description
from serve_app.access.hub.listing import Entries, Masked, ask_listing, described
from serve_app.access.hub.mirror import UNNAMED, is_listed, refuse_other_size, small_file
from serve_app.access.hub.network import host_of
from serve_app.access.hub.provenance import Provenance
from serve_app.access.hub.subject import Subject, Weights
from serve_app.access.verdict import CommitFacts, Outcome
from serve_app.checkpoint import files
from serve_app.checkpoint.adapter import WHOLE, adapter_refusal
from serve_app.checkpoint.runnable import Loader, Refusal, refusal, weights_bytes
from serve_app.errors import ModelLoadError
from serve_app.redaction import sanitise

JSON_BYTES = 16 << 20
FIRST_BYTES = 9  # a safetensors file's header length and the header's opening brace
WANTED = {"range": f"bytes=0-{FIRST_BYTES - 1}"}
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


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
        self._config: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._entries: Entries = {}
        self._compared: set[str] = set()  # small files whose bytes are those of the list
        self._is_mirror = False  # an answer for a file does not say of which commit it is
        self._has_chunk_store = True
        self._sent_bytes: int | None = None  # of the weights file, as it was announced
        self._provenance = Provenance(subject.terms, subject.facts)
        self.commit = subject.pinned
        self.weights_file = subject.weights_file
        self.weights_bytes = subject.weights_bytes

    def run(self) -> None:
        """Ask everything; returns only if the weights can be read.

        Raises:
            Failed: with the outcome of the first question that was not answered right.
        """
        # Else another node has asked all this of the same commit; the gate is passed below by each.
        if self.weights_file is None or not self._provenance.is_known:
            names = self._describe()
            self._provenance.learn(names, self._small_file, self._files)
            self._provenance.refuse()
            if self._subject.loader is not None:
                self._config = self._loadable(set(self._entries) or names, self._subject.loader)
            self._sizes |= {path: described(path, e).size for path, e in self._entries.items()}
            names = set(self._entries) or names
            self.weights_file = self._shard(names)
        self._provenance.refuse()
        self._provenance.verify(self._small_file, self._files)
        weights = self._listed(self.weights_file) or self._locate(self.weights_file)
        if self.weights_file == files.SINGLE and weights.size is not None:
            self._weigh(weights.size)
        self._refuse_size()
        self._prove_bytes(weights)
        if self._is_mirror:
            self._prove_commit(weights)

    def _prove_bytes(self, weights: Weights) -> None:
        if weights.xet_hash is not None and self._has_chunk_store:
            self._ask_chunk_store(weights, weights.xet_hash)
        else:
            self._read_first_bytes(weights)

    @property
    def mirror(self) -> str | None:
        """What answered in the Hub's place: a product's name, or that it is one; else None."""
        return self._wire.product or (UNNAMED if self._is_mirror else None)

    @property
    def facts(self) -> CommitFacts:
        """What was learned of the commit."""
        return self._provenance.facts

    def _describe(self) -> set[str]:
        """Learn the commit and the names of its files; public, so it proves nothing else."""
        revision = quote(self._subject.pinned or self._subject.revision, safe="")
        # With sizes the index need not be asked for: another request takes its place.
        sizes = "?blobs=true" if self._subject.wants_sizes else ""
        url = self._api_url(f"revision/{revision}{sizes}")
        answer = self._wire.ask(Step.DESCRIPTION, "GET", url, limit=JSON_BYTES)
        payload = answer.payload() if answer.is_ok else None
        if not isinstance(payload, dict):
            raise self._refusal(answer)
        found = read_description(payload, self._subject.pinned)
        self.commit = found.commit
        self._sizes = dict(found.sizes)
        self._provenance.describe(found.card)
        if answer.url != url and found.repo_id is not None:
            self._repo_id = found.repo_id  # renamed: ask there, not through a redirect each time
        return set(found.names)

    def _loadable(self, names: set[str], loader: Loader) -> dict[str, Any]:
        """Return the config of a model, or of an adapter, if the engine can load it."""
        name = files.ADAPTER_CONFIG if loader.adapter else files.CONFIG
        if name not in names:
            raise Failed(Outcome.WEIGHTS_MISSING, f"the repository has no {name}")
        raw = self._small_file(Step.CONFIG, name, files.CONFIG_BYTES)
        config = files.parse_json(raw)
        found = adapter_refusal(config, names) if loader.adapter else refusal(config, names, loader)
        if found:
            raise _unloadable(found)
        return dict(config)

    def _shard(self, names: set[str]) -> str:
        """Choose the weights file to look at, as transformers would find it."""
        try:
            entry = files.weights_entry(names, self._config)
            loader = self._subject.loader
            if entry is None or (entry == files.ADAPTER and loader and not loader.adapter):
                raise ModelLoadError(f"the repository has no {files.SINGLE} and no index")
            if loader and loader.adapter and entry != files.ADAPTER:
                raise _unloadable(Refusal("the repository holds a whole model", WHOLE))
            shards = self._indexed(entry, names) if files.is_index(entry) else [entry]
            if missing := sorted(set(shards) - names):
                listed = ", ".join(missing[:5])
                raise ModelLoadError(f"{len(missing)} weight files are not there: {listed}")
        except ModelLoadError as error:
            raise Failed(Outcome.WEIGHTS_MISSING, sanitise(error.message)) from None
        return shards[0]

    def _indexed(self, entry: str, names: set[str]) -> list[str]:
        """Return the shards of an index; whoever pinned the commit has read it.

        A complete set of numbered shards, whose sizes are known, stands for it too.
        """
        shards = sorted(name for name in names if _SHARD.fullmatch(name))
        is_whole = _is_complete(shards) and self._sizes.keys() >= set(shards)
        if is_whole:
            self._weigh(sum(self._sizes[shard] for shard in shards))
        if entry == files.INDEX and shards and (is_whole or self._subject.pinned is not None):
            return shards
        index = files.parse_index(
            self._small_file(Step.INDEX, entry, files.INDEX_BYTES), name=entry
        )
        if self._subject.loader is not None and not index.has_metadata:
            raise ModelLoadError(f"{entry} has no metadata, which transformers reads")
        if index.total_bytes is not None:
            self._weigh(index.total_bytes)
        return list(index.shards)

    def _small_file(self, step: Step, name: str, limit: int) -> bytes:
        url = self._file_url(name)
        answer = self._wire.ask(step, "GET", url, limit=limit + 1)
        location = urljoin(answer.url, answer.headers.get("location", ""))
        # A file over 10 MB lies with the weights.
        sent = answer
        if answer.status in (302, 307) and may_lead(answer.url, location):
            answer = self._wire.ask(step, "GET", location, limit=limit + 1)
        is_page = "html" in answer.headers.get("content-type", "")  # as a captive portal sends
        if not answer.is_ok or is_page:
            raise self._refusal(answer)
        if len(answer.body) > limit:
            raise Failed(Outcome.WEIGHTS_MISSING, f"{name} has more than {limit:,} bytes")
        self._refuse_other_commit(sent, name)
        entries = self._files() if self.mirror else self._entries  # the download needs them too
        if name in entries and not is_listed(answer.body, entries[name]):
            raise Failed(Outcome.UNKNOWN, f"{name} came with other bytes than are listed")
        self._compared.add(name)
        return answer.body

    def _weigh(self, listed: int) -> None:
        if self._subject.loader is not None:
            self.weights_bytes = weights_bytes(listed, self._config, self._subject.loader)

    def _refuse_size(self) -> None:
        if self.weights_bytes is None or self._subject.loader is None:
            return
        if found := room_fault(self.weights_bytes, self._subject.loader):
            raise _unloadable(found)

    def _locate(self, name: str) -> Weights:
        """Ask for the weights without taking them; here the gate decides."""
        # Not followed: the redirect itself is the Hub's yes, and its target gets no token.
        answer = self._ask_for(name)
        if not (answer.is_ok or (300 <= answer.status < 400 and "location" in answer.headers)):
            raise self._refusal(answer)
        self._refuse_other_commit(answer, name)
        sent = total_bytes(answer) if answer.is_ok else None
        linked = whole_number(answer.headers.get("x-linked-size"))
        size = self._sent_bytes = sent if linked is None else linked
        return Weights(answer, name, size, chunk_hash(answer.headers))

    def _ask_for(self, name: str) -> Answer:
        """Ask for a weights file; of a mirror, which often sends it itself, for the bytes too."""
        if self.mirror is None:
            return self._wire.ask(Step.WEIGHTS, "HEAD", self._file_url(name))
        url = self._file_url(name)
        return self._wire.ask(Step.WEIGHTS, "GET", url, limit=FIRST_BYTES, headers=WANTED)

    def _refuse_other_commit(self, answer: Answer, name: str) -> None:
        named = answer.headers.get("x-repo-commit")
        if named is None:
            self._is_mirror = True
        elif named != self.commit:
            message = f"the answer for {name} belongs to commit {named}"
            raise Failed(Outcome.UNKNOWN, sanitise(message), status=answer.status)

    def _prove_commit(self, weights: Weights) -> None:
        """Compare what a mirror sends with its list of the commit's files."""
        entries = self._files()
        if not self._compared & entries.keys():
            self._small_file(Step.CONFIG, small_file(entries), files.SMALL_BYTES)
        listed = self._listed(weights.name)
        is_same = listed is not None and listed.xet_hash == weights.xet_hash
        if not (is_same and self._has_chunk_store):  # which gave a byte of that very hash
            refuse_other_size(entries, weights.name, self._sent_bytes)

    def _files(self) -> Entries:
        self._entries = self._entries or self._list()
        return self._entries

    def _list(self) -> Entries:
        """Ask for all files of the commit with their hashes, which only a grant shows."""
        endpoint, commit = self._subject.endpoint, str(self.commit)
        try:
            return ask_listing(self._wire, endpoint, self._repo_id, commit)
        except Masked as masked:
            self._locate(masked.path)  # asked for the file itself, the Hub says why
            message = f"the Hub hides the hash of {masked.path}"
        except listing.Refusal as refusal:
            raise self._refusal(refusal.answer) from None
        except ModelLoadError as error:
            message = error.message
        raise Failed(Outcome.UNKNOWN, sanitise(message))

    def _listed(self, name: str) -> Weights | None:
        """Return what the listing says of a file in the chunk store, instead of asking for it."""
        file = described(name, self._entries[name]) if name in self._entries else None
        if file is None or file.xet_hash is None:
            return None
        return Weights(Answer(Step.LISTING, 200), name, file.size, file.xet_hash)

    def _read_first_bytes(self, weights: Weights) -> None:
        url = urljoin(weights.answer.url, weights.answer.headers.get("location", ""))
        if not may_lead(weights.answer.url, url):
            message = f"the Hub sends from https to {sanitise(host_of(url))}, which is not https"
            raise Failed(Outcome.WEIGHTS_UNREACHABLE, message, host=host_of(url))
        # Of the file and not of its answer's status: a CDN may say 200 to whatever it is asked.
        answer = weights.answer
        if not answer.body:
            answer = self._wire.ask(Step.BYTES, "GET", url, limit=FIRST_BYTES, headers=WANTED)
        if not holds_weights(answer, weights.size):
            host = host_of(answer.url)
            outcome = classify(answer, Caller(has_token=False))
            message = f"{host} answered {answer.status}, not the bytes of {weights.name}"
            raise Failed(outcome, sanitise(message), status=answer.status, host=host)
        self._sent_bytes = total_bytes(answer) or self._sent_bytes

    def _ask_chunk_store(self, weights: Weights, xet_hash: str) -> None:
        url = self._api_url(f"xet-read-token/{self.commit}")
        store = ChunkStore(self._wire, self._subject.endpoint, url)
        key = store.key()
        self._has_chunk_store = not has_no_route(key)
        if not self._has_chunk_store and weights.answer.step is not Step.LISTING:
            self._read_first_bytes(weights)  # a mirror passes on what it cannot give
            return
        if not key.is_ok and weights.answer.step is Step.LISTING:
            # A refusal has better words at the file, and a mirror may list what it cannot give.
            self._prove_bytes(self._locate(weights.name))
            return
        if not (key.is_ok and {"x-xet-cas-url", "x-xet-access-token"} <= key.headers.keys()):
            raise self._refusal(key)
        store.prove(key, weights.answer, weights.name, xet_hash)

    def _refusal(self, answer: Answer) -> Failed:
        caller = Caller(self._subject.has_token, of_mirror=bool(self.mirror))
        outcome = classify(answer, caller)
        words = answer.words or f"the {answer.step} was answered with status {answer.status}"
        if answer.status in REDIRECTS and (place := answer.headers.get("location")):
            host = sanitise(host_of(urljoin(answer.url, place)))
            words = f"the {answer.step} is sent on to {host}, which gets no token of this node"
        return Failed(outcome, words, status=answer.status)

    def _file_url(self, name: str) -> str:
        return f"{self._subject.endpoint}/{self._repo_id}/resolve/{self.commit}/{quote(name)}"

    def _api_url(self, tail: str) -> str:
        return f"{self._subject.endpoint}/api/models/{self._repo_id}/{tail}"


def _unloadable(found: Refusal) -> Failed:
    """Say what cannot be loaded: for this engine the repository holds no weights."""
    return Failed(Outcome.WEIGHTS_MISSING, sanitise(found.message), remedy=found.remedy)


def _is_complete(shards: list[str]) -> bool:
    """Return whether names like model-00001-of-00002.safetensors are all of their number."""
    counts = {int(name[:-12].rpartition("-")[2]) for name in shards}
    return counts == {len(shards)}
