"""Ends vLLM's processes when the replica's own is gone, however it went.

vLLM's core does not notice that: killed, a replica would leave it behind with all of the GPU's
memory. So a small process reads from a pipe that only the replica holds open, and kills when it
closes. It knows the processes by number and start, so that none is mistaken for another.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


class Guard:
    """A process that outlives this one for a moment; close it when vLLM has been shut down."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603 (this file, by this interpreter)
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, start_new_session=True
        )

    def watch(self, pids: Iterable[int]) -> None:
        """Let processes end with this one."""
        lines = "".join(f"{pid} {started(pid)}\n" for pid in pids)
        if self._process.stdin is not None:
            self._process.stdin.write(lines.encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """End whatever is left of them; calling it again does nothing."""
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)


def started(pid: int) -> str:
    """Return when a process began, in the kernel's ticks since boot; "" if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


def main() -> None:
    """Wait until the pipe is closed, then kill what was named in it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    named = [line.split() for line in sys.stdin]
    for pid, *since in named:
        if since and since[0] == started(int(pid)):
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    main()
