"""Has a version that scripts/constraints.txt pins a known vulnerability? Asked with pip-audit.

pip-audit itself ends with 0 where the service did not know a package; here that is not clean:
0 is every pin audited and none vulnerable, 1 a known vulnerability, 4 not known.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parent / "constraints.txt"
LIMIT_S = 110.0
CLEAN, VULNERABLE, NOT_KNOWN = 0, 1, 4
NAMED = 10  # more names than these are a count

Pin = tuple[str, str]


class NoAnswer(Exception):
    """The audit said nothing that can be read; the message is one line."""


def main(arguments: list[str] | None = None) -> int:
    """Run the audit and return its exit code."""
    parser = argparse.ArgumentParser(prog="scripts/audit", description=__doc__)
    parser.add_argument("--constraints", type=Path, default=CONSTRAINTS, help="the pins to audit")
    beside = Path(sys.executable).parent / "pip-audit"
    parser.add_argument("--tool", default=str(beside), help="the pip-audit to run")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds ({LIMIT_S:g})")
    options = parser.parse_args(arguments)
    try:
        wanted = pins(options.constraints.read_text())
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        vulnerable, unknown = judge(wanted, ask(options.tool, wanted, options.limit))
    except NoAnswer as error:
        print(f"not known, none of {len(wanted)} pinned packages was audited: {error}")
        return NOT_KNOWN
    for line in vulnerable:
        print(f"vulnerable: {line}")
    if unknown:
        several = f"{len(unknown)} of {len(wanted)} pinned packages"
        names = ", ".join(unknown) if len(unknown) <= NAMED else several
        print(f"not known, the service did not tell: {names}")
    if vulnerable:
        return VULNERABLE
    if unknown:
        return NOT_KNOWN
    print(f"{len(wanted)} pinned packages were audited, no vulnerability is known")
    return CLEAN


def pins(text: str) -> list[Pin]:
    """Return names and versions, whatever machine a line is for.

    Raises:
        ValueError: a line pins nothing, or there is none.
    """
    found = []
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        pin = re.match(r"([\w.-]+)==([^\s;]+)\s*(?:;|$)", line)
        if pin is None:
            raise ValueError(f"this line pins no version: {line}")
        found.append((canonicalize_name(pin[1]), pin[2]))
    if not found:
        raise ValueError("nothing is pinned")
    return found


def ask(tool: str, wanted: list[Pin], limit_s: float) -> str:
    """Return what pip-audit prints.

    Raises:
        NoAnswer: it does not start or does not end in time.
    """
    with tempfile.TemporaryDirectory() as directory:
        asked, said, faults = (Path(directory) / name for name in ("pins.txt", "out", "err"))
        asked.write_text("".join(f"{name}=={version}\n" for name, version in wanted))
        command = [tool, "--requirement", str(asked), "--no-deps", "--disable-pip"]
        # The service is named: OSV says nothing, which reads as clean, of what it does not know.
        command += ["--vulnerability-service", "pypi", "--format", "json", "--timeout", "15"]
        with said.open("wb") as out, faults.open("wb") as err:
            try:
                subprocess.run(
                    [*command, "--progress-spinner", "off", "--desc", "off", "--aliases", "on"],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    timeout=limit_s,
                    check=False,  # 1 is a vulnerability and any fault: what it printed tells
                )
            except subprocess.TimeoutExpired:
                raise NoAnswer(f"pip-audit had no answer within {limit_s:g} s") from None
            except OSError as error:
                raise NoAnswer(f"pip-audit does not start: {error}") from None
        answer = said.read_text(errors="replace")
        if not answer.strip():
            lines = ["it said nothing", *faults.read_text(errors="replace").splitlines()]
            raise NoAnswer(f"pip-audit: {lines[-1].strip()[:300]}")
    return answer


def judge(wanted: list[Pin], answer: str) -> tuple[list[str], list[str]]:
    """Return the known vulnerabilities, one line each, and the names of what is not known.

    Only what the answer says to have audited, in the very version, is known.

    Args:
        wanted: the pins.
        answer: what pip-audit printed, as JSON.

    Raises:
        NoAnswer: it is none.
    """
    vulnerable, audited = [], set()
    try:
        for package in json.loads(answer)["dependencies"]:
            if "skip_reason" in package:
                continue
            name, version = canonicalize_name(package["name"]), package["version"]
            vulnerable += [_line(name, version, fault) for fault in package["vulns"]]
            audited.add((name, version))
    except (ValueError, KeyError, TypeError) as error:
        raise NoAnswer(f"pip-audit printed no JSON of the known form ({error!r})") from None
    return sorted(set(vulnerable)), [
        name for name, version in wanted if (name, version) not in audited
    ]


def _line(name: str, version: str, fault: dict[str, object]) -> str:
    also = fault.get("aliases")
    ids = ", ".join([str(fault["id"]), *(map(str, also) if isinstance(also, list) else ())])
    fixed = fault["fix_versions"]
    where = ", ".join(map(str, fixed)) if isinstance(fixed, list) and fixed else "no version yet"
    return f"{name} {version}: {ids}; fixed in {where}"


if __name__ == "__main__":
    sys.exit(main())
