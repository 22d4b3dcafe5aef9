"""The `check` command: the gate without a rollout, for people, scripts and CI.

Prints a table or one JSON object for each application, writes a JUnit file if asked, and with
`--wait` asks again while an access request is under review.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from serve_app.access.verdict import NodeVerdict, Outcome, Verdict
from serve_app.serve_config import ServedApp

# The Hub shows a decision within about a second; asking twice a minute is far below its quotas.
POLL_S = 30.0
COLOURS = {"granted": "32", "DEFERRED": "33", "BLOCKED": "31", "NOT PROVEN": "31"}
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")

Gate = Callable[[ServedApp], Verdict]


@dataclass(frozen=True, slots=True)
class Output:
    """How verdicts are shown."""

    as_json: bool = False
    junit: Path | None = None


def run(apps: Sequence[ServedApp], gate: Gate, output: Output, *, wait_s: float = 0) -> int:
    """Check every application and show the verdicts.

    Args:
        apps: applications to check.
        gate: checks one of them.
        output: how to show the result.
        wait_s: how long to go on while a request is under review, in seconds.

    Returns:
        The exit code: the worst of all applications; 3 (blocked) is worse than 4 (unknown).
    """
    results = [(app, _settled(app, gate, wait_s=wait_s)) for app in apps]
    for app, verdict in results:
        print(json.dumps(verdict.to_json()) if output.as_json else _shown(app, verdict))
    if output.junit:
        output.junit.write_text(junit(results), encoding="utf-8")
    # Not the highest number: blocked is 3, and who was told no need not wait for an answer.
    codes = {verdict.exit_code for _, verdict in results}
    return next((code for code in (3, 4) if code in codes), 0)


def parse_duration(text: str) -> float:
    """Read `1h30m`, `45m`, `90s` or `90` as seconds.

    Raises:
        ValueError: none of these.
    """
    # Every part may be absent, so the pattern takes an empty text, which is no duration.
    match = _DURATION.fullmatch(text.strip())
    if not match or not text.strip():
        raise ValueError(f"{text!r} is not a duration; write it as 1h, 30m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(hours * 3600 + minutes * 60 + seconds)


def junit(results: Sequence[tuple[ServedApp, Verdict]]) -> str:
    """Render verdicts as JUnit XML: a suite for each application, a case for each node."""
    root = ElementTree.Element("testsuites")
    for name, verdict in ((app.name, part) for app, whole in results for part in whole.parts):
        failures = sum(_is_failure(node) for node in verdict.nodes)
        # A suite of no case is green in most systems; without nodes there is one that failed.
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"{name}: {verdict.repo_id}",
            tests=str(len(verdict.nodes) or 1),
            failures=str(failures if verdict.nodes else 1),
            time=f"{verdict.duration_s:.3f}",
        )
        _cases(suite, verdict)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _is_failure(node: NodeVerdict) -> bool:
    return node.outcome is not Outcome.GRANTED and not node.deferred


def _cases(suite: ElementTree.Element, verdict: Verdict) -> None:
    for node in verdict.nodes:
        case = ElementTree.SubElement(suite, "testcase", classname="access", name=node.node_name)
        if node.deferred:
            ElementTree.SubElement(case, "skipped", message=node.line())
        elif _is_failure(node):
            fault = ElementTree.SubElement(case, "failure", type=node.outcome, message=node.remedy)
            fault.text = node.line()
    if not verdict.nodes:
        case = ElementTree.SubElement(suite, "testcase", classname="access", name="eligible nodes")
        ElementTree.SubElement(case, "failure", type="no_nodes").text = verdict.table()


def _settled(app: ServedApp, gate: Gate, *, wait_s: float) -> Verdict:
    deadline = time.monotonic() + wait_s
    while True:
        verdict = gate(app)
        nodes = verdict.every_node
        pending = [node for node in nodes if node.outcome is Outcome.REQUEST_PENDING]
        left = deadline - time.monotonic()
        # Nodes differ: as long as one is under review the whole is not decided.
        if not pending or left <= 0:
            return verdict
        print(
            f"{app.name}: the request is under review on {len(pending)} of {len(nodes)} "
            f"nodes; asking again, {left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(min(POLL_S, left))


def _shown(app: ServedApp, verdict: Verdict) -> str:
    text = f"{app.name}: {verdict.table()}"
    if not sys.stdout.isatty():
        return text
    return "\n".join(_coloured(text.splitlines()))


def _coloured(lines: Sequence[str]) -> Iterator[str]:
    outcomes = {outcome.value for outcome in Outcome} - {Outcome.GRANTED.value}
    # Longest first: an alternative that begins another would match in its place.
    words = "|".join([*COLOURS, *sorted(outcomes, key=len, reverse=True)])
    for line in lines:
        yield re.sub(
            rf"\b(?:{words})\b", lambda m: f"\033[{COLOURS.get(m[0], '31')}m{m[0]}\033[0m", line
        )
