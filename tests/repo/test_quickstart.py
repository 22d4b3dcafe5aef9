"""The quickstart before it starts anything: its folder, its lock, its ports."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from scripts import quickstart_demo
from scripts.quickstart_state import Failure, hold, write_secret
from tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent


def quickstart(*flags, home):
    """Run the script without what sets up the environment."""
    return subprocess.run(
        [sys.executable, "-m", "scripts.quickstart_demo", *flags],
        cwd=ROOT,
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_quickstart_config_names_the_folder_of_its_port():
    """Else the gate would look for the token where the quickstart does not put it."""
    config = yaml.safe_load(quickstart_demo.CONFIG.read_text())
    port = config["http_options"]["port"]
    (app,) = config["applications"]
    assert app["args"]["access"]["token_file"] == f"{quickstart_demo.STATE}/{port}/token"


def test_hold_shares_no_file_between_two_ports(tmp_path):
    """A second quickstart overwrites nothing of the first, and its end takes nothing away."""
    with hold(tmp_path, port=8000) as first:
        first.log.write_text("first")
        write_secret(first.token, "token of the first")
        (first.hf_home / "hub").mkdir(parents=True)
        before = {path: path.read_bytes() for path in first.folder.iterdir() if path.is_file()}
        with hold(tmp_path, port=8001) as second:
            second.log.write_text("second")
            write_secret(second.token, "token of the second")
            assert second.ray_token.read_text() != first.ray_token.read_text()
            assert second.environment()["HF_HOME"] != first.environment()["HF_HOME"]
        after = {path: path.read_bytes() for path in first.folder.iterdir() if path.is_file()}
        assert after == before
        assert (first.hf_home / "hub").is_dir()


def test_hold_removes_secrets_and_weights_at_the_end(tmp_path):
    """The log stays, for whoever wants to know why it ended."""
    with suppress(KeyboardInterrupt), hold(tmp_path, port=8000) as state:
        state.log.write_text("log")
        write_secret(state.token, "secret")
        (state.hf_home / "hub").mkdir(parents=True)
        assert state.folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in (state.token, state.ray_token)} == {0o600}
        raise KeyboardInterrupt
    assert {path.name for path in (tmp_path / "8000").iterdir()} == {"lock", "serve-run.log"}


def test_write_secret_is_its_owners_alone_whatever_was_there_before(tmp_path):
    """A file that everybody could read is replaced and not filled."""
    path = tmp_path / "token"
    path.write_text("old")
    path.chmod(0o644)
    write_secret(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)


def test_hold_refuses_the_same_port_twice_and_harms_nothing(tmp_path):
    """The message names the holder; its token still counts, and its end frees the port."""
    with hold(tmp_path, port=8000) as first:
        token = first.ray_token.read_text()
        with (
            pytest.raises(Failure, match=rf"port 8000 already \(process {os.getpid()}, since 2"),
            hold(tmp_path, port=8000),
        ):
            pass
        assert first.ray_token.read_text() == token
    with hold(tmp_path, port=8000) as again:
        assert again.ray_token.read_text() != token


def test_hold_goes_on_without_locks_of_the_file_system(tmp_path, monkeypatch):
    """There the check of the ports has to do; a disk that fails is reported."""

    def refuse(code):
        def flock(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOLCK)
    with hold(tmp_path, port=8000) as state:
        assert state.ray_token.exists()
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), hold(tmp_path, port=8000):
        pass


def test_quickstart_started_twice_says_one_sentence(tmp_path):
    """Before a port is looked at, a model made or Ray started."""
    port = free_port()
    with hold(tmp_path / ".cache" / "serve-app" / "quickstart", port=port):
        done = quickstart("--port", str(port), "--hub-port", str(free_port()), home=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        rf"error: a quickstart runs on port {port} already \(process {os.getpid()}, since \S+\); "
        r"stop it with Ctrl-C, or choose another port with --port and --hub-port\.\n",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--port", "8090"), "have to be two ports"),
        (("--port", "0"), "0 is not a port (1 to 65535)"),
        (("--hub-port", "65536"), "65536 is not a port"),
        (("--port", "eight"), "invalid"),
    ],
)
def test_quickstart_refuses_ports_that_cannot_be_by_name(tmp_path, flags, words):
    """With the usage, and without a traceback."""
    done = quickstart(*flags, home=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


STOPPED = """
import os, signal, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may be ignoring it
from scripts import quickstart_demo
quickstart_demo._stop_by_signal()
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(30)
except KeyboardInterrupt:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        os.kill(os.getpid(), getattr(signal, name))
    print("stopped in order")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_quickstart_stopping_is_not_interrupted_by_a_second_ctrl_c(name):
    """What was started is stopped in order, however impatient somebody is."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED.format(name=name)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "stopped in order\n"), done.stderr


def test_quickstart_respects_nohup():
    """A closed terminal does not stop what was started to outlive it."""
    script = "import signal; from scripts import quickstart_demo as q; print(list(q.STOPPING))"
    done = subprocess.run(
        ["nohup", sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == str([signal.SIGINT, signal.SIGTERM])
