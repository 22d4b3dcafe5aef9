"""What the config wants of a commit besides access, compared with what the commit is."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.access.digest import digest_fault
from serve_app.access.license import license_fault
from serve_app.access.verdict import CommitFacts, Outcome
from serve_app.access_config import AccessConfig, LicensePolicy, SignatureConfig
from serve_app.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Terms:
    """What the config wants of a commit.

    Args:
        license: the policy; None allows any license.
        digest: `model.digest`; None allows any files.
        signature: who must have signed them; None allows anybody's.
    """

    license: LicensePolicy | None = None
    digest: str | None = None
    signature: SignatureConfig | None = None

    @classmethod
    def of(cls, model: ModelConfig, access: AccessConfig) -> Terms:
        """Return what a config wants."""
        return cls(access.license, model.digest, access.signature)

    @property
    def wants_files(self) -> bool:
        """Return whether the list of files has to be read."""
        return self.digest is not None or self.signature is not None

    @property
    def wants_text(self) -> bool:
        """Return whether the license's text has to be read."""
        return self.license is not None and self.license.text_sha256 is not None

    def fault(self, facts: CommitFacts) -> tuple[Outcome, str] | None:
        """Return the outcome and the sentence for a commit that is not as wanted; else None."""
        if message := license_fault(self.license, facts):
            return Outcome.LICENSE_NOT_ALLOWED, message
        if message := digest_fault(self.digest, facts.digest):
            return Outcome.DIGEST_MISMATCH, message
        return None
