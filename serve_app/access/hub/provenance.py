"""What a commit is besides its name: asked of the Hub as far as the config judges by it.

The model description states the license for nothing. The license's text and the list of files
with their hashes cost one request each, of the first node alone: the others take them, like the
index, from that node's verdict about the same commit. A replica asks for itself before it loads
anything, and compares what it loads with the same digest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from huggingface_hub._tree_cache import TreeCacheEntry

from serve_app.access.digest import listing_digest
from serve_app.access.hub.classify import Step
from serve_app.access.hub.client import Failed
from serve_app.access.hub.listing import Entries, described
from serve_app.access.hub.model_files import content_hash
from serve_app.access.license import license_file, stated_license, text_hash
from serve_app.access.terms import Terms
from serve_app.access.verdict import CommitFacts, Outcome
from serve_app.checkpoint import files

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

    def describe(self, description: Mapping[str, Any]) -> None:
        """Take what the model description states."""
        stated = stated_license(description.get("cardData"), description.get("tags"))
        self.facts = replace(self.facts, license_id=stated)

    def learn(self, names: Collection[str], read: ReadFile, list_files: ListFiles) -> Entries:
        """Ask for what the description does not state, as far as it is wanted.

        Args:
            names: of the commit's files.
            read: asks for a small file, within a limit of bytes.
            list_files: asks for the checked listing of the commit.

        Returns:
            The listing; empty if it was not wanted.

        Raises:
            Failed: a question was not answered right.
        """
        entries: Entries = {}
        if self._terms.digest is not None:
            entries = list_files()
            self.facts = replace(self.facts, digest=listing_digest(entries))
        name = license_file(entries or names)
        if self._terms.wants_text and name is not None:
            text = read(Step.LICENSE, name, files.SMALL_BYTES)
            if (listed := entries.get(name)) and not _is_listed(text, listed):
                raise Failed(Outcome.UNKNOWN, f"{name} came with other bytes than are listed")
            self.facts = replace(self.facts, license_sha256=text_hash(text))
        return entries

    def refuse(self) -> None:
        """Compare what is known with what is wanted; raises Failed."""
        if found := self._terms.fault(self.facts):
            raise Failed(*found)


def _is_listed(content: bytes, entry: TreeCacheEntry) -> bool:
    etag = described("", entry).etag
    return content_hash(content, etag) == etag
