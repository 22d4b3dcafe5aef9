"""Signatures for tests: a key made here, and bundles as `model_signing sign` writes them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import hashing, signing

from serve_app.access_config import SignatureConfig

_PEM = serialization.Encoding.PEM


class Signer:
    """Whoever holds a private key.

    Args:
        folder: where the keys are put.
    """

    def __init__(self, folder: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        self._private = folder / "private.pem"
        self.public = folder / "public.pem"
        kind, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        self._private.write_bytes(key.private_bytes(_PEM, kind, plain))
        public = serialization.PublicFormat.SubjectPublicKeyInfo
        self.public.write_bytes(key.public_key().public_bytes(_PEM, public))

    @property
    def demanded(self) -> SignatureConfig:
        """What a config says that demands this signer."""
        return SignatureConfig(public_key=str(self.public))

    def signed(
        self,
        files: Mapping[str, bytes | Path],
        *,
        ignore: Sequence[str] = (),
        shards: bool = False,
    ) -> dict[str, bytes | Path]:
        """Return files with the bundle that covers them."""
        with tempfile.TemporaryDirectory() as folder:
            place = write_files(Path(folder) / "model", files)
            how = hashing.Config()
            how = how.use_shard_serialization() if shards else how.use_file_serialization()
            how.set_ignored_paths(paths=[place / "model.sig", *(place / each for each in ignore)])
            signer = signing.Config().use_elliptic_key_signer(private_key=self._private)
            signer.set_hashing_config(how).sign(place, place / "model.sig")
            return {**files, "model.sig": (place / "model.sig").read_bytes()}


def write_files(place: Path, files: Mapping[str, bytes | Path]) -> Path:
    """Write a repository's files into a directory, and return it."""
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return place
