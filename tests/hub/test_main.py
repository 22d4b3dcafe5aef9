"""The Hub as a process of its own: its command line and its control over HTTP."""

from __future__ import annotations

import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scripts.local_hub import LocalHub, fingerprint
from tests.conftest import TINY_REPO, tiny_files

ROOT = Path(__file__).parents[2]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "scripts.local_hub", *map(str, arguments)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    for name, content in tiny_files().items():
        assert isinstance(content, bytes)
        (place / name).write_bytes(content)
    (place / ".git").mkdir()
    (place / ".git" / "config").write_bytes(b"private")
    return place


@pytest.fixture
def running(model: Path, tmp_path: Path) -> Iterator[tuple[str, Path, subprocess.Popen[str]]]:
    token_file = tmp_path / "token"
    child = subprocess.Popen(
        command(
            *("--port", "0", "--model-dir", model, "--repo-id", TINY_REPO),
            *("--token-file", token_file, "--behaviour", "pending"),
        ),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout is not None
    said = []
    for line in child.stdout:
        said.append(line)
        if line.startswith("ready"):
            break
    assert said[0].startswith("hub: http"), said
    yield said[0].split()[1], token_file, child
    child.kill()
    child.wait(timeout=10)
    child.stdout.close()


def test_main_process(running: tuple[str, Path, subprocess.Popen[str]]):
    """It writes a token for its owner alone, obeys orders, and ends on Ctrl-C without a word."""
    url, token_file, child = running
    token = token_file.read_text().strip()
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    headers = {"Authorization": f"Bearer {token}"}
    check = f"{url}/api/models/{TINY_REPO}/auth-check"
    assert "awaiting a review" in httpx.get(check, headers=headers).text

    order = {"token_file": str(token_file), "behaviour": "granted"}
    done = httpx.put(f"{url}/_local/tokens", json=order)
    assert done.json() == {"fingerprint": fingerprint(token), "behaviour": "granted"}
    assert httpx.get(check, headers=headers).text == "OK"
    listed = httpx.get(f"{url}/api/models/{TINY_REPO}/tree/main?recursive=true").json()
    assert {entry["path"] for entry in listed} == set(tiny_files())

    log = httpx.get(f"{url}/_local/log")
    assert [entry["status"] for entry in log.json()] == [403, 200, 200]
    assert token not in log.text
    child.send_signal(signal.SIGINT)
    rest, _ = child.communicate(timeout=10)
    assert (child.returncode, rest) == (0, "")


@pytest.mark.parametrize("flag", ["--port", "--cdn-port"])
def test_main_with_a_port_in_use(model: Path, flag: str):
    """One sentence, exit 2."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ports = {"--port": "0", flag: port}
        arguments = [word for pair in ports.items() for word in pair]
        done = subprocess.run(
            command(*arguments, "--model-dir", model),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot listen on port ")
    assert port in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_main_with_a_missing_directory(tmp_path: Path):
    """One sentence, exit 2."""
    done = subprocess.run(
        command("--model-dir", tmp_path / "nope"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--model-dir" in done.stderr


def test_control_orders(hub: LocalHub):
    """Orders give a token a behaviour with its settings, also toward one repository."""
    token = "hf_" + "c" * 34
    headers = {"Authorization": f"Bearer {token}"}
    check = f"{hub.url}/api/models/{TINY_REPO}/auth-check"

    def put(**order: object) -> httpx.Response:
        return httpx.put(f"{hub.url}/_local/tokens", json={"token": token, **order})

    put(behaviour="rate_limited", retry_after_s=9, account="dora")
    assert httpx.get(check, headers=headers).headers["retry-after"] == "9"
    put(behaviour="granted")
    put(behaviour="rejected", repo_id=TINY_REPO)
    assert "rejected" in httpx.get(check, headers=headers).text
    reported = httpx.get(f"{hub.url}/api/whoami-v2", headers=headers).json()
    assert reported["name"] == "dora"
    put(behaviour="server_error", on=["whoami"])
    assert httpx.get(f"{hub.url}/api/whoami-v2", headers=headers).status_code == 503
    assert httpx.get(f"{hub.url}/_local/repos").json() == hub.commits()
    httpx.delete(f"{hub.url}/_local/log")
    assert hub.log == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"token": ""}',
        b'{"token": 5}',
        b'{"token": "hf_x", "behaviour": "no"}',
        b'{"token": "hf_x", "on": ["no"]}',
    ],
)
def test_control_refuses_bad_orders(hub: LocalHub, body: bytes):
    """What is wrong with an order is answered with 400."""
    answer = httpx.put(f"{hub.url}/_local/tokens", content=body)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert httpx.get(f"{hub.url}/_local/nope").status_code == 404
