"""Whose clock is looked at where: a wall clock is set, jumps, and differs between machines."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "serve_app"
# Every look at the wall clock, and why what follows from it stands a jump.
WALL = {
    "access/identity.py": "words about a token's dates, which the Hub has judged by its own clock",
    "access/receipt.py": "a date for auditors; freshness has a limit in both directions",
    "access/recheck.py": "a date to show",
    "api/chat_response.py": "`created`, as the API has it",
    "api/completion_response.py": "`created`, as the API has it",
    "api/keys.py": "the date of a key's end, as the operator has it",
    "api/responses_response.py": "`created_at` and `completed_at`, as the API has them",
    "deployments/ingress.py": "`created` of the model",
    "telemetry/cold_start.py": "one look when the process starts; from then on the monotonic clock",
    "access/notebook.py": "a time of day to show",
    "loadtest/session.py": "the date of a report",
    "rollout/lock.py": "a date to show",
    "telemetry/rollout_history.py": "a date that is never before that of an earlier entry",
}


def looks_at_the_wall_clock(tree):
    calls = {
        (node.func.value.id, node.func.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
    }
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "time"
        for alias in node.names
    }
    walls = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}
    return bool(calls & walls or imported & {"time", "time_ns"})


def test_wall_clock_is_looked_at_with_a_reason():
    """Limits, rates and ages are measured with a clock that only goes on."""
    files = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if looks_at_the_wall_clock(ast.parse(path.read_text()))
    }
    assert len(files) > 5
    assert files <= set(WALL)


def test_wall_clock_looks_are_found():
    """In each form in which it could be written."""
    for line in ("time.time()", "x = datetime.now(UTC)", "from time import time", "time.time_ns()"):
        assert looks_at_the_wall_clock(ast.parse(line)), line
    assert not looks_at_the_wall_clock(ast.parse("time.monotonic(); loop.time()"))
