"""The `receipt` command: what each node has proven, under which license, since when.

For auditors and their scripts: asks every node for its receipt, never the Hub, and prints a table,
one JSON object for each application, or one in-toto statement for each node.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from serve_app.access.receipt import NodeReceipt, Receipt, receipt_here
from serve_app.access.report import aligned
from serve_app.access.statement import moment, statement
from serve_app.access.verdict import EXIT_GRANTED, EXIT_UNDETERMINED
from serve_app.cluster.application import connected_places
from serve_app.cluster.nodes import Lost, Node
from serve_app.cluster.tasks import NodeTasks, node_task
from serve_app.config import AppConfig
from serve_app.serve_config import ServedApp

Audit = Callable[[ServedApp], Sequence[NodeReceipt]]

_RECEIPT = node_task(receipt_here)
HEAD = ("NODE", "COMMIT", "LICENSE SHA-256", "TOKEN", "ACCOUNT", "FIRST PROVEN", "LAST PROVEN")


def run(
    apps: Sequence[ServedApp], audit: Audit, *, as_json: bool = False, attest: bool = False
) -> int:
    """Show the receipts of every application, and of each adapter as if it were one.

    Args:
        apps: applications to look at.
        audit: returns the receipts of all nodes of one of them.
        as_json: print for machines.
        attest: print statements instead, one line each; a node without a receipt has none, and
            is named on the standard error.

    Returns:
        The exit code: 0 if every node, and at least one, has a receipt, else 4.
    """
    code = EXIT_GRANTED
    # An adapter has a license and a grant of its own, so an auditor asks for it by itself.
    for app in (part for each in apps for part in _parts(each)):
        nodes = audit(app)
        if attest:
            _attest(nodes)
        else:
            print(json.dumps(_facts(app, nodes)) if as_json else "\n".join(_table(app, nodes)))
        if not _is_complete(nodes):
            code = EXIT_UNDETERMINED
    return code


def _parts(app: ServedApp) -> Iterator[ServedApp]:
    for model in app.config.model.parts:
        yield replace(app, config=app.config.model_copy(update={"model": model}))


def of_cluster(app: ServedApp, address: str | None) -> tuple[NodeReceipt, ...] | None:
    """Ask every node that may host a replica, in the replicas' environment.

    Args:
        app: an application of a Serve config.
        address: of the cluster; None takes RAY_ADDRESS, or what `ray start` recorded here.

    Returns:
        One entry for each eligible node and environment; None if no cluster is named in any of
        these ways.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    model, access = app.config.model, app.config.access
    answers: list[tuple[Node, NodeReceipt | Lost]] = []
    with connected_places(app, address) as places:
        if places is None:
            return None
        for placement in places:
            tasks = NodeTasks(_RECEIPT, NodeReceipt, placement)
            answers += tasks.ask_all(model, access, timeout_s=access.deadline_s)
    return tuple(
        # A node that does not answer is shown as not proven, and not left out.
        NodeReceipt(node.node_id, node.name, None, str(answer))
        if isinstance(answer, Lost)
        else replace(answer, node_id=node.node_id, node_name=node.name)
        for node, answer in answers
    )


def of_this_machine(config: AppConfig) -> tuple[NodeReceipt, ...]:
    """Look at this machine alone, without Ray."""
    return (receipt_here(config.model, config.access),)


def _attest(nodes: Sequence[NodeReceipt]) -> None:
    for node in nodes:
        if node.receipt:
            print(json.dumps(statement(node, node.receipt)))
        else:
            print(_lack(node), file=sys.stderr)


def _lack(node: NodeReceipt) -> str:
    return f"No receipt on {node.node_name}: {node.message}"


def _is_complete(nodes: Sequence[NodeReceipt]) -> bool:
    return bool(nodes) and all(node.receipt for node in nodes)


def _facts(app: ServedApp, nodes: Sequence[NodeReceipt]) -> dict[str, Any]:
    model = app.config.model
    return {
        "application": app.name,
        "repo_id": model.source,
        "revision": model.revision,
        "complete": _is_complete(nodes),
        "nodes": [
            {
                "node_id": node.node_id,
                "node_name": node.node_name,
                "message": node.message,
                "receipt": _proof(node.receipt) if node.receipt else None,
            }
            for node in nodes
        ],
    }


def _proof(receipt: Receipt) -> dict[str, Any]:
    return {
        "repo_id": receipt.repo_id,
        "commit": receipt.commit,
        "endpoint": receipt.endpoint,
        "license_sha256": receipt.license_sha256,
        "license": receipt.license_id,
        "mirror": receipt.mirror,
        "digest": receipt.digest,
        "token": {
            "source": receipt.token_source,
            "fingerprint": receipt.fingerprint,
            "account": receipt.account,
            "identity": receipt.identity,
        },
        "first_proven_at": moment(receipt.first_granted_at),
        "last_proven_at": moment(receipt.granted_at),
    }


def _table(app: ServedApp, nodes: Sequence[NodeReceipt]) -> Iterator[str]:
    model = app.config.model
    proven = sum(node.receipt is not None for node in nodes)
    what = f"{model.repo_id} ({model.revision})" if model.repo_id else model.source
    many = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    yield f"{app.name}: {what} is proven on {proven} of {many}."
    shown = [(node.node_name, node.receipt) for node in nodes if node.receipt]
    if shown:
        yield ""
        yield from aligned([HEAD, *(_row(name, receipt) for name, receipt in shown)])
    for node in nodes:
        if not node.receipt:
            yield _lack(node)


def _row(name: str, receipt: Receipt) -> tuple[str, ...]:
    return (
        name,
        receipt.commit[:12],
        (receipt.license_sha256 or "not here yet")[:16],
        f"{receipt.token_source} {receipt.fingerprint or ''}".rstrip(),
        receipt.account or "-",
        moment(receipt.first_granted_at),
        moment(receipt.granted_at),
    )
