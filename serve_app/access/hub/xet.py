"""Files from the chunk store, in a process of its own that can be ended.

hf_xet retries for minutes without a word when a firewall swallows its connections, and a thread
of a compiled library cannot be stopped. So it runs beside this process, writes into files that
were made for it, may make none larger than the largest announced, reports its progress, and is
ended when nothing comes any more. What it wrote is checked by the caller like all bytes.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from serve_app.access.hub.pace import Pace, Stalled

CHILD = "serve_app.access.hub.xet_child"
POLL_S = 1.0
LINE_BYTES = 4096
END_S = 5.0


class XetFailed(Exception):
    """The files did not come from the chunk store; says why."""


@dataclass(frozen=True, slots=True)
class XetFile:
    """One file to fetch.

    Args:
        xet_hash: 64 hex digits.
        size: announced bytes.
        path: an empty file that was made for it.
    """

    xet_hash: str
    size: int
    path: str


@dataclass(frozen=True, slots=True)
class XetKey:
    """How the store is asked.

    Args:
        store: its URL.
        secret: its short-lived key.
        expires: Unix seconds.
        refresh_url: of the Hub, for another key.
        headers: for that URL and no other.
    """

    store: str
    secret: str
    expires: int
    refresh_url: str
    headers: Mapping[str, str]


def fetch(key: XetKey, files: Sequence[XetFile], *, pace: Pace | None = None) -> None:
    """Fetch files; some may be whole even if it fails.

    Args:
        key: for the store.
        files: where to put them.
        pace: how slow is too slow.

    Raises:
        XetFailed: not all came, or too slowly.
    """
    order = {"key": asdict(key), "files": [asdict(file) for file in files]}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        with subprocess.Popen(  # noqa: S603 (this interpreter and a module of ours)
            [sys.executable, "-m", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        ) as child:
            try:
                _follow(child, json.dumps(order), files, pace or Pace())
            finally:
                child.kill()
                child.wait(END_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise XetFailed(f"its process cannot be used ({type(error).__name__})") from None


def _follow(child: subprocess.Popen[str], order: str, files: Sequence[XetFile], pace: Pace) -> None:
    """Hand the order over and watch the progress until the child ends well."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    if child.stdin is None or child.stdout is None:
        raise XetFailed("it was started without pipes")
    threading.Thread(target=_listen, args=(child.stdout, lines), daemon=True).start()
    child.stdin.write(order + "\n")
    child.stdin.flush()  # left open: its end says that we are gone
    announced, before = sum(file.size for file in files), 0
    while (now := _progress(lines)) is not None:
        try:
            pace.moved(max(0, now - before))
        except Stalled as stalled:
            raise XetFailed(str(stalled)) from None
        before = max(before, now)
        if _written(files) > announced:
            raise XetFailed(f"it writes more than the {announced:,} bytes that were announced")


def _progress(lines: queue.SimpleQueue[str | None]) -> int | None:
    """Return the bytes that came so far, 0 for no news; None if all came.

    Raises:
        XetFailed: the child says so, or is gone.
    """
    try:
        line = lines.get(timeout=POLL_S)
    except queue.Empty:
        return 0
    if line is None:
        raise XetFailed("it ended without a word")
    facts = _parsed(line)
    if "error" in facts:
        raise XetFailed(str(facts["error"])[:100])
    received = facts.get("bytes", 0)
    return None if facts.get("done") is True else received if isinstance(received, int) else 0


def _listen(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    while line := stream.readline(LINE_BYTES):
        lines.put(line)
    lines.put(None)


def _parsed(line: str) -> dict[str, object]:
    try:
        facts = json.loads(line) if line else {}
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _written(files: Sequence[XetFile]) -> int:
    sizes = [Path(file.path).lstat().st_size for file in files if Path(file.path).exists()]
    return sum(sizes)
