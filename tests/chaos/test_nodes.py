"""The clock of a node that can be set."""

import os
import subprocess
import sys
import time

from tests.chaos.nodes import AHEAD_S, with_clock
from tests.integration.conftest import LogicalNode


def test_with_clock_puts_a_nodes_python_ahead_until_it_is_set_right(tmp_path):
    """The wall clock alone, and in a process that runs already."""
    node = with_clock(LogicalNode("a"), tmp_path)
    code = "import time; print(time.time(), flush=True); input(); print(time.time())"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **node.env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        ahead = float(running.stdout.readline()) - time.time()
        os.truncate(tmp_path / "clock", 0)
        right = float(running.communicate("\n", timeout=30)[0]) - time.time()
    assert AHEAD_S - 30 < ahead <= AHEAD_S
    assert -30 < right <= 0
