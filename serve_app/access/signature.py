"""Who signed a model: the bundle of OpenSSF Model Signing, and whether it covers these files.

`model.sig` at the root names every file with its SHA-256 and is signed by a key, or by an identity
of Sigstore. The gate compares it with the hashes that the Hub lists; who loads the files compares
it with their bytes. What else lies beside them must be signed too, or be what the signer left out,
and never a file that is loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serve_app.access.verdict import Outcome
from serve_app.access_config import SignatureConfig
from serve_app.checkpoint.files import SIGNATURE, is_read
from serve_app.redaction import sanitise

BUNDLE_BYTES = 8 << 20
UNSIGNED = f"there is no {SIGNATURE}, and access.signature demands one"
_SHOWN = 3  # of names in a sentence
_PIECE = 4 << 20


class Unverified(Exception):
    """Why a bundle does not vouch for the files, in one sentence."""

    outcome = Outcome.SIGNATURE_INVALID

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class Undecided(Unverified):
    """Why it cannot be said here; nobody may be at fault but this node."""

    outcome = Outcome.UNKNOWN


@dataclass(frozen=True, slots=True)
class Signed:
    """What somebody signed.

    Args:
        hashes: the SHA-256 of each file, hex, by its path.
        ignored: files and folders that the signer left out.
    """

    hashes: Mapping[str, str]
    ignored: frozenset[str] = frozenset()

    def leaves_out(self, path: str) -> bool:
        """Return whether the signer left a file out."""
        parts = path.split("/")
        return any("/".join(parts[:count]) in self.ignored for count in range(1, len(parts) + 1))


def signed_files(content: bytes, demanded: SignatureConfig) -> Signed:
    """Verify a bundle.

    Args:
        content: of `model.sig`.
        demanded: by which key, or which identity.

    Returns:
        What it covers.

    Raises:
        Unverified: it is no bundle, or signed by somebody else.
        Undecided: this node lacks the library, the key, or Sigstore's root of trust.
    """
    try:
        library = importlib.import_module("serve_app.access.bundle")
    except ImportError as error:
        raise Undecided(
            f"{error.name} is not installed on this node, so no signature can be verified",
            "Install the extra `signing` of serve-app in the environment of the replicas.",
        ) from None
    with tempfile.TemporaryDirectory(prefix="serve-app-signature-") as folder:
        place = Path(folder) / SIGNATURE
        place.write_bytes(content)
        found: Signed = library.verified(place, demanded)
        return found


def coverage_fault(signed: Signed, files: Mapping[str, str | None]) -> str | None:
    """Return how files differ from what was signed, in one sentence; None if they do not.

    Args:
        signed: from `signed_files`.
        files: every file by its path, with its SHA-256 as far as that is known.
    """
    others = {path for path in files if path != SIGNATURE} - signed.hashes.keys()
    uncovered = [path for path in others if _is_loaded(path) or not signed.leaves_out(path)]
    if uncovered:
        return f"{SIGNATURE} does not cover {_listed(uncovered)}"
    if absent := signed.hashes.keys() - files.keys():
        return f"{SIGNATURE} covers {_listed(absent)}, which is not there"
    known = {path: found for path, found in files.items() if found and path in signed.hashes}
    if changed := [path for path, found in known.items() if found != signed.hashes[path]]:
        return f"{_listed(changed)} has other bytes than were signed"
    return None


def sha256_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files of a directory, from their bytes; raises OSError."""
    found = {}
    for name in names:
        digest = hashlib.sha256()
        with (directory / name).open("rb") as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
        found[name] = digest.hexdigest()
    return found


def read_bundle(directory: Path) -> bytes:
    """Return the bundle of a directory.

    Raises:
        Unverified: there is none.
    """
    try:
        with (directory / SIGNATURE).open("rb") as stream:
            content = stream.read(BUNDLE_BYTES + 1)
    except FileNotFoundError:
        raise Unverified(UNSIGNED) from None
    except OSError as error:
        raise Undecided(f"{SIGNATURE} cannot be read: {error.strerror}") from None
    if len(content) > BUNDLE_BYTES:
        raise Unverified(f"{SIGNATURE} has more than {BUNDLE_BYTES:,} bytes")
    return content


def require_signed(
    directory: Path, hashes: Mapping[str, str], demanded: SignatureConfig, *, whole: bool
) -> None:
    """Compare files on this node with their signature.

    Args:
        directory: that holds them and the bundle.
        hashes: of every file, by path: 64 hex digits are the verified SHA-256 of its bytes;
            others are of files that are read here, if they are here.
        demanded: by which key, or which identity.
        whole: every file is here; else only those that are loaded.

    Raises:
        Unverified: they are not what was signed, or it cannot be said.
    """
    signed = signed_files(read_bundle(directory), demanded)
    known: dict[str, str | None] = {
        name: found if len(found) == 64 else None for name, found in hashes.items()
    }
    here = [name for name, found in known.items() if found is None and name != SIGNATURE]
    if not whole:
        here = [name for name in here if (directory / name).is_file()]
    try:
        known |= sha256_of(directory, here)
    except OSError as error:
        raise Undecided(f"{error.filename}: {error.strerror}") from None
    if fault := coverage_fault(signed, known):
        raise Unverified(fault)


def _is_loaded(path: str) -> bool:
    return path.endswith(".safetensors") or is_read(path)


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sanitise(name, limit=100) for name in sorted(names)[:_SHOWN]) + more
