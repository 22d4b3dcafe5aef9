"""One JSON file for each fault, and the table of all of them."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.chaos_table.load import OK
from scripts.chaos_table.stage import Stage

PLACE = Path(__file__).parent
RESULTS = PLACE / "results"


def summarise(stage: Stage, name: str, what: str, note: str) -> dict[str, Any]:
    """Return a fault's row.

    `answers_again_s` is from the fault to the end of the first good stream that began after it,
    `whole_again_s` to the moment when everything that was lost runs again.
    """
    answers = sorted(stage.load.answers, key=lambda answer: answer.began)
    struck = stage.struck_at or answers[0].began
    failed = Counter(
        f"{answer.kind} {answer.code}".strip() for answer in answers if answer.kind != OK
    )
    later = [answer.ended for answer in answers if answer.kind == OK and answer.began >= struck]
    last = max((answer.began for answer in answers if answer.kind != OK), default=None)
    return {
        "fault": name,
        "what": what,
        "note": note,
        "sent": len(answers),
        "failed": dict(failed),
        "before_fault_failed": sum(a.kind != OK and a.ended < struck for a in answers),
        "answers_again_s": _since(struck, min(later, default=None)),
        "last_failed_sent_s": _since(struck, last),
        "whole_again_s": _since(struck, stage.recovered_at),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _since(began: float, ended: float | None) -> float | None:
    return None if ended is None else round(ended - began, 1)


def machine() -> str:
    """Say what the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{found[0] if found else platform.machine()}, {os.cpu_count()} cores, {gib:.0f} GiB, "
        f"Python {platform.python_version()}, Ray {version('ray')}"
    )


def keep(row: dict[str, Any]) -> None:
    """Write one result over the one before."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{row['fault'].replace(' ', '_')}.json"
    path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
