"""Whoever starts vLLM may be killed at any time; vLLM's processes go with it."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from serve_app.engine.vllm.guard import started
from tests.integration.service import until
from tests.models import make_model
from tests.processes import children_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]
LOAD = """
import sys
from pathlib import Path
from tests.engine.conformance.conftest import load_backend
if __name__ == "__main__":
    load_backend(Path(sys.argv[1]), "vllm")
    print("loaded", flush=True)
    sys.stdin.read()
"""


def test_guard_leaves_nothing_of_vllm_when_killed_while_it_loads(tmp_path):
    """The core is guarded as soon as it is there, and not only when it is ready."""
    make_model(tmp_path / "model", hidden_size=128, head_dim=32)
    (tmp_path / "load.py").write_text(LOAD)
    said = tmp_path / "said"  # no pipe: what is left behind would hold it open
    with said.open("wb") as out:
        loading = subprocess.Popen(
            [sys.executable, str(tmp_path / "load.py"), str(tmp_path / "model")],
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
            stdin=subprocess.PIPE,
            stdout=out,
        )
    try:
        until(lambda: children_of(loading.pid, "VLLM::Engine"), 90)
        (core,) = children_of(loading.pid, "VLLM::Engine")
        began = started(core)
        time.sleep(1)  # two looks of the loop's
    finally:
        loading.kill()
        loading.wait()
    assert "loaded" not in said.read_text()  # else it was killed too late to show anything
    assert began
    until(lambda: started(core) != began, 30)
