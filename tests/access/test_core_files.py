"""A crash puts no token on a disk: real processes, which abort."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

CRASH = """
import os, resource, sys
_, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
if sys.argv[1] == "known":
    from serve_app.access.token import resolve_token
    from serve_app.config import AccessConfig
    resolve_token(AccessConfig())
print(resource.getrlimit(resource.RLIMIT_CORE), flush=True)
os.abort()
"""


def test_token_process_leaves_no_core_file(tmp_path):
    """Nor hands one to a collector: at a limit of 0 Linux would do that, at 1 it does not."""
    environment = {**os.environ, "HF_TOKEN": "hf_" + "x" * 34, "PYTHONPATH": str(ROOT)}
    reported = {}
    for name in ("unknown", "known"):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", CRASH, name],
            cwd=tmp_path / name,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == -signal.SIGABRT, done.stderr
        reported[name] = done.stdout.strip()
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    assert reported["unknown"] == str((hard, hard))
    assert reported["known"] == str((0 if hard == 0 else 1, hard))
    assert list((tmp_path / "known").iterdir()) == []
    if hard == resource.RLIM_INFINITY and not_piped():
        (core,) = (tmp_path / "unknown").iterdir()  # else this would show nothing
        core.unlink()


def not_piped():
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    return pattern == "core"
