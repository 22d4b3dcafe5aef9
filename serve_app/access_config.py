"""The `access:` part of the config: how every node proves that it can read the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve_app.endpoint import CLEAR_TEXT, check_endpoint, is_plain_http

SHA256 = re.compile(r"[0-9a-f]{64}")


class Part(BaseModel):
    """A part of the tree: frozen, unknown keys refused, its input never echoed."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class LicensePolicy(Part):
    """Which licenses may be served; with neither key, any that the model states."""

    allow: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="license ids as the model card states them (`llama3.2`, `apache-2.0`), for "
        "`other` its `license_name`; null: any, but one must be stated",
    )
    text_sha256: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="SHA-256 of the license texts that were accepted, hex; a refusal names the "
        "one it found, and so does `serve-app receipt --json`; null: any text",
    )

    @field_validator("allow")
    @classmethod
    def _ids(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not all(0 < len(name.strip()) <= 256 for name in value):
            raise ValueError("must be license ids of 1 to 256 characters, such as apache-2.0")
        return value and tuple(name.strip().lower() for name in value)

    @field_validator("text_sha256")
    @classmethod
    def _hashes(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        plain = value and tuple(text.lower().removeprefix("sha256:") for text in value)
        if plain is not None and not all(SHA256.fullmatch(text) for text in plain):
            raise ValueError("must be SHA-256 hashes of license texts, 64 hex digits each")
        return plain


class IdentityConfig(Part):
    """An identity token of every node, exchanged for a Hub token: no secret is stored."""

    token_file: str = Field(
        min_length=1, description="file that holds the identity token (a JWT), on every node"
    )
    resource: str = Field(
        pattern=r"^(user|model/[A-Za-z0-9._-]+)/[A-Za-z0-9._-]+$",
        max_length=200,
        description="what access is asked for: `user/NAME` or `model/OWNER/NAME`, whose Trusted "
        "Publisher the identity is",
    )
    audience: str = Field(
        "https://huggingface.co",
        min_length=1,
        description="the `aud` claim that the identity token must have",
    )


class SignatureConfig(Part):
    """Who must have signed the files (OpenSSF Model Signing, `model.sig`): a key or an identity."""

    public_key: str | None = Field(
        None,
        min_length=1,
        description="file of the signer's public key (PEM, P-256, P-384 or P-521), on every node; "
        "needs no network",
    )
    identity: str | None = Field(
        None,
        min_length=1,
        description="the signer's Sigstore identity: a mail address or a workflow's URL",
    )
    issuer: str | None = Field(
        None, min_length=1, description="who vouched for the identity: URL of its OpenID provider"
    )
    trust_file: str | None = Field(
        None,
        min_length=1,
        description="file of Sigstore's trust (JSON of a ClientTrustConfig), on every node; null: "
        "asked of Sigstore over the network",
    )

    @model_validator(mode="after")
    def _names_one_signer(self) -> SignatureConfig:
        by_identity = self.identity is not None and self.issuer is not None
        if (self.public_key is None) != by_identity or (
            self.public_key is not None and (self.identity or self.issuer or self.trust_file)
        ):
            raise ValueError("set either public_key, or identity and issuer")
        if find_spec("model_signing") is None:
            raise ValueError("needs the extra `signing`: pip install 'serve-app[signing]'")
        return self


class AccessConfig(Part):
    """How every node proves that it can read the weights."""

    token_file: str | None = Field(
        None, description="file that holds the token, on every node; `~` works"
    )
    token_env: str = Field(
        "HF_TOKEN", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="name of the token's variable"
    )
    endpoint: str | None = Field(
        None,
        description="Hub URL; default: HF_ENDPOINT or huggingface.co. With `model.url` that of the "
        "store's API; default: the node's own settings",
    )
    allow_http: bool = Field(
        default=False,
        description="send the token over plain http, to a mirror in a trusted network",
    )
    timeout_s: float = Field(5, gt=0, le=60, description="limit of one request to the Hub")
    deadline_s: float = Field(30, gt=0, le=600, description="limit of the whole gate")
    watch_interval_s: float = Field(900, ge=1, description="re-check while serving")
    on_unreachable: Literal["block", "allow_cached"] = Field(
        "block", description="`allow_cached`: while nobody says no, a fresh receipt counts"
    )
    receipt_max_age_s: float = Field(
        604_800, gt=0, description="age up to which a receipt is fresh"
    )
    on_no_nodes: Literal["block", "defer"] = Field(
        "block", description="`defer`: with no node to ask yet, each replica's own check decides"
    )
    identity: IdentityConfig | None = Field(
        None, description="a token by exchange instead of a stored one; null: a stored one"
    )
    license: LicensePolicy | None = Field(
        None, description="which licenses may be served; null: whatever access was granted to"
    )
    signature: SignatureConfig | None = Field(
        None, description="who must have signed the files; null: nobody has to"
    )

    @field_validator("endpoint")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        return None if value is None else check_endpoint(value)

    @model_validator(mode="after")
    def _keeps_the_token(self) -> AccessConfig:
        plain = self.endpoint is not None and is_plain_http(self.endpoint)
        has_secret = self.token_file is not None or self.identity is not None
        if plain and has_secret and not self.allow_http:
            raise ValueError(CLEAR_TEXT)
        if self.identity is not None and self.token_file is not None:
            raise ValueError("set one of token_file (a stored token) and identity (an exchange)")
        return self


def parts_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the parts that a field's annotation holds: itself, or a choice of its union."""
    for choice in get_args(annotation) or (annotation,):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            yield choice
