"""The set-up scripts: nothing to do is fast, and a fault is one clear sentence."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A copy of what set-up needs, without an environment."""
    for name in ("scripts/install", "scripts/constraints.txt", "pyproject.toml", "README.md"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path


def install(directory, *arguments, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "VIRTUAL_ENV"))}
    return subprocess.run(
        [directory / "scripts" / "install", *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_install_refuses_a_python_that_is_too_old(checkout):
    """The message names what is needed and how to choose another interpreter."""
    old = checkout / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = install(checkout, PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr.startswith("error: Python 3.11 or newer is needed")
    assert len(done.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()


def test_install_without_a_registry_says_one_sentence(checkout):
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


@pytest.fixture
def ready(checkout):
    """A copy whose environment has nothing to do."""
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
    return checkout


def test_install_leaves_a_ready_environment_alone(ready):
    """Again in under three seconds, without a word."""
    began = time.monotonic()
    done = install(ready, PYTHON=sys.executable)
    assert time.monotonic() - began < 3
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("arguments", [("--tool",), ("--tools", "now"), ("",)], ids=" ".join)
def test_install_refuses_an_unknown_option(checkout, arguments):
    """Before anything is installed, and the message names the one there is."""
    done = install(checkout, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: scripts/install takes --tools or nothing")
    assert len(done.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()


APT_GET = """\
echo "$@" >>"$0.asked"
case "$*" in *"$REFUSED") exit 100 ;; esac
[ "$1" = update ] || for program in "$4" promtool; do cp "$0" "${0%/*}/$program"; done
"""


@pytest.fixture
def programs(ready):
    """A PATH that holds little; `add` puts one more in it."""
    path = ready / "programs"
    path.mkdir()
    for name in ("cat", "cksum", "cp", "dirname"):
        (path / name).symlink_to(shutil.which(name))

    def add(*names, script=""):
        for name in names:
            (path / name).write_text(f"#!/bin/sh\n{script}\n")
            (path / name).chmod(0o755)
        return path

    add("id", script="echo 0")
    return add


def install_tools(ready, path, refused="nothing"):
    return install(ready, "--tools", PYTHON=sys.executable, PATH=str(path), REFUSED=refused)


def test_install_tools_leaves_those_that_are_there(ready, programs):
    """Without a word, and apt-get is not asked."""
    path = programs("g++", "promtool", "prometheus", "chromium")
    programs("apt-get", script=APT_GET)
    done = install_tools(ready, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (path / "apt-get.asked").exists()


@pytest.mark.parametrize("whose", ["root without apt-get", "not root"])
def test_install_tools_lists_those_that_nobody_may_install(ready, programs, whose):
    """What is missing and what is not tried without it; the rest of the work goes on."""
    path = programs("g++")
    if whose == "not root":
        programs("id", script="echo 1000")
        programs("apt-get", script=APT_GET)
    done = install_tools(ready, path)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("Missing here: prometheus chromium (")
    assert "alert rules" in line
    assert "in a browser" in line
    assert "native engine" not in line
    assert not (path / "apt-get.asked").exists()


def test_install_tools_gets_root_those_that_are_missing(ready, programs):
    """One by one, without what they merely recommend; nothing is left to say."""
    path = programs("apt-get", script=APT_GET)
    programs("chromium")
    done = install_tools(ready, path)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("Installing g++ prometheus with apt-get")
    assert (path / "apt-get.asked").read_text().splitlines() == [
        "update",
        "install -y --no-install-recommends g++",
        "install -y --no-install-recommends prometheus",
    ]


@pytest.mark.parametrize(
    ("refused", "missing"),
    [("chromium", "chromium"), ("update", ""), ("", "g++ prometheus chromium")],
)
def test_install_tools_lists_what_apt_get_does_not_give(ready, programs, refused, missing):
    """A distribution without one of them has the others."""
    done = install_tools(ready, programs("apt-get", script=APT_GET), refused)
    assert (done.returncode, done.stderr) == (0, "")
    said = [line for line in done.stdout.splitlines() if line.startswith("Missing here: ")]
    assert [line.partition(" (")[0] for line in said] == ["Missing here: " + missing] * bool(
        missing
    )


@pytest.mark.parametrize(
    ("audited", "code", "last"), [(0, 0, "test"), (4, 0, "test"), (1, 1, "audit"), (2, 2, "audit")]
)
def test_ci_stops_at_a_vulnerability_and_says_what_is_not_known(tmp_path, audited, code, last):
    """What could not be determined does not pass in silence."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    for name in ("install", "check", "audit", "test"):
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
    assert said[:3] == ["install --tools", "check", "audit"]
    assert said[-1] == last
    assert any("not known" in line for line in said) == (audited == 4)


def test_scripts_stop_at_the_first_error():
    """A failed check must not look like a passed one."""
    scripts = [*(ROOT / "scripts").glob("[a-z]*"), ROOT / ".ci" / "run"]
    shells = [
        path for path in scripts if path.is_file() and path.read_text().startswith("#!/bin/sh")
    ]
    assert len(shells) >= 7
    assert all("\nset -eu\n" in path.read_text() for path in shells)


def test_chaos_deselected():
    """A run of all tests, or of all but a marker's, breaks nothing: that wants `-m chaos`."""
    code = (
        "import pytest\n"
        "for more in [], ['-m', 'not cluster']:\n"
        "    pytest.main(['--collect-only', '-q', 'tests/chaos', *more])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    found = [line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line]
    assert found.count("tests/chaos/test_report.py::test_render_results") == 2
    assert "tests/chaos/test_chaos.py::test_chaos" not in found


def test_chaos_list():
    """`scripts/chaos --list` prints the names that it takes, which `-m chaos` selects."""
    done = subprocess.run(
        [ROOT / "scripts" / "chaos", "--list"],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    names = done.stdout.splitlines()
    assert {"replica killed", "Hub down, receipts", "4 nodes", "attacks"} <= set(names)
    assert len(names) == len(set(names)) > 20
