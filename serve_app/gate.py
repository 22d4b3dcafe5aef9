"""The gate for other people's Serve applications: one function to call first in a builder.

    def build(args):
        commit = require_repo_access("meta-llama/Llama-3.1-8B-Instruct", replica={"num_gpus": 1})
        ...  # any Serve application, `ray.serve.llm` too; load exactly this commit

Run by `serve run` or `serve deploy`, a refusal ends the build with the table of all nodes in
`serve status`, and the version that served goes on serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.access.preflight import RolloutBlocked, require_access
from serve_app.config import parse_args
from serve_app.errors import ConfigError


def require_repo_access(
    repo_id: str,
    *,
    revision: str = "main",
    replica: Mapping[str, Any] | None = None,
    access: Mapping[str, Any] | None = None,
) -> str:
    """Prove that every node that may host a replica reads this repository's weights.

    The nodes are asked in the builder's own environment, with the token that huggingface_hub
    finds there. That is proof only if the replicas send the same: an environment that a
    deployment sets for itself is not seen, and `ray.serve.llm` (Ray 2.60) hands the token of
    one process to its workers on other nodes. Give such an application one token everywhere.

    Args:
        repo_id: `owner/name` on the Hub.
        revision: branch, tag or commit.
        replica: what one replica needs, by the keys of the config's `replica:`; one GPU by
            default.
        access: which token, which Hub, which limits, by the keys of the config's `access:`.

    Returns:
        The commit that was proven, 40 hex digits. Load this one, not the branch.

    Raises:
        RolloutBlocked: a node was refused or could not prove its access, or an argument is
            wrong; the message is meant for `serve status`.
    """
    model = {"repo_id": repo_id, "revision": revision}
    try:
        config = parse_args(
            {"model": model, "replica": dict(replica or {}), "access": dict(access or {})}
        )
    except ConfigError as error:
        raise RolloutBlocked(f"The gate was asked wrongly:\n{error.message}") from None
    verdict = require_access(config, access_only=True)
    if verdict.commit is None:
        raise RolloutBlocked(f"No commit of {repo_id} was proven.\n{verdict.table()}")
    return verdict.commit
