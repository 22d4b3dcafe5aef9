"""The audit of pinned versions: clean is only what was looked at, and what is not known is said."""

import json
import time

import pytest

from scripts.pin_audit import CLEAN, CONSTRAINTS, NOT_KNOWN, VULNERABLE, main, pins

# As pip-audit 2.10 prints them.
JINJA = {"name": "jinja2", "version": "3.1.5", "vulns": []}
FAULT = {
    "id": "PYSEC-2026-7",
    "fix_versions": ["3.1.6"],
    "aliases": ["CVE-2026-27516", "GHSA-cpwx-vrp4-4pq7"],
}
UNFIXED = {"id": "GHSA-aaaa-bbbb-cccc", "fix_versions": [], "aliases": []}
SIX = {"name": "six", "version": "1.17.0", "vulns": []}
SKIPPED = {
    "name": "six",
    "skip_reason": "Dependency not found on PyPI and could not be audited: six (1.17.0)",
}
UNREACHABLE = """\
Traceback (most recent call last):
requests.exceptions.ConnectionError: Max retries exceeded with url: /pypi/six/1.17.0/json
"""


@pytest.fixture
def audit(tmp_path, capsys):
    """Run the audit of two pins with a pip-audit that answers as told."""

    def run(script, limit=10):
        tool, constraints = tmp_path / "pip-audit", tmp_path / "constraints.txt"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        constraints.write_text("# two\nJinja2==3.1.5\nsix==1.17.0; python_version < '3'\n")
        code = main(["--tool", str(tool), "--constraints", str(constraints), "--limit", str(limit)])
        return code, capsys.readouterr().out

    return run


def prints(*packages, code=0):
    answer = json.dumps({"dependencies": packages, "fixes": []})
    return f"cat <<'END'\n{answer}\nEND\nexit {code}"


def test_every_pin_audited_and_none_vulnerable_is_clean(audit):
    """The one case that ends with 0."""
    assert audit(prints(JINJA, SIX)) == (
        CLEAN,
        "2 pinned packages were audited, no vulnerability is known\n",
    )


def test_a_known_vulnerability_is_named_with_its_remedy(audit):
    """Name, version, ids and the version that fixes it; that another is not known is said too."""
    code, said = audit(prints(JINJA | {"vulns": [FAULT, UNFIXED]}, SKIPPED, code=1))
    assert code == VULNERABLE
    assert said.splitlines() == [
        "vulnerable: jinja2 3.1.5: GHSA-aaaa-bbbb-cccc; fixed in no version yet",
        "vulnerable: jinja2 3.1.5: PYSEC-2026-7, CVE-2026-27516, GHSA-cpwx-vrp4-4pq7;"
        " fixed in 3.1.6",
        "not known, the service did not tell: six",
    ]


@pytest.mark.parametrize(
    "answered",
    [[JINJA, SKIPPED], [JINJA], [JINJA, SIX | {"version": "1.16.0"}]],
    ids=["skipped", "left out", "of another version"],
)
def test_a_package_that_was_not_looked_at_is_not_clean(audit, answered):
    """pip-audit ends with 0 there."""
    assert audit(prints(*answered)) == (
        NOT_KNOWN,
        "not known, the service did not tell: six\n",
    )


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (f"cat >&2 <<'END'\n{UNREACHABLE}END\nexit 1", "Max retries exceeded"),
        ("exit 0", "it said nothing"),
        ("echo Found no vulnerability", "printed no JSON"),
        ("echo '[]'", "printed no JSON"),
        ("exec sleep 60", "no answer within 0.5 s"),
    ],
    ids=["unreachable", "silent", "no JSON", "another form", "hanging"],
)
def test_no_answer_is_one_line_and_not_clean(audit, script, told):
    """Whatever happens to the service or to pip-audit, in bounded time."""
    began = time.monotonic()
    code, said = audit(script, limit=0.5 if "sleep" in script else 10)
    assert time.monotonic() - began < 10
    assert code == NOT_KNOWN
    assert said.startswith("not known, none of 2 pinned packages was audited: ")
    assert told in said
    assert len(said.splitlines()) == 1


def test_a_tool_that_is_not_there_is_not_clean(tmp_path, capsys):
    """One line as well."""
    assert main(["--tool", str(tmp_path / "none")]) == NOT_KNOWN
    assert "does not start" in capsys.readouterr().out


def test_every_line_of_the_constraints_is_a_pin(tmp_path, capsys):
    """None is left out unseen; a line without a version is refused."""
    lines = [
        line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")
    ]
    assert len(pins(CONSTRAINTS.read_text())) == len(lines) > 100
    loose = tmp_path / "constraints.txt"
    loose.write_text("six==1.17.0\ntorch>=2\n")
    with pytest.raises(SystemExit, match="2"):
        main(["--constraints", str(loose)])
    assert "this line pins no version: torch>=2" in capsys.readouterr().err
