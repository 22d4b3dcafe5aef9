"""Nodes of one machine that share nothing: a token and a home for huggingface_hub each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from scripts.local_hub import Behaviour, LocalHub
from tests.integration.conftest import LogicalNode
from tests.integration.service import SERVING


def make_homes(names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Make a home for each node, in which the list of agents is known and not asked for."""
    agents = json.dumps({"standardEnvVars": [], "harnesses": {}})
    for name in names:
        (folder / name).mkdir()
        (folder / name / ".agent_harnesses.json").write_text(agents)
    return {name: folder / name for name in names}


def nodes_at_home(hub: LocalHub, homes: Mapping[str, Path]) -> list[LogicalNode]:
    """Return a node for each home, whose token is granted."""
    return [
        LogicalNode(
            name,
            hub.issue_token(Behaviour.granted, account=name),
            SERVING,
            num_gpus=0,
            env={"HF_HOME": str(home)},
        )
        for name, home in homes.items()
    ]
