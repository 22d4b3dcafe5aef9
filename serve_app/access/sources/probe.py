"""The proof of one node that it can read a model in a source without commits.

credentials -> listing, compared with the pin -> small files and the headers of the weights, checked
as those of a directory are -> license, digest, signature. A node that is told by another one what
that one found of the same listing asks for the listing, the signature and the first bytes of the
weights itself. What cannot be proven is `unknown`, and blocks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from serve_app.access import local
from serve_app.access.capacity import room_fault
from serve_app.access.digest import digest_of
from serve_app.access.hub.client import Failed
from serve_app.access.license import facts_of
from serve_app.access.limited import within
from serve_app.access.signature import (
    BUNDLE_BYTES,
    UNSIGNED,
    Unverified,
    coverage_fault,
    signed_files,
)
from serve_app.access.sources import source as sources
from serve_app.access.sources.sketch import draw, model_items
from serve_app.access.sources.source import Item, Source
from serve_app.access.sources.words import remedy_at
from serve_app.access.terms import Terms
from serve_app.access.verdict import CommitFacts, NodeVerdict, Outcome, TokenReport
from serve_app.checkpoint import files
from serve_app.checkpoint.headers import HEADER_BYTES
from serve_app.checkpoint.runnable import Loader, weights_bytes
from serve_app.config import AccessConfig, ModelConfig
from serve_app.redaction import sanitise

FIRST_BYTES = 9  # a safetensors file's header length and the header's opening brace


class SourceProbe:
    """One check of what lies at `model.url`.

    Args:
        model: what is to be read.
        access: endpoint and limits.
        commit: the pin, 64 hex digits; None takes that of `model.revision`, or what is listed now.
        hint: what another node learned of the same listing.
        loader: what will load it; None asks for access alone.
    """

    def __init__(
        self,
        model: ModelConfig,
        access: AccessConfig,
        *,
        commit: str | None,
        hint: NodeVerdict | None,
        loader: Loader | None,
    ) -> None:
        self._model = model
        self._access = access
        self._terms = Terms.of(model, access)
        self._pin = commit or model.pin
        has_found = hint is not None and hint.commit == self._pin and hint.weights_file is not None
        self._hint = hint if has_found else None
        self._loader = loader
        self._source: Source | None = None
        self._weights_file = self._hint.weights_file if self._hint else None
        self._weights_bytes = self._hint.weights_bytes if self._hint else None
        self._facts = self._hint.facts if self._hint else CommitFacts()

    def bounded(self, limit_s: float) -> NodeVerdict:
        """Prove within a limit of time; never raises."""
        if verdict := within(limit_s, self.run):
            return verdict
        message = f"no answer within {limit_s:g} s"
        return self._verdict(Failed(Outcome.HUB_UNREACHABLE, message))

    def run(self) -> NodeVerdict:
        """Prove; never raises."""
        try:
            with sources.opened(self._model, self._access) as source:
                self._source = source
                self._prove(source)
        except Failed as failed:
            return self._verdict(failed)
        except Exception as error:  # noqa: BLE001 (unknown is no, and its text may hold a secret)
            message = f"the probe itself failed ({type(error).__name__})"
            return self._verdict(Failed(Outcome.UNKNOWN, message))
        return self._verdict(Failed(Outcome.GRANTED, ""))

    def _prove(self, source: Source) -> None:
        items = sources.listing_of(source)
        if self._pin is not None:
            sources.require_pin(items, self._pin)
        self._pin = sources.pin_of(items)
        if self._hint is None:
            self._examine(source, items)
        if found := self._terms.fault(self._facts):
            raise Failed(*found)
        self._require_signed(source, items)
        self._require_room()
        self._read_first_bytes(source, items)

    def _examine(self, source: Source, items: Mapping[str, Item]) -> None:
        """Check the model as a directory is checked, before its weights are here."""
        _, weights = model_items(source, items)
        with tempfile.TemporaryDirectory(prefix="serve-app-sketch-") as folder:
            place = Path(folder)
            draw(place, source, items, weights)
            verdict = local.check_directory(folder, self._loader)
            self._facts = facts_of(place)
            if verdict.outcome is not Outcome.GRANTED:
                raise self._unfit(verdict, folder)
            if self._loader is not None:
                config = files.parse_json((place / files.CONFIG).read_bytes())
                listed = sum(items[name].size for name in weights)
                self._weights_bytes = weights_bytes(listed, config, self._loader)
        self._weights_file = weights[0]
        if self._terms.digest is not None:
            digest = digest_of(sources.content_hashes(source, items))
            self._facts = replace(self._facts, digest=digest)

    def _unfit(self, verdict: NodeVerdict, folder: str) -> Failed:
        """Say of the source what was found in its sketch."""
        url = str(self._model.url)
        message = (verdict.hub_message or "").replace(folder, url)
        remedy = None if folder in verdict.remedy else verdict.remedy
        return Failed(verdict.outcome, message, remedy=remedy)

    def _require_signed(self, source: Source, items: Mapping[str, Item]) -> None:
        """Compare the listing with its signature; who loads the files compares their bytes."""
        demanded = self._terms.signature
        if demanded is None:
            return
        if files.SIGNATURE not in items:
            raise Failed(Outcome.SIGNATURE_INVALID, UNSIGNED)
        try:
            content = sources.whole(source, items[files.SIGNATURE], BUNDLE_BYTES)
            signed = signed_files(content, demanded)
        except Unverified as fault:
            raise Failed(fault.outcome, fault.message, remedy=fault.remedy) from None
        stated = {name: item.sha256 for name, item in items.items()}
        if message := coverage_fault(signed, stated):
            raise Failed(Outcome.SIGNATURE_INVALID, message)

    def _require_room(self) -> None:
        if self._loader is None or self._weights_bytes is None:
            return
        if found := room_fault(self._weights_bytes, self._loader):
            raise Failed(Outcome.WEIGHTS_MISSING, sanitise(found.message), remedy=found.remedy)

    def _read_first_bytes(self, source: Source, items: Mapping[str, Item]) -> None:
        item = items[str(self._weights_file)]
        content = source.read(item, 0, min(FIRST_BYTES, item.size)) if item.size else b""
        length = int.from_bytes(content[:8], "little")
        fits = 2 <= length <= min(HEADER_BYTES, item.size - 8)
        if content[8:] != b"{" or not fits:
            message = f"{item.name} does not begin as safetensors does"
            raise Failed(Outcome.WEIGHTS_MISSING, sanitise(message))

    def _verdict(self, end: Failed) -> NodeVerdict:
        """Return the node's verdict for how the proof ended."""
        source, url = self._source, str(self._model.url)
        credentials = source.credentials if source else TokenReport("unresolved")
        outcome = end.outcome
        if outcome is Outcome.TOKEN_SCOPE and credentials.source == "none":
            outcome = Outcome.NO_TOKEN
        remedy = end.remedy or remedy_at(
            outcome,
            url=url,
            source=credentials.source,
            endpoint=source.endpoint if source else (self._access.endpoint or url),
        )
        return NodeVerdict(
            node_id="",
            node_name="",
            outcome=outcome,
            remedy=remedy[:1].upper() + remedy[1:],
            hub_message=sanitise(end.message) or None,
            token=credentials,
            hub_requests=source.requests if source else 0,
            commit=self._pin,
            weights_file=self._weights_file,
            weights_bytes=self._weights_bytes,
            facts=self._facts,
        )
