"""`scripts/audit`: its exit code says what is known about the pinned versions."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLEAN, VULNERABLE, NOT_KNOWN = 0, 1, 4

# As pip-audit 2.10 prints them.
NONE_FOUND = """\
WARNING:pip_audit._cli:--no-deps is supported, but users are encouraged to fully hash them
No known vulnerabilities found
"""
FOUND = """\
Found 1 known vulnerability in 1 package
Name   Version ID           Fix Versions Aliases
------ ------- ------------ ------------ --------------
jinja2 3.1.5   PYSEC-2026-7 3.1.6        CVE-2026-27516
"""
SKIPPED = """\
Name Skip Reason
---- -------------------------------------------------------------------
six  Dependency not found on PyPI and could not be audited: six (1.17.0)
"""
UNREACHABLE = """\
Traceback (most recent call last):
requests.exceptions.ConnectionError: Max retries exceeded with url: /pypi/six/1.17.0/json
"""


@pytest.fixture
def audit(tmp_path):
    """Run the script with a pip-audit of the test's own; returns exit code and output."""
    for name in ("scripts/install", ".venv/bin/pip-audit"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    shutil.copy(ROOT / "scripts" / "audit", tmp_path / "scripts")
    (tmp_path / "scripts" / "constraints.txt").write_text("jinja2==3.1.5\nsix==1.17.0\n")

    def run(tool, **variables):
        (tmp_path / ".venv" / "bin" / "pip-audit").write_text(f"#!/bin/sh\n{tool}\n")
        done = subprocess.run(
            [tmp_path / "scripts" / "audit"],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.stderr == ""
        return done.returncode, done.stdout

    return run


def prints(answer, code=0):
    return f"cat <<'END'\n{answer}END\nexit {code}"


def test_audit_clean(audit):
    """The one case that ends with 0."""
    assert audit(prints(NONE_FOUND)) == (CLEAN, "no pinned version has a known vulnerability\n")


@pytest.mark.parametrize("answer", [FOUND, FOUND + "\n" + SKIPPED])
def test_audit_vulnerable(audit, answer):
    """pip-audit's table is shown, with what could not be audited besides."""
    assert audit(prints(answer, code=1)) == (VULNERABLE, answer)


def test_audit_unknown_package(audit):
    """A package that the service does not know is not clean, though pip-audit ends with 0."""
    assert audit(prints(NONE_FOUND + SKIPPED)) == (
        NOT_KNOWN,
        "not known: the service could not audit 1 of the pinned packages\n",
    )


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (prints(UNREACHABLE, code=1), "Max retries exceeded"),
        ("exit 0", "no answer in time"),
        ("exec sleep 60", "no answer in time"),
        ("exec /nowhere/pip-audit", "/nowhere/pip-audit"),
    ],
    ids=["unreachable", "silent", "hanging", "not installed"],
)
def test_audit_no_answer(audit, tool, reason):
    """One line and exit code 4, in bounded time."""
    began = time.monotonic()
    code, said = audit(tool, AUDIT_LIMIT_S="2")
    assert time.monotonic() - began < 20
    assert code == NOT_KNOWN
    assert said.startswith("not known: ")
    assert reason in said
    assert len(said.splitlines()) == 1


def test_audit_real_tool(audit):
    """The installed pip-audit takes every option; without a network its answer is "not known"."""
    tool = Path(sys.executable).parent / "pip-audit"
    code, said = audit(f'exec {tool} "$@"', HTTPS_PROXY="http://127.0.0.1:9", https_proxy="")
    assert code == NOT_KNOWN, said
    assert "usage:" not in said
    assert "unrecognized" not in said
