"""What a commit is besides its name: asked of the Hub as far as the config judges by it.

The model description states the license for nothing. The license's text costs one request, of
the first node alone: the others take it, like the index, from that node's verdict about the same
commit. A replica asks for itself before it loads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve_app.access.hub.classify import Step
from serve_app.access.hub.client import Failed
from serve_app.access.license import license_fault, license_file, stated_license, text_hash
from serve_app.access.verdict import CommitFacts, Outcome
from serve_app.access_config import LicensePolicy
from serve_app.checkpoint import files

ReadFile = Callable[[Step, str, int], bytes]


@dataclass(frozen=True, slots=True)
class Terms:
    """What the config wants of a commit.

    Args:
        license: the policy; None allows any license.
    """

    license: LicensePolicy | None = None

    @property
    def wants_text(self) -> bool:
        """Return whether the license's text has to be read."""
        return self.license is not None and self.license.text_sha256 is not None


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

    def learn(self, names: Collection[str], read: ReadFile) -> None:
        """Ask for what the description does not state, as far as it is wanted.

        Args:
            names: of the commit's files.
            read: asks for a small file, within a limit of bytes.

        Raises:
            Failed: a question was not answered right.
        """
        name = license_file(names)
        if self._terms.wants_text and name is not None:
            text = read(Step.LICENSE, name, files.SMALL_BYTES)
            self.facts = replace(self.facts, license_sha256=text_hash(text))

    def refuse(self) -> None:
        """Compare what is known with what is wanted; raises Failed."""
        if fault := license_fault(self._terms.license, self.facts):
            raise Failed(Outcome.LICENSE_NOT_ALLOWED, fault)
