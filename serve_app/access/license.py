"""The license of a model: what its card states, its text, and whether the config allows it.

What a card states is a claim of whoever published the model; the text's hash is what was read
and accepted. A policy that finds nothing to judge by refuses: no license known is not allowed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.access.verdict import CommitFacts
from serve_app.access_config import LicensePolicy
from serve_app.checkpoint import files
from serve_app.errors import ModelLoadError
from serve_app.redaction import sanitise

LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
CARD = "README.md"
CARD_BYTES = files.MIB
_SHOWN = 8  # of a list in a sentence
_TAG = "license:"


@dataclass(frozen=True, slots=True)
class License:
    """The license text in a copy of the model.

    Args:
        title: its first line that is not empty, cleaned and shortened.
        sha256: of the whole text.
    """

    title: str
    sha256: str


def license_in(copy: Path) -> License | None:
    """Return the license text that lies in a model's directory, if there is one."""
    for name in LICENSES:
        with suppress(OSError, ModelLoadError):
            text = files.read_limited(copy / name, files.SMALL_BYTES)
            if not text:
                continue
            lines = text.decode("utf-8", "replace").splitlines()
            title = next((line.strip() for line in lines if line.strip()), name)
            return License(sanitise(title, limit=120), text_hash(text))
    return None


def text_hash(text: bytes) -> str:
    """Return what names a license text: its SHA-256 in hex."""
    return hashlib.sha256(text).hexdigest()


def license_file(names: Collection[str]) -> str | None:
    """Return which of a commit's files is its license text; None if none is."""
    return next((name for name in LICENSES if name in names), None)


def stated_license(card: Any, tags: Any = ()) -> str | None:
    """Return the license that a model card states, in lower case.

    Args:
        card: the card's metadata, as the Hub lists it (`cardData`) or its front matter holds it.
        tags: the Hub's tags of the model, for a Hub that lists no card.

    Returns:
        The id; of `other` its `license_name`; several joined by a comma; None if none is stated.
    """
    facts: Mapping[str, Any] = card if isinstance(card, Mapping) else {}
    found = facts.get("license")
    ids = _words(found if isinstance(found, list) else [found])
    if not ids and isinstance(tags, list | tuple):
        ids = _words(tag.removeprefix(_TAG) for tag in _strings(tags) if tag.startswith(_TAG))
    name = _words([facts.get("license_name")])
    named = [name[0] if each == "other" and name else each for each in ids]
    return ", ".join(dict.fromkeys(named)) or None


def facts_of(directory: Path) -> CommitFacts:
    """Return what a model's directory says of its license."""
    text = license_in(directory)
    card = stated_license(_front_matter(directory / CARD))
    return CommitFacts(license_id=card, license_sha256=text.sha256 if text else None)


def license_fault(policy: LicensePolicy | None, facts: CommitFacts) -> str | None:
    """Return why a license is not allowed, in one sentence; None if it is, or nobody asks.

    Args:
        policy: `access.license` of the config.
        facts: of the commit, with the text's hash where the policy asks for it.
    """
    if policy is None:
        return None
    return _id_fault(policy, facts) or _text_fault(policy, facts)


def _id_fault(policy: LicensePolicy, facts: CommitFacts) -> str | None:
    allowed = None if policy.allow is None else f"allowed are {_listed(policy.allow)}"
    if facts.license_id is None:
        # An accepted text says more than a card, which may be missing.
        if policy.allow is None and policy.text_sha256 is not None:
            return None
        return f"the model card states no license; {allowed or 'one must be stated'}"
    stated = facts.license_id.split(", ")
    if policy.allow is None or all(each in policy.allow for each in stated):
        return None
    return sanitise(f"the model card states the license {facts.license_id}; {allowed}")


def _text_fault(policy: LicensePolicy, facts: CommitFacts) -> str | None:
    if policy.text_sha256 is None or facts.license_sha256 in policy.text_sha256:
        return None
    accepted = f"accepted is {_listed(policy.text_sha256)}"
    if facts.license_sha256 is None:
        return f"this commit has no license text ({', '.join(LICENSES)}); {accepted}"
    return f"the license text of this commit has SHA-256 {facts.license_sha256}; {accepted}"


def _front_matter(card: Path) -> Any:
    """Return the metadata at the head of a model card; None if there is none."""
    try:
        text = files.read_limited(card, CARD_BYTES).decode("utf-8", "replace")
        head, mark, rest = text.lstrip("\ufeff").partition("---\n")
        if head.strip() or not mark:
            return None
        return yaml.safe_load(rest.partition("\n---")[0])
    except (OSError, ModelLoadError, yaml.YAMLError, ValueError, RecursionError):
        return None


def _strings(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def _words(values: Any) -> list[str]:
    cleaned = (sanitise(value, limit=100).lower() for value in _strings(values))
    return [value for value in cleaned if value]


def _listed(values: tuple[str, ...]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(values[:_SHOWN]) + more
