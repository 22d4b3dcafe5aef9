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
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent
LISTEN = "0A"  # as /proc/net/tcp says it

pytestmark = pytest.mark.cluster


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


def test_quickstart_once_answers_and_exits_0(command):
    """One question, a sensible answer of the real model."""
    done = run(command, "--once")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout.splitlines()[-1]


def test_quickstart_deny_exits_3_with_the_table_and_downloads_nothing(command):
    """The blocked rollout names the node, the token and the link; no byte of weights is sent."""
    done = run(command, "--deny")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "license_not_accepted" in done.stdout
    assert re.search(r"http://127\.0\.0\.1:\d+/HuggingFaceTB/SmolLM2-135M-Instruct", done.stdout)
    assert "; 0 bytes of weights were sent." in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not re.search(r"hf_[A-Za-z0-9]{20,}", done.stdout + done.stderr)


def test_quickstart_on_a_taken_port_says_one_sentence(command):
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


class Demo:
    """A quickstart that runs, and what it printed so far."""

    def __init__(self, command):
        self.port, self.hub_port = int(command[2]), int(command[4])
        self.child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        lines = []
        for line in self.child.stdout:
            lines.append(line)
            if "Ctrl-C stops everything" in line:
                break
        self.said = "".join(lines)
        assert self.child.poll() is None, self.said

    def ask(self):
        """Run the curl line that was printed; returns the answer."""
        curl = re.search(r"curl .*?'\n", self.said, re.DOTALL).group()
        done = subprocess.run(
            ["sh", "-c", f"{curl.strip()} -s"], capture_output=True, check=True, timeout=60
        )
        return json.loads(done.stdout)["choices"][0]["message"]["content"]

    def stop(self):
        """Press Ctrl-C and return what it said after that."""
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGINT)
        rest, _ = self.child.communicate(timeout=60)
        return rest


@contextmanager
def demo(command):
    running = Demo(command)
    try:
        yield running
    finally:
        running.stop()


def test_quickstart_stops_at_ctrl_c_everything_it_started(command, home):
    """The printed curl line answers; after Ctrl-C no process of the session is left."""
    with demo(command) as running:
        assert len(processes(home)) > 5  # Ray, Serve's actors, serve run
        assert "Paris" in running.ask()
        assert missing_metrics(running.port) == set()
        rest = running.stop()
    assert running.child.returncode == 130
    assert "Stopped everything" in rest
    assert "Traceback" not in rest
    for port in (running.port, running.hub_port):
        with pytest.raises(ConnectionRefusedError):
            http.client.HTTPConnection("127.0.0.1", port, timeout=2).connect()
    assert left_over(home) == {}
    folder = home / ".cache" / "serve-app" / "quickstart" / str(running.port)
    assert {path.name for path in folder.iterdir()} == {"lock", "quickstart.yaml", "serve-run.log"}


def test_quickstart_killed_leaves_nothing_that_takes_the_ports(command, home):
    """Who was killed, as by the kernel for its memory, can be started again."""
    with demo(command) as running:
        os.kill(running.child.pid, signal.SIGKILL)
    # Ray's (2.60) own agents take a minute or two to notice.
    assert left_over(home, but=(b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")) == {}
    done = run(command, "--once")
    assert done.returncode == 0, done.stdout + done.stderr


def test_quickstart_of_a_second_takes_nothing_from_the_first(command, home):
    """Not while it runs, not when it ends: the first replaces a lost replica, and answers.

    All sockets of both are on 127.0.0.1, but for one a replica, which asks for Ray's token.
    """
    other = [command[0], "--port", str(free_port()), "--hub-port", str(free_port())]
    with demo(command) as first:
        with demo(other) as second:
            assert "Paris" in second.ask()
            open_to_all = exposed(home)
            names = [line.partition(b":llm:")[0] for line in open_to_all.values()]
            assert names == [b"ray::ServeReplica"] * 4, open_to_all  # server and ingress of both
            for port in open_to_all:
                assert answer_without_token(port) is grpc.StatusCode.UNAUTHENTICATED
        assert second.child.returncode == 130
        (replica,) = [
            process for process, line in processes(home).items() if b":llm:LLMServer" in line
        ]
        os.kill(replica, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while replica in processes(home) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "Paris" in first.ask()


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
    """Command lines of the processes that run under this home, by their ids."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"HOME={home}\0".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_bytes()
    return found


def left_over(home, but=()):
    """Those that are still there a while after the end, but for some by their names."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = {pid: line for pid, line in processes(home).items() if not line.startswith(but)}
        if not left:
            break
        time.sleep(0.5)
    return left


def exposed(home):
    """Command lines by port of the processes under this home that other machines could reach."""
    owners = {}
    for process, line in processes(home).items():
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                owners[descriptor.readlink().name] = line
    assert owners
    found = {}
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = row.split()
            address, _, port = local.partition(":")
            is_loopback = address in ("0100007F", "0000000000000000FFFF00000100007F") or (
                address == "00000000000000000000000001000000"
            )
            if state == LISTEN and not is_loopback and (line := owners.get(f"socket:[{rest[5]}]")):
                found[int(port, 16)] = line
    return found


def answer_without_token(port):
    """The status that a call of a replica's own gRPC server gets from whoever knows no token."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=10)
    return refused.value.code()
