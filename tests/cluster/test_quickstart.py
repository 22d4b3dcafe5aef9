"""The quickstart as a newcomer runs it: the real model, a real gate, real processes."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.cluster


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def home(tmp_path):
    """An empty home that marks the processes of one test."""
    return tmp_path


@pytest.fixture
def command(home, monkeypatch, demo_model_dir):
    """The script with ports of its own and an empty home, but the demo model already made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HOME", str(home))
    ports = ["--port", str(free_port()), "--hub-port", str(free_port())]
    return [str(ROOT / "scripts" / "quickstart"), *ports]


def run(command, *flags):
    return subprocess.run(
        [*command, *flags], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )


def test_once_answers_and_exits_0(command):
    """One question, a sensible answer of the real model."""
    done = run(command, "--once")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout.splitlines()[-1]


def test_deny_exits_3_with_the_table_and_downloads_nothing(command):
    """The blocked rollout names the node, the token and the link; no byte of weights is sent."""
    done = run(command, "--deny")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "license_not_accepted" in done.stdout
    assert re.search(r"http://127\.0\.0\.1:\d+/HuggingFaceTB/SmolLM2-135M-Instruct", done.stdout)
    assert "; 0 bytes of weights were sent." in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not re.search(r"hf_[A-Za-z0-9]{20,}", done.stdout + done.stderr)


def test_a_taken_port_is_one_sentence(command):
    """The message names the port and the flag."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command[2] = str(taken.getsockname()[1])
        done = run(command)
    assert done.returncode == 2
    assert (
        done.stderr.strip() == f"error: port {command[2]} is taken; choose another one with --port."
    )


def test_ctrl_c_stops_everything_it_started(command, home):
    """The printed curl line answers; after Ctrl-C no process of the session is left."""
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines = []
    try:
        for line in child.stdout:
            lines.append(line)
            if "Ctrl-C stops everything" in line:
                break
        assert child.poll() is None, "".join(lines)
        curl = re.search(r"curl .*?'\n", "".join(lines), re.DOTALL).group()
        answer = subprocess.run(
            ["sh", "-c", f"{curl.strip()} -s"], capture_output=True, check=True, timeout=60
        )
        assert len(processes(home)) > 5  # Ray, Serve's actors, serve run
        assert "Paris" in json.loads(answer.stdout)["choices"][0]["message"]["content"]
        assert missing_metrics(int(command[2])) == set()
    finally:
        os.killpg(child.pid, signal.SIGINT)
        rest, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Stopped everything" in rest
    assert "Traceback" not in rest
    for port in (int(command[2]), int(command[4])):
        with pytest.raises(ConnectionRefusedError):
            http.client.HTTPConnection("127.0.0.1", port, timeout=2).connect()
    deadline = time.monotonic() + 10
    while (left := processes(home)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def missing_metrics(port):
    """Names that the dashboard asks for and the service's own page lacks, once Ray exports."""
    dashboard = (ROOT / "configs/grafana/serve-app.json").read_text()
    # Counters of what one healthy question does not do.
    asked = set(re.findall(r"\bray_[a-z0-9_]+", dashboard)) - {
        "ray_serve_app_preemptions_total",
        "ray_serve_app_prefix_cache_hits_total",
    }
    deadline = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            found = set(re.findall(r"^(ray_[a-z0-9_]+)", page.read().decode(), re.MULTILINE))
        if not asked - found or time.monotonic() > deadline:
            return asked - found
        time.sleep(1)


def processes(home):
    """Command lines of the processes that run under this home."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"HOME={home}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes())
    return found
