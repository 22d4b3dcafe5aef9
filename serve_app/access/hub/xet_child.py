"""The process that `xet.py` starts: takes one order from its input, reports its progress, ends.

It holds a token, so it writes no core file; and it ends when its input does, because then
nobody waits for the files any more.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from typing import Any

REPORT_S = 0.5
SLACK_BYTES = 1 << 20  # of the library's own logs


def main() -> int:
    """Fetch what the first line of the input names."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    order = json.loads(sys.stdin.readline())
    # What the library prints must not stand between our lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_input, daemon=True).start()
    largest = max((file["size"] for file in order["files"]), default=0) + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        _fetch(order["key"], order["files"], Progress(out))
    except (RuntimeError, OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        _report(out, {"error": type(error).__name__})  # its text may hold a signed URL
        return 1
    _report(out, {"done": True})
    return 0


class Progress:
    """Reports the bytes that came, not too often.

    Args:
        out: where to.
    """

    def __init__(self, out: Any) -> None:
        self._out = out
        self._next = 0.0

    def __call__(self, group: Any, _files: Any = None) -> None:
        """Take the library's report."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REPORT_S
        received = group.total_bytes_completed + group.total_transfer_bytes_completed
        _report(self._out, {"bytes": int(received)})


def _fetch(key: dict[str, Any], files: list[dict[str, Any]], progress: Progress) -> None:
    """Do what huggingface_hub 2.4's `xet_get` does, for several files at once."""
    from hf_xet import XetFileInfo, XetSession  # noqa: PLC0415 (not everywhere)

    public = {name: value for name, value in key["headers"].items() if name != "authorization"}
    with XetSession().new_file_download_group(
        endpoint=key["store"],
        token=key["secret"],
        token_expiry_unix_secs=key["expires"],
        token_refresh_url=key["refresh_url"],
        token_refresh_headers=key["headers"],
        custom_headers=public,
        progress_callback=progress,
    ) as group:
        for file in files:
            group.start_download_file(XetFileInfo(file["xet_hash"], file["size"]), file["path"])


def _report(out: Any, facts: dict[str, object]) -> None:
    out.write(json.dumps(facts) + "\n")
    out.flush()


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    os._exit(2)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a library's threads do not hold up the end
