"""Verifies a bundle with the library `model-signing` (extra `signing`), imported here alone.

The library's own way to verify hashes a whole directory. Here the files of a commit may not be on
the node yet, so its verifiers are asked for what was signed: private names of model-signing 1.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_signing._signing import sign_ec_key, sign_sigstore, sign_sigstore_pb
from model_signing.manifest import Manifest

from serve_app.access.signature import SIGNATURE, Signed, Undecided, Unverified
from serve_app.access_config import SignatureConfig
from serve_app.redaction import sanitise

_KEY_REMEDY = (
    "Put the signer's public key there, PEM of an elliptic curve (P-256, P-384 or P-521), or "
    "correct access.signature.public_key."
)
_TRUST_REMEDY = (
    "Let this node reach tuf-repo-cdn.sigstore.dev, or name a file of Sigstore's trust in "
    "access.signature.trust_file."
)


def verified(place: Path, demanded: SignatureConfig) -> Signed:
    """Verify a bundle in a file; see `signature.signed_files`."""
    verifier, bundle = _verifier(demanded), _bundle(place, demanded)
    try:
        manifest = verifier.verify(bundle)
    except Exception as error:  # noqa: BLE001 (of a stranger's bytes; what is not a yes is a no)
        reason = sanitise(str(error), limit=200) or type(error).__name__
        who = demanded.identity or f"the key in {demanded.public_key}"
        raise Unverified(f"{SIGNATURE} is not signed by {who}: {reason}") from None
    return _signed(manifest)


def _verifier(demanded: SignatureConfig) -> Any:
    if demanded.public_key is not None:
        place = Path(demanded.public_key).expanduser()
        try:
            return sign_ec_key.Verifier(place)
        except OSError as error:
            message = f"the public key {place} cannot be read: {error.strerror}"
            raise Undecided(message, _KEY_REMEDY) from None
        except Exception:  # noqa: BLE001 (whatever the parser of keys makes of the file)
            message = f"{place} holds no public key of an elliptic curve"
            raise Undecided(message, _KEY_REMEDY) from None
    trust = Path(demanded.trust_file).expanduser() if demanded.trust_file else None
    try:
        return sign_sigstore.Verifier(
            identity=str(demanded.identity), oidc_issuer=str(demanded.issuer), trust_config=trust
        )
    except Exception as error:  # noqa: BLE001 (network, files, and TUF's own errors)
        message = f"Sigstore's root of trust cannot be had ({type(error).__name__})"
        raise Undecided(message, _TRUST_REMEDY) from None


def _bundle(place: Path, demanded: SignatureConfig) -> Any:
    kind = sign_sigstore if demanded.public_key is None else sign_sigstore_pb
    try:
        return kind.Signature.read(place)
    except Exception:  # noqa: BLE001 (of a stranger's bytes)
        how = "a Sigstore identity" if demanded.public_key is None else "a key"
        raise Unverified(f"{SIGNATURE} is no bundle that was signed by {how}") from None


def _signed(manifest: Manifest) -> Signed:
    how: Mapping[str, Any] = manifest.serialization_type
    listed = {str(each.identifier): each.digest for each in manifest.resource_descriptors()}
    if how.get("method") != "files" or any(each.algorithm != "sha256" for each in listed.values()):
        raise Unverified(
            f"{SIGNATURE} lists no SHA-256 of whole files, which could be compared: sign with "
            "file serialization and sha256"
        )
    ignored = frozenset(str(path) for path in how.get("ignore_paths", ()))
    return Signed({name: each.digest_hex for name, each in listed.items()}, ignored)
