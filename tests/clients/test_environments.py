"""`scripts/clients`: nothing to do is fast, and a fault is one clear sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LISTS = "tests/clients/environments"


@pytest.fixture
def checkout(tmp_path):
    """A copy of what it reads."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "clients", tmp_path / "scripts")
    shutil.copytree(ROOT / LISTS, tmp_path / LISTS)
    return tmp_path


def run(checkout, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | variables
    return subprocess.run(
        [checkout / "scripts" / "clients"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def make_ready(checkout, *files, name):
    content = b"".join((checkout / LISTS / file).read_bytes() for file in files)
    stamp = subprocess.run(["cksum"], input=content, capture_output=True, check=True).stdout
    environment = checkout / ".venv-clients" / name
    environment.mkdir(parents=True)
    (environment / "installed").write_bytes(stamp.rstrip(b"\n"))
    return environment


def test_make_ready_does_nothing_where_nothing_is_to_do(checkout):
    """Each list that is unchanged keeps its environment."""
    for path in (checkout / LISTS).glob("*.txt"):
        make_ready(checkout, path.name, name=path.stem)
    make_ready(checkout, "package.json", "package-lock.json", name="node")
    before = sorted(checkout.rglob("*"))
    done = run(checkout)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(checkout.rglob("*")) == before


def test_make_ready_without_a_registry_says_one_sentence(checkout):
    """Which client it was, and where pip's own words are; the next run begins it again."""
    done = run(
        checkout,
        PYTHON=sys.executable,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_CONFIG_FILE=os.devnull,
        PIP_RETRIES="0",
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: instructor cannot be installed; see .venv-clients/instructor/install.log.\n"
    )
    assert (checkout / ".venv-clients" / "instructor" / "install.log").exists()
    assert not (checkout / ".venv-clients" / "instructor" / "installed").exists()
