"""The set-up scripts: nothing to do is fast, and a fault is one clear sentence."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A copy of what set-up needs, without an environment."""
    for name in ("scripts/install", "scripts/constraints.txt", "pyproject.toml", "README.md"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path


def install(directory, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "VIRTUAL_ENV"))}
    return subprocess.run(
        [directory / "scripts" / "install"],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_python_that_is_too_old_is_one_sentence(checkout):
    """The message names what is needed and how to choose another interpreter."""
    old = checkout / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = install(checkout, PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr.startswith("error: Python 3.11 or newer is needed")
    assert len(done.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()


def test_a_registry_out_of_reach_is_one_sentence(checkout):
    """The words of pip are shortened to a few lines; the last line says what to do."""
    done = install(
        checkout,
        PYTHON=sys.executable,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_CONFIG_FILE=os.devnull,
        PIP_RETRIES="0",
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the package registry could not be reached")
    assert "PIP_INDEX_URL" in last
    assert not (checkout / ".venv" / "installed").exists()  # the next run goes on


def test_an_environment_that_is_ready_is_left_alone(checkout):
    """Again in under three seconds, without a word."""
    stamp = subprocess.run(
        "cat pyproject.toml scripts/constraints.txt scripts/install | cksum",
        shell=True,
        cwd=checkout,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.rstrip("\n")
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (checkout / ".venv" / "installed").write_text(stamp)
    began = time.monotonic()
    done = install(checkout, PYTHON=sys.executable)
    assert time.monotonic() - began < 3
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("audited", "code", "last"), [(0, 0, "test"), (4, 0, "test"), (1, 1, "audit"), (2, 2, "audit")]
)
def test_ci_stops_at_a_vulnerability_and_says_what_is_not_known(tmp_path, audited, code, last):
    """What could not be determined does not pass in silence."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    for name in ("check", "audit", "test"):
        script = tmp_path / "scripts" / name
        script.write_text(
            f'#!/bin/sh\necho "{name} $*"\nexit {audited if name == "audit" else 0}\n'
        )
        script.chmod(0o755)
    done = subprocess.run(
        [tmp_path / ".ci" / "run"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code
    said = [line.strip() for line in done.stdout.splitlines()]
    assert said[:2] == ["check", "audit"]
    assert said[-1] == last
    assert any("not known" in line for line in said) == (audited == 4)


def test_every_script_stops_at_the_first_error():
    """A failed check must not look like a passed one."""
    scripts = [*(ROOT / "scripts").glob("[a-z]*"), ROOT / ".ci" / "run"]
    shells = [
        path for path in scripts if path.is_file() and path.read_text().startswith("#!/bin/sh")
    ]
    assert len(shells) >= 7
    assert all("\nset -eu\n" in path.read_text() for path in shells)
