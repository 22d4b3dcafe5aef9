"""What a node proved, when, and under which license: kept beside its weights.

A receipt answers two questions. An auditor's: what is served here, under which license text,
accepted by which account, since when? And the one of a scale-up while the Hub is down: was
this very token granted this very commit not long ago? It holds no secret, and it counts only
for the token that it was written for.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from serve_app.access.hub.folders import Folder
from serve_app.access.license import license_in
from serve_app.access.token import resolve_token
from serve_app.access.verdict import CommitFacts, NodeVerdict, Outcome
from serve_app.config import AccessConfig, ModelConfig
from serve_app.redaction import sanitise

CLOCK_SKEW_S = 300.0  # how far ahead of ours the clock that wrote a receipt may have been
_PLACE = (".serve-app", "receipts")


@dataclass(frozen=True, slots=True)
class Receipt:
    """One proven read.

    Args:
        repo_id: the repository.
        revision: what the config asked for.
        commit: what was proven, 40 hex digits.
        endpoint: the Hub that said so.
        token_source: where the token came from.
        fingerprint: of the token, or of its identity; None if none was needed.
        account: the token's user, where the Hub says it.
        first_granted_at: Unix seconds of the first proof of this commit with this token.
        granted_at: Unix seconds of the latest proof.
        license_sha256: of the license text in the node's copy; None before the download.
        license_id: as the model card states it; None if it states none, or was not asked for.
        digest: of the commit's list of files; None if it was not asked for.
        identity: whose the token is by an exchange; None of a stored one.
        mirror: what answered in the Hub's place; None is the Hub.
    """

    repo_id: str
    revision: str
    commit: str
    endpoint: str
    token_source: str
    fingerprint: str | None
    account: str | None
    first_granted_at: float
    granted_at: float
    license_sha256: str | None = None
    license_id: str | None = None
    digest: str | None = None
    identity: str | None = None
    mirror: str | None = None

    def age_s(self) -> float:
        """Return the seconds since the latest proof; negative if it lies in the future."""
        return time.time() - self.granted_at

    def is_fresh(self, max_age_s: float) -> bool:
        """Return whether the proof is young enough; one from the future is not."""
        return -CLOCK_SKEW_S <= self.age_s() <= max_age_s


@dataclass(frozen=True, slots=True)
class NodeReceipt:
    """What one node has to show.

    Args:
        node_id: Ray's id of the node; empty where no Ray runs.
        node_name: the name a person knows it by.
        receipt: None if the node has none for its token.
        message: why it has none.
    """

    node_id: str
    node_name: str
    receipt: Receipt | None
    message: str | None = None


def receipt_here(model: ModelConfig, access: AccessConfig) -> NodeReceipt:
    """Return this node's receipt for the token that it would send now; asks no Hub."""
    name = socket.gethostname()
    if model.path is not None:
        return NodeReceipt("", name, None, "a local directory (model.path) needs no receipt")
    if model.url is not None:
        return NodeReceipt("", name, None, "receipts are of a Hub's commits; model.url has none")
    resolved = resolve_token(access)
    if resolved.fault is not None:
        return NodeReceipt("", name, None, resolved.fault.message)
    endpoint = access.endpoint or constants.ENDPOINT
    # Of the token in use: another one's proof would show an auditor what is not served with.
    receipt = find(model, endpoint, fingerprint=resolved.report.fingerprint)
    if receipt is not None:
        return NodeReceipt("", name, receipt)
    others = sum(1 for _ in stored(str(model.repo_id)))
    message = f"nothing proven yet for {model.revision} with the token in use ({resolved.report})"
    if others:
        message += f"; {others} of other tokens, revisions or Hubs"
    return NodeReceipt("", name, None, sanitise(message))


def keep(verdict: NodeVerdict, model: ModelConfig, endpoint: str) -> Receipt | None:
    """Write the receipt of a granted verdict; the first date and the account survive.

    Returns:
        The receipt; None for a local directory or a verdict that grants nothing.

    Raises:
        OSError: the cache cannot be written.
    """
    if verdict.outcome is not Outcome.GRANTED or not verdict.commit or model.repo_id is None:
        return None
    now = time.time()
    copy = f"models--{model.repo_id.replace('/', '--')}/snapshots/{verdict.commit}"
    text = license_in(Path(constants.HF_HUB_CACHE) / copy)
    before = find(model, endpoint, fingerprint=verdict.token.fingerprint, commit=verdict.commit)
    facts, known = verdict.facts, before or CommitFacts()
    receipt = Receipt(
        repo_id=model.repo_id,
        revision=model.revision,
        commit=verdict.commit,
        endpoint=endpoint,
        token_source=verdict.token.source,
        fingerprint=verdict.token.fingerprint,
        account=verdict.token.account or (before.account if before else None),
        # A clock that was ahead, and was set since, must not date the first proof after this one.
        first_granted_at=min(before.first_granted_at, now) if before else now,
        granted_at=now,
        # A commit does not change: what was learned of it once stays true.
        license_sha256=text.sha256 if text else facts.license_sha256 or known.license_sha256,
        license_id=facts.license_id or known.license_id,
        digest=facts.digest or known.digest,
        identity=verdict.token.identity,
        mirror=verdict.mirror,
    )
    _write(receipt)
    return receipt


def find(
    model: ModelConfig, endpoint: str, *, fingerprint: str | None, commit: str | None = None
) -> Receipt | None:
    """Return the latest receipt of this token for the commit that a revision was last seen at.

    Args:
        model: repository and revision; with a `commit` the revision does not matter.
        endpoint: the Hub.
        fingerprint: of the token that this process would send.
        commit: look for this commit alone.
    """
    own = [
        receipt
        for receipt in stored(str(model.repo_id))
        if receipt.endpoint == endpoint and receipt.fingerprint == fingerprint
    ]
    if commit is None:
        named = [receipt for receipt in own if model.revision in (receipt.revision, receipt.commit)]
        commit = max(named, key=_date).commit if named else None
    # A proof of the commit counts under whatever name it was asked for.
    fitting = [receipt for receipt in own if receipt.commit == commit]
    return max(fitting, key=_date, default=None)


def stored(repo_id: str) -> Iterator[Receipt]:
    """Yield the readable receipts of a repository on this node."""
    with suppress(OSError):
        for path in sorted(folder().glob(f"{repo_id.replace('/', '--')}@*.json")):
            receipt = _read(path)
            # `a--b/c` and `a/b--c` have one name of a file.
            if receipt is not None and receipt.repo_id == repo_id:
                yield receipt


def folder() -> Path:
    """Return where this node keeps its receipts."""
    return Path(constants.HF_HUB_CACHE).joinpath(*_PLACE)


def days(seconds: float) -> str:
    """Say an age in the largest unit that fits: `3.2 d`, `5.0 h`, `12 min`, `40 s`."""
    for unit, length in (("d", 86_400), ("h", 3_600)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _date(receipt: Receipt) -> float:
    """Return what the latest receipt has most of; one of a clock that was wrong comes last."""
    return receipt.granted_at if receipt.age_s() >= -CLOCK_SKEW_S else 0.0


def _write(receipt: Receipt) -> None:
    # One file for each name of a commit on each Hub: proving a tag leaves the branch's in place.
    asked = hashlib.sha256(f"{receipt.endpoint} {receipt.revision}".encode()).hexdigest()[:8]
    name = f"{receipt.repo_id.replace('/', '--')}@{receipt.commit}"
    file = f"{name}-{receipt.fingerprint or 'public'}-{asked}.json"
    with Folder.at(Path(constants.HF_HUB_CACHE), *_PLACE, create=True) as place:
        place.write(file, json.dumps(asdict(receipt), indent=1))


def _read(path: Path) -> Receipt | None:
    """Read a receipt; anything that is none counts as missing."""
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        # Of an older version it lacks what has a default.
        named = (
            each.name for each in fields(Receipt) if each.name in raw or each.default is MISSING
        )
        receipt = Receipt(**{name: raw[name] for name in named})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    times = (receipt.granted_at, receipt.first_granted_at)
    return receipt if all(isinstance(value, float | int) for value in times) else None
