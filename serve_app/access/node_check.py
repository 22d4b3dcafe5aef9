"""The proof of one node with its memory: the probe, and a receipt for what it proved.

With `access.on_unreachable: allow_cached` a receipt stands in for an answer that does not come:
the Hub is away, overloaded or counts too many requests, or the weights' bytes do not get through.
Nobody said no then, this token was granted this commit not long ago, and its files are all here,
so a refusal today would protect nothing. An answer of the Hub always counts more.
"""

from __future__ import annotations

import time
from dataclasses import replace

from serve_app.access import local
from serve_app.access import receipt as receipts
from serve_app.access.digest import listed_hashes, listing_digest
from serve_app.access.hub.listing import read_listing
from serve_app.access.hub.model_files import cached_snapshot
from serve_app.access.hub.probe import check_here, endpoint_of
from serve_app.access.license import license_in
from serve_app.access.receipt import Receipt
from serve_app.access.signature import Unverified, require_signed
from serve_app.access.terms import Terms
from serve_app.access.verdict import CommitFacts, NodeVerdict, Outcome
from serve_app.checkpoint.runnable import Loader
from serve_app.config import AccessConfig, AppConfig, ModelConfig
from serve_app.errors import ModelLoadError
from serve_app.redaction import sanitise

# Nobody said no; what is needed from the network is here already.
NOT_REFUSED = frozenset(
    {
        Outcome.HUB_UNREACHABLE,
        Outcome.RATE_LIMITED,
        Outcome.WEIGHTS_UNREACHABLE,
        Outcome.PROBE_FAILED,
    }
)
ADAPTER_LOADER = Loader(backend="vllm", adapter=True)
MESSAGE_CHARS = 600  # what the network said, and what the receipt says to it


def loader_of(config: AppConfig) -> Loader:
    """Return what an application's replicas load the weights with."""
    return Loader(
        backend=config.engine.backend, dtype=config.model.dtype, num_gpus=config.replica.num_gpus
    )


def prove_here(
    model: ModelConfig,
    access: AccessConfig,
    *,
    commit: str | None = None,
    hint: NodeVerdict | None = None,
    loader: Loader | None = None,
) -> NodeVerdict:
    """Do `check_here` with receipts: keep one for a yes, look for one if nobody says no.

    Returns:
        The verdict of this node; never raises.
    """
    # The Hub first, always: a receipt would hide a grant that was withdrawn.
    verdict = check_here(model, access, commit=commit, hint=hint, loader=loader)
    if verdict.outcome is Outcome.GRANTED:
        return keep_receipt(verdict, model, access)
    can_stand_in = model.repo_id is not None and access.on_unreachable == "allow_cached"
    if verdict.outcome in NOT_REFUSED and can_stand_in:
        return _by_receipt(verdict, model, access, commit, loader)
    return verdict


def prove_later(
    model: ModelConfig,
    access: AccessConfig,
    commit: str | None,
    hint: NodeVerdict | None,
    delay_s: float,
    loader: Loader | None = None,
) -> NodeVerdict:
    """Do `prove_here` after a pause, so that a thousand nodes do not ask at the same instant."""
    time.sleep(delay_s)
    return prove_here(model, access, commit=commit, hint=hint, loader=loader)


def keep_receipt(verdict: NodeVerdict, model: ModelConfig, access: AccessConfig) -> NodeVerdict:
    """Keep the receipt of what the Hub granted, again after a download for the license's hash.

    Returns:
        The verdict, with a warning if the receipt cannot be written: that blocks nothing.
    """
    if verdict.receipt_age_s is not None:
        return verdict  # a receipt proves nothing new
    try:
        receipts.keep(verdict, model, endpoint_of(access))
    except OSError as error:
        warning = f"no receipt can be kept in {receipts.folder()}: {error.strerror}"
        warnings = (*verdict.token.warnings, sanitise(warning))
        return replace(verdict, token=replace(verdict.token, warnings=warnings))
    return verdict


class _Unfit(Exception):
    """Why no receipt stands in for the Hub's answer."""


def _by_receipt(
    verdict: NodeVerdict,
    model: ModelConfig,
    access: AccessConfig,
    commit: str | None,
    loader: Loader | None,
) -> NodeVerdict:
    said = verdict.hub_message or "the Hub did not answer"
    try:
        receipt = _fitting(verdict, model, access, commit)
        facts = _refuse_copy(receipt, Terms.of(model, access), loader)
    except _Unfit as unfit:
        message = f"{said}; access.on_unreachable is allow_cached, but {unfit}"
        return replace(verdict, hub_message=sanitise(message, limit=MESSAGE_CHARS))
    age_s = max(0.0, receipt.age_s())  # within the skew that is allowed it may be ahead
    message = f"{said}; granted by a receipt {receipts.days(age_s)} old and the complete copy here"
    return replace(
        verdict,
        outcome=Outcome.GRANTED,
        remedy="Nothing to do.",
        hub_message=sanitise(message, limit=MESSAGE_CHARS),
        url=None,
        token=replace(verdict.token, account=receipt.account),
        commit=receipt.commit,
        receipt_age_s=age_s,
        facts=facts,
    )


def _fitting(
    verdict: NodeVerdict, model: ModelConfig, access: AccessConfig, commit: str | None
) -> Receipt:
    """Return the receipt that says the same token may read this commit."""
    token = verdict.token
    # A search for the token that failed or hangs is not knowing that none is needed.
    if token.fingerprint is None and token.source != "none":
        raise _Unfit("without a token no receipt fits")
    receipt = receipts.find(
        model, endpoint_of(access), fingerprint=token.fingerprint, commit=commit
    )
    if receipt is None:
        what = f"commit {commit[:12]}" if commit else f"revision {model.revision}"
        raise _Unfit(f"this node has no receipt for this token, this Hub and {what}")
    if not receipt.is_fresh(access.receipt_max_age_s):
        # From the future, it would stay fresh for ever.
        if receipt.age_s() < 0:
            ahead = receipts.days(-receipt.age_s())
            raise _Unfit(f"the receipt is dated {ahead} ahead: this node's clock is or was wrong")
        limit = f"access.receipt_max_age_s is {access.receipt_max_age_s:g}"
        raise _Unfit(f"the receipt is {receipts.days(receipt.age_s())} old ({limit})")
    return receipt


def _refuse_copy(receipt: Receipt, terms: Terms, loader: Loader | None) -> CommitFacts:
    """Return what the copy here is; raises `_Unfit` for one that may not be served."""
    try:
        directory = cached_snapshot(receipt.repo_id, receipt.commit)
    except ModelLoadError as error:
        raise _Unfit(error.message) from None
    copy = local.check_directory(str(directory), loader)
    if copy.outcome is not Outcome.GRANTED:
        raise _Unfit(f"the copy here cannot be served: {copy.hub_message}")
    text = license_in(directory)  # the card is not part of the copy, its license is in the receipt
    entries = read_listing(receipt.repo_id, receipt.commit)  # its bytes are compared at loading
    digest = listing_digest(entries) if terms.digest and entries else None
    facts = CommitFacts(receipt.license_id, text.sha256 if text else None, digest)
    if found := terms.fault(facts):
        raise _Unfit(found[1])
    if terms.signature is not None:
        if entries is None:
            raise _Unfit("no list of its files is here to compare with the signature")
        try:
            require_signed(directory, listed_hashes(entries), terms.signature, whole=False)
        except Unverified as fault:
            raise _Unfit(fault.message) from None
    return facts
