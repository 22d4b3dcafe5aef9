"""What a commit is besides its name: asked of the Hub as far as the config judges by it.

The model description states the license for nothing. The license's text and the list of files
with their hashes cost one request each, of the first node alone: the others take them, like the
index, from that node's verdict about the same commit. A signature each node verifies itself. A
replica asks for itself before it loads anything, and compares what it loads with the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from serve_app.access.digest import listing_digest
from serve_app.access.hub.classify import Step
from serve_app.access.hub.client import Failed
from serve_app.access.hub.listing import Entries
from serve_app.access.license import license_file, stated_license, text_hash
from serve_app.access.signature import (
    BUNDLE_BYTES,
    UNSIGNED,
    Signed,
    Unverified,
    coverage_fault,
    signed_files,
)
from serve_app.access.terms import Terms
from serve_app.access.verdict import CommitFacts, Outcome
from serve_app.checkpoint import files
from serve_app.checkpoint.files import SIGNATURE

ReadFile = Callable[[Step, str, int], bytes]
ListFiles = Callable[[], Entries]


class Provenance:
    """One commit's license, and whether it is what the config wants.

    Args:
        terms: what is wanted.
        facts: what another node learned of the commit; None asks.
    """

    def __init__(self, terms: Terms, facts: CommitFacts | None) -> None:
        self._terms = terms
        self.is_known = facts is not None
        self.facts = facts or CommitFacts()
        self._signed: Signed | None = None

    def describe(self, description: Mapping[str, Any]) -> None:
        """Take what the model description states."""
        stated = stated_license(description.get("cardData"), description.get("tags"))
        self.facts = replace(self.facts, license_id=stated)

    def learn(self, names: Collection[str], read: ReadFile, list_files: ListFiles) -> None:
        """Ask for what the description does not state, as far as it is wanted.

        Args:
            names: of the commit's files.
            read: asks for a small file, within a limit of bytes.
            list_files: asks for the checked listing of the commit.

        Raises:
            Failed: a question was not answered right, or the signature is not the one wanted.
        """
        entries = list_files() if self._terms.wants_files else {}
        signed = self.verify(read, list_files)
        if self._terms.digest is not None:
            self.facts = replace(self.facts, digest=listing_digest(entries))
        name = license_file(entries or names)
        if (
            signed is not None and name is not None and name in signed.hashes
        ):  # compared with its bytes at loading
            self.facts = replace(self.facts, license_sha256=signed.hashes[name])
        elif self._terms.wants_text and name is not None:
            text = read(Step.LICENSE, name, files.SMALL_BYTES)
            self.facts = replace(self.facts, license_sha256=text_hash(text))

    def verify(self, read: ReadFile, list_files: ListFiles) -> Signed | None:
        """Compare the commit's list of files with its signature, as far as one is wanted.

        Every node verifies the bundle for itself, with the key that is there; what the bundle
        covers is compared once.

        Returns:
            What was signed; None if no signature is wanted.

        Raises:
            Failed: it is unsigned, signed by somebody else, or other files were signed.
        """
        demanded = self._terms.signature
        if demanded is None or self._signed is not None:
            return self._signed
        known = self.facts.bundle
        if known is None and SIGNATURE not in list_files():
            raise Failed(Outcome.SIGNATURE_INVALID, UNSIGNED)
        content = read(Step.SIGNATURE, SIGNATURE, BUNDLE_BYTES)
        try:
            signed = signed_files(content, demanded)
        except Unverified as fault:
            raise Failed(fault.outcome, fault.message, remedy=fault.remedy) from None
        bundle = hashlib.sha256(content).hexdigest()
        if bundle != known:  # another node has not compared what this one covers
            hashes = {name: entry.lfs_sha256 for name, entry in list_files().items()}
            if message := coverage_fault(signed, hashes):
                raise Failed(Outcome.SIGNATURE_INVALID, message)
        self._signed, self.facts = signed, replace(self.facts, bundle=bundle)
        return self._signed

    def refuse(self) -> None:
        """Compare what is known with what is wanted; raises Failed."""
        if found := self._terms.fault(self.facts):
            raise Failed(*found)
