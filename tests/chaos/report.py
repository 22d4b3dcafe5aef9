"""One JSON file for each fault, and the table of all of them."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.chaos.load import OK, failures
from tests.chaos.stage import Stage

PLACE = Path(__file__).parent
RESULTS = PLACE / "results"
FAULT_TEXT = (
    "## Faults",
    "",
    "Two replicas of a tiny random model on logical nodes that share nothing, under four streams",
    "a second. `streams there`: running on what was lost, at that moment. `answers again`: from",
    "the fault to the end of the first good stream that began after it. `whole again`: to the",
    "moment when all that was lost runs again. The fault that a fixed Hub, disk or token ends is",
    "held for 20 s. Other work shared the cores: times are upper bounds, counts are exact.",
)
FAULT_HEAD = (
    "fault",
    "what happens",
    "sent",
    "failed",
    "streams there",
    "answers again, s",
    "whole again, s",
    "",
)
NODES_TEXT = (
    "## The Hub's bytes by nodes",
    "",
    "Four replicas on each node, a quarter of its GPU each.",
)
NODES_HEAD = (
    "nodes",
    "replicas",
    "weights from the Hub",
    "from other nodes",
    "requests to the Hub",
    "to its CDN",
    "deploy to running, s",
    "a replica's start, median s",
)
ROLLOUTS_TEXT = (
    "## Rollouts under load",
    "",
    "Two replicas of a tiny random model, `serve-app deploy` and `rollback` one after the other",
    "under {per_s:.0f} streams a second of {tokens} tokens each; each window begins 5 s before the",
    "command and ends 5 s after it.",
)
ROLLOUTS_HEAD = (
    "rollout",
    "exit",
    "it says",
    "seconds",
    "sent",
    "failed",
    "e2e p50, s",
    "p99, s",
)
GROWTH_TEXT = (
    "## Scaling up after rollouts that did not go through",
    "",
    "One replica of a tiny random model that may become two, {per_s:.0f} streams a second of",
    "{tokens} tokens each. From the beginning of that load to the second replica that runs; what",
    "does not come is waited for {waited_s:.0f} s.",
)
GROWTH_HEAD = ("before the load", "exit", "Serve says", "second replica, s", "sent", "failed")
ATTACKS_TEXT = (
    "## One client that does what it should not",
    "",
    "One replica of the demo model. Beside each attack, and for 20 s alone before it, a steady",
    "probe: a chat every second, whose first token is timed, a stream, and `/health`. The memory",
    "is the replica's: before, at its peak, after.",
)
ATTACKS_HEAD = (
    "attack",
    "what happens",
    "its own answers",
    "the slowest, s",
    "others' ttft p99: alone, beside, s",
    "ratio",
    "`/health` p99, s",
    "longest gap in a stream: alone, beside, s",
    "others' faults",
    "memory, MiB",
    "processes",
)
LINES_TEXT = (
    "## Eight nodes with a line each",
    "",
    "{megabytes:.0f} MB in {files} files from a Hub of {hub_mb_s:g} MB/s to nodes with lines of",
    "{line_mb_s:g} MB/s each way, all beginning at once; one node alone, then eight. From the",
    "first that begins to the last that has all.",
)
LINES_HEAD = ("round", "one node, s", "eight nodes, s", "ratio", "from the Hub ÷ the weights")


def summarise(stage: Stage, name: str, what: str, note: str) -> dict[str, Any]:
    """Return a fault's row.

    `answers_again_s` is from the fault to the end of the first good stream that began after it,
    `whole_again_s` to the moment when everything that was lost runs again.
    """
    answers = sorted(stage.load.answers, key=lambda answer: answer.began)
    struck = stage.struck_at or answers[0].began
    later = [answer.ended for answer in answers if answer.kind == OK and answer.began >= struck]
    last = max((answer.began for answer in answers if answer.kind != OK), default=None)
    return {
        "fault": name,
        "what": what,
        "note": note,
        "streams_lost": stage.streams_lost,
        "sent": len(answers),
        "failed": failures(answers),
        "before_fault_failed": sum(a.kind != OK and a.ended < struck for a in answers),
        "answers_again_s": _since(struck, min(later, default=None)),
        "last_failed_sent_s": _since(struck, last),
        "whole_again_s": _since(struck, stage.recovered_at),
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


def keep(name: str, result: dict[str, Any]) -> None:
    """Write one result over the one before, with the machine and the day."""
    RESULTS.mkdir(exist_ok=True)
    facts = result | {"machine": machine(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    _path(name).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def write(faults: Collection[str]) -> None:
    """Write `results.md` of everything that was kept."""
    (PLACE / "results.md").write_text(render(faults), encoding="utf-8")


def render(faults: Collection[str]) -> str:
    """Return the text of `results.md`; the faults in this order."""
    rows = list(filter(None, map(_kept, faults)))
    nodes = list(filter(None, (_kept(f"{count} nodes") for count in (1, 2, 4))))
    lined, rollouts, growth = map(_kept, ("eight nodes", "rollouts", "growth"))
    attacks = _kept("attacks")
    measured = [*rows, *nodes, *filter(None, (lined, rollouts, growth, attacks))]
    lines = ["# What is lost when something breaks, and what starts cost", ""]
    lines += sorted({f"Measured {row['date']} on {row['machine']}." for row in measured})
    if rows:
        lines += ["", *FAULT_TEXT, "", *_table(FAULT_HEAD, map(_fault_cells, rows))]
        if missing := [name for name in faults if not _path(name).exists()]:
            lines += ["", f"Not measured yet: {', '.join(missing)}."]
    if rollouts:
        text = [line.format(**rollouts) for line in ROLLOUTS_TEXT]
        cells = map(_rollout_cells, rollouts["rollouts"])
        lines += ["", *text, "", *_table(ROLLOUTS_HEAD, cells)]
    if growth:
        text = [line.format(**growth) for line in GROWTH_TEXT]
        lines += ["", *text, "", *_table(GROWTH_HEAD, map(_growth_cells, growth["rounds"]))]
    if attacks:
        cells = map(_attack_cells, attacks["attacks"])
        lines += ["", *ATTACKS_TEXT, "", *_table(ATTACKS_HEAD, cells)]
    if nodes:
        lines += ["", *NODES_TEXT, "", *_table(NODES_HEAD, map(_nodes_cells, nodes))]
    if lined:
        text = [line.format(**lined) for line in LINES_TEXT]
        cells = [[number, *each.values()] for number, each in enumerate(lined["rounds"], 1)]
        lines += ["", *text, "", *_table(LINES_HEAD, cells)]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    # A cell is one line, whatever a docstring or an error's text looks like.
    return [f"| {' | '.join(' '.join(str(cell).split()) for cell in line)} |" for line in lines]


def _failed(row: dict[str, Any]) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in row["failed"].items()) or "0"


def _rollout_cells(row: dict[str, Any]) -> list[object]:
    names = ("rollout", "exit_code", "said", "seconds", "sent")
    return [*(row[name] for name in names), _failed(row), row["p50_s"], row["p99_s"]]


def _growth_cells(row: dict[str, Any]) -> list[object]:
    facts = [row["before"], row["exit_code"], row["status"]]
    return [*facts, _seconds(row["grown_s"]), row["sent"], _failed(row)]


def _fault_cells(row: dict[str, Any]) -> list[object]:
    return [
        row["fault"],
        row["what"],
        row["sent"],
        _failed(row),
        row["streams_lost"] or "",
        _seconds(row["answers_again_s"]),
        _seconds(row["whole_again_s"]),
        row["note"],
    ]


def _attack_cells(row: dict[str, Any]) -> list[object]:
    alone, beside = row["alone"], row["beside"]
    answers = ", ".join(f"{count} × {kind}" for kind, count in row["answers"].items())
    faults = ", ".join(f"{count} × {kind}" for kind, count in beside["faults"].items())
    return [
        row["attack"],
        row["what"],
        answers,
        row["slowest_answer_s"],
        f"{alone['ttft_p99_s']}, {beside['ttft_p99_s']}",
        row["ttft_p99_ratio"],
        beside["health_p99_s"],
        f"{alone['gap_max_s']}, {beside['gap_max_s']}",
        faults or "0",
        ", ".join(map(str, row["memory_mib"])),
        "the same" if row["same_processes"] else "others",
    ]


def _nodes_cells(row: dict[str, Any]) -> list[object]:
    times = row["sent_weights_bytes"] / row["weights_bytes"]
    return [
        row["nodes"],
        row["replicas"],
        f"{row['sent_weights_bytes'] / 1e6:.1f} MB ({times:.2f} × the weights)",
        f"{row['peer_bytes'] / 1e6:.1f} MB",
        row["hub_requests"],
        row["content_requests"],
        row["deploy_s"],
        row["median_replica_ready_s"],
    ]


def _seconds(value: float | None) -> str:
    return "not" if value is None else f"{value:.1f}"


def _kept(name: str) -> dict[str, Any] | None:
    path = _path(name)
    kept: dict[str, Any] | None = json.loads(path.read_text("utf-8")) if path.exists() else None
    return kept


def _path(name: str) -> Path:
    return RESULTS / f"{name.replace(', ', '_').replace(' ', '_').lower()}.json"
