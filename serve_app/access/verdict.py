"""What the gate says: outcomes of nodes, and the decision over all of them. Plain data.

Everything here crosses processes and lands in logs, so it holds words, numbers and a token's
fingerprint, never a value, an exception or a response. Approval is derived from the outcomes,
so no code path can approve by setting a flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from serve_app.access import report


class Outcome(StrEnum):
    """The result of one node's probe; only `GRANTED` lets a rollout pass."""

    GRANTED = "granted"
    NO_TOKEN = "no_token"  # noqa: S105
    MALFORMED_TOKEN = "malformed_token"  # noqa: S105
    INVALID_TOKEN = "invalid_token"  # noqa: S105
    EXPIRED_TOKEN = "expired_token"  # noqa: S105
    IDENTITY_REFUSED = "identity_refused"
    LICENSE_NOT_ACCEPTED = "license_not_accepted"
    REQUEST_PENDING = "request_pending"
    REQUEST_REJECTED = "request_rejected"
    REQUEST_RESET = "request_reset"
    TOKEN_SCOPE = "token_scope"  # noqa: S105
    ORG_POLICY = "org_policy"
    CONTENT_BLOCKED = "content_blocked"
    LICENSE_NOT_ALLOWED = "license_not_allowed"
    DIGEST_MISMATCH = "digest_mismatch"
    SIGNATURE_INVALID = "signature_invalid"
    REPO_NOT_FOUND = "repo_not_found"
    REVISION_NOT_FOUND = "revision_not_found"
    REPO_DISABLED = "repo_disabled"
    WEIGHTS_MISSING = "weights_missing"
    WEIGHTS_UNREACHABLE = "weights_unreachable"
    RATE_LIMITED = "rate_limited"
    HUB_UNREACHABLE = "hub_unreachable"
    PROBE_FAILED = "probe_failed"
    UNKNOWN = "unknown"


# Not a yes and not a no: the same check may pass later without anybody changing anything.
UNDETERMINED = frozenset(
    {Outcome.RATE_LIMITED, Outcome.HUB_UNREACHABLE, Outcome.PROBE_FAILED, Outcome.UNKNOWN}
)
EXIT_GRANTED, EXIT_BLOCKED, EXIT_UNDETERMINED = 0, 3, 4


@dataclass(frozen=True, slots=True)
class TokenReport:
    """Which token a node sends, without its value.

    Args:
        source: `env:<NAME>`, `file:<path>`, `identity:<path>`, `oidc`, `colab`, `none`, or
            `unresolved` if the search for it did not end.
        fingerprint: first 8 hex digits of a SHA-256: of the value, or of the identity that it was
            exchanged for; None without a token.
        account: the user it belongs to, where the Hub says it.
        warnings: sentences about other tokens of this node that disagree with it.
        identity: whose it is by an exchange: subject, issuer and resource; None without one.
    """

    source: str = "none"
    fingerprint: str | None = None
    account: str | None = None
    warnings: tuple[str, ...] = ()
    identity: str | None = None

    def __str__(self) -> str:
        """Return source and fingerprint, as the table shows them."""
        return f"{self.source} {self.fingerprint}" if self.fingerprint else self.source


@dataclass(frozen=True, slots=True)
class CommitFacts:
    """What a commit is besides its name; the same on every node.

    Args:
        license_id: as its model card states it, in lower case; several joined by a comma.
        license_sha256: of its license text; None if there is none, or nobody had to read it.
        digest: of its list of files, see `access/digest.py`; None if nobody had to compute it.
        bundle: SHA-256 of a signature that was found to cover its list of files; None if nobody
            had to look.
    """

    license_id: str | None = None
    license_sha256: str | None = None
    digest: str | None = None
    bundle: str | None = None


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """What one node may do.

    Args:
        node_id: Ray's id of the node; empty where no Ray runs.
        node_name: the name a person knows it by.
        outcome: the result.
        http_status: status of the answer that decided it, if one did.
        hub_message: the Hub's own words, or what the network said instead; sanitised.
        remedy: one sentence that names the fix.
        url: the one link to open, if there is one.
        token: which token was used.
        hub_requests: requests that this probe sent to the Hub.
        commit: the commit that was probed, 40 hex digits; None if it was never learned.
        weights_file: the file whose bytes were asked for.
        weights_bytes: of all weights in memory, where that was learned.
        receipt_age_s: set if the Hub could not be asked and a receipt of this age granted it.
        deferred: no node was there to ask, and `access.on_no_nodes` leaves it to the replicas.
        facts: what the commit is, as far as this node learned it.
        mirror: what answered in the Hub's place: its product's name, or `a mirror`; None is the
            Hub, or a mirror that passes on all of its headers.
    """

    node_id: str
    node_name: str
    outcome: Outcome
    remedy: str
    http_status: int | None = None
    hub_message: str | None = None
    url: str | None = None
    token: TokenReport = TokenReport()
    hub_requests: int = 0
    commit: str | None = None
    weights_file: str | None = None
    weights_bytes: int | None = None
    receipt_age_s: float | None = None
    deferred: bool = False
    facts: CommitFacts = CommitFacts()
    mirror: str | None = None

    def line(self) -> str:
        """Say the whole verdict in one line."""
        return report.line(self)

    def to_json(self) -> dict[str, Any]:
        """Return the node's part of `check --json`."""
        return {
            "node_id": self.node_id,
            "node_name": self.node_name,
            "outcome": self.outcome.value,
            "http_status": self.http_status,
            "hub_message": self.hub_message,
            "remedy": self.remedy,
            "url": self.url,
            "token": {
                "source": self.token.source,
                "fingerprint": self.token.fingerprint,
                "account": self.token.account,
                "identity": self.token.identity,
            },
            "license": {"id": self.facts.license_id, "text_sha256": self.facts.license_sha256},
            "digest": self.facts.digest,
            "mirror": self.mirror,
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision over all nodes.

    Args:
        repo_id: the Hub repository, or the local directory.
        revision: what the config asks for.
        commit: what it means, 40 hex digits; None if no node learned it.
        endpoint: the Hub that was asked.
        duration_s: seconds from the first probe to the decision.
        nodes: one verdict for each eligible node, in a stable order.
        hub_requests: requests to the Hub, of all probes.
        is_local: the model is a directory, so there is no commit to agree on.
        adapters: the decision over each adapter that is served with it, by its name in the API.
    """

    repo_id: str
    revision: str
    commit: str | None
    endpoint: str
    duration_s: float
    nodes: tuple[NodeVerdict, ...]
    hub_requests: int = 0
    is_local: bool = False
    adapters: Mapping[str, Verdict] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Verdict, ...]:
        """The decisions over the model and over each adapter, apart."""
        return (replace(self, adapters={}), *self.adapters.values())

    @property
    def every_node(self) -> tuple[NodeVerdict, ...]:
        """What each node may do, of the model and of each adapter."""
        return tuple(node for part in self.parts for node in part.nodes)

    @property
    def commits(self) -> dict[str, str | None]:
        """The commit of the model, under "", and of each adapter by its name."""
        return {"": self.commit, **{name: part.commit for name, part in self.adapters.items()}}

    @property
    def approved(self) -> bool:
        """Every node, and at least one, proved that it reads the same commit, of adapters too.

        Where there was no node to ask and the config defers that, nobody refused and the
        commit is known: all that can be had before the first node starts.
        """
        if not self.nodes or not (self.commit or self.is_local):
            return False
        if not all(adapter.approved for adapter in self.adapters.values()):
            return False
        return all(
            node.outcome is Outcome.PROBE_FAILED
            if node.deferred
            else node.outcome is Outcome.GRANTED and node.commit == self.commit
            for node in self.nodes
        )

    @property
    def is_deferred(self) -> bool:
        """The approval proves nothing about some place, because no node is there yet."""
        return self.approved and any(node.deferred for node in self.every_node)

    @property
    def exit_code(self) -> int:
        """0 approved, 3 somebody was refused, 4 nobody was but somebody does not know."""
        if self.approved:
            return EXIT_GRANTED
        refused = any(
            node.outcome is not Outcome.GRANTED and node.outcome not in UNDETERMINED
            for node in self.every_node
        )
        return EXIT_BLOCKED if refused else EXIT_UNDETERMINED

    def to_json(self) -> dict[str, Any]:
        """Return the object that `check --json` prints; `adapters` only where there are some."""
        adapters = {name: part.to_json() for name, part in self.adapters.items()}
        return {
            "approved": self.approved,
            "repo_id": self.repo_id,
            "revision": self.revision,
            "commit": self.commit,
            "endpoint": self.endpoint,
            "duration_s": round(self.duration_s, 3),
            "hub_requests": self.hub_requests,
            "nodes": [node.to_json() for node in self.nodes],
            **({"adapters": adapters} if adapters else {}),
        }

    def table(self) -> str:
        """Say everything to a person: ASCII, no tabs, no trailing spaces."""
        return report.table(self)

    def _repr_html_(self) -> str:
        """Show the verdict in a notebook."""
        return report.html(self)


def log_facts(verdict: NodeVerdict) -> dict[str, Any]:
    """Return a node's verdict as flat keywords for a log line, without its node id."""
    return {
        "outcome": verdict.outcome.value,
        "reason": verdict.hub_message,
        "http_status": verdict.http_status,
        "token_source": verdict.token.source,
        "token_id": verdict.token.fingerprint,
        "account": verdict.token.account,
        "commit": verdict.commit,
        "hub_requests": verdict.hub_requests,
    }
