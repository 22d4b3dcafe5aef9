"""A receipt as an in-toto Statement v1, which tools for supply chains read and sign.

https://in-toto.io/Statement/v1 says of its subject, a model at a commit, what the predicate
states: which node proved with which identity, when, that it may read it, and under which license.
`configs/attestation.schema.json` is the schema.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from serve_app.access.receipt import NodeReceipt, Receipt
from serve_app.access.verdict import Outcome

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://serve-app.example/attestation/model-access/v1"


def statement(node: NodeReceipt, receipt: Receipt) -> dict[str, Any]:
    """Return what a node proved as a statement; it holds no secret.

    Args:
        node: which node it is.
        receipt: its receipt.
    """
    digests = {"gitCommit": receipt.commit}
    if receipt.digest is not None:
        digests["sha256"] = receipt.digest.removeprefix("sha256:")
    return {
        "_type": STATEMENT,
        "subject": [{"name": receipt.repo_id, "digest": digests}],
        "predicateType": PREDICATE,
        "predicate": {
            "model": receipt.repo_id,
            "revision": receipt.revision,
            "commit": receipt.commit,
            "endpoint": receipt.endpoint,
            "mirror": receipt.mirror,
            "digest": receipt.digest,
            "license": {"id": receipt.license_id, "textSha256": receipt.license_sha256},
            "token": {
                "source": receipt.token_source,
                "fingerprint": receipt.fingerprint,
                "account": receipt.account,
                "identity": receipt.identity,
            },
            "node": {"id": node.node_id, "name": node.node_name},
            "outcome": Outcome.GRANTED.value,
            "firstProvenAt": moment(receipt.first_granted_at),
            "lastProvenAt": moment(receipt.granted_at),
        },
    }


def moment(seconds: float) -> str:
    """Return Unix seconds as a date and time of day in UTC, RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
