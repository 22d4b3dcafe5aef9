"""The chunk store as a way to the weights: a byte from where it lies, and the way around it."""

import socket
import subprocess
import sys
import threading
import time

import pytest
from huggingface_hub import constants

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access.hub import chunk_store, pace, xet
from serve_app.access.hub.chunk_store import chunk_hash
from serve_app.access.hub.probe import check_here
from serve_app.access.verdict import Outcome
from serve_app.weights.fetch import fetch
from tests.access.cases import MODEL, access, sharded_files
from tests.conftest import TINY_REPO

IMPATIENT = {"timeout_s": 0.5, "deadline_s": 6}
FILES = sharded_files()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with LocalHub([Repo(TINY_REPO, FILES, xet=True)]) as running:
        yield running


@pytest.fixture
def silent_url():
    """A port that accepts, reads, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def accept():
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in held:
            connection.close()


def test_check_here_reads_a_byte_of_the_chunks_and_sends_no_token(hub, tmp_path):
    """From the signed URL of the plan, with the range that it is signed for."""
    verdict = check_here(MODEL, access(hub, tmp_path, hub.issue_token()))
    assert verdict.outcome is Outcome.GRANTED
    (read,) = (entry for entry in hub.log if entry.origin == "cdn")
    assert read.bytes_sent >= 1
    assert read.token is None
    assert not any(entry.authorization_leaked for entry in hub.log)


@pytest.mark.parametrize("where", ["closed", "silent"])
def test_check_here_blocks_for_a_silent_chunk_host_with_the_way_around(
    hub, tmp_path, silent_url, where
):
    """The plan comes, the bytes do not: a firewall that lets two of three hosts through."""
    hub.send_chunks_from(hub.closed_url if where == "closed" else silent_url)
    config = access(hub, tmp_path, hub.issue_token(), **IMPATIENT)
    began = time.monotonic()
    verdict = check_here(MODEL, config)
    assert time.monotonic() - began < IMPATIENT["deadline_s"]
    assert verdict.outcome is Outcome.WEIGHTS_UNREACHABLE
    host = (hub.closed_url if where == "closed" else silent_url).removeprefix("http://")
    assert host in verdict.remedy
    assert host in verdict.hub_message
    assert "HF_HUB_DISABLE_XET=1" in verdict.remedy
    assert "Signature" not in str(verdict)


@pytest.mark.parametrize("behaviour", [Behaviour.cdn_denied, Behaviour.cdn_down])
def test_check_here_names_the_way_around_a_store_that_refuses(hub, tmp_path, behaviour):
    """Whichever of its hosts."""
    verdict = check_here(MODEL, access(hub, tmp_path, hub.issue_token(behaviour), **IMPATIENT))
    assert verdict.outcome is Outcome.WEIGHTS_UNREACHABLE
    assert "HF_HUB_DISABLE_XET=1" in verdict.remedy


@pytest.mark.parametrize("part", ["Link", "X-Xet-Hash"])
def test_check_here_reads_a_mirror_without_the_stores_route_directly(hub, tmp_path, part):
    """huggingface_hub goes to the store only where the Hub says how to get a key for it."""
    hub.drop_headers(part)
    verdict = check_here(MODEL, access(hub, tmp_path, hub.issue_token()))
    assert verdict.outcome is Outcome.GRANTED
    assert {entry.origin for entry in hub.log} == {"hub", "cdn"}


HASH = "a" * 64
ROUTE = {"link": '<https://x/api>; rel="xet-auth"'}


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"x-xet-hash": HASH, **ROUTE}, HASH),
        ({"x-xet-hash": HASH, "x-xet-refresh-route": "https://x/api"}, HASH),
        ({"x-xet-hash": HASH}, None),
        (ROUTE, None),
        ({"x-xet-hash": "../" + HASH, **ROUTE}, None),
        ({"x-xet-hash": "*" * 64, **ROUTE}, None),
        ({}, None),
    ],
)
def test_chunk_hash_from_hash_and_route(headers, found):
    """As for huggingface_hub."""
    assert chunk_hash(headers) == found


@pytest.mark.parametrize(
    ("plan", "place"),
    [
        ({"terms": [{"hash": "h"}],
          "xorbs": {"h": [{"url": "u", "ranges": [{"bytes": {"start": 0, "end": 9}}]}]}},
         ("u", "bytes=0-9")),
        ({"terms": [{"hash": "h"}],
          "xorbs": {"h": [{"url": "u", "ranges": [{"bytes": {"start": 0, "end": 9}},
                                                  {"bytes": {"start": 20, "end": 29}}]}]}},
         ("u", "bytes=0-9,20-29")),
        ({"terms": [{"hash": "h"}],
          "fetch_info": {"h": [{"url": "u", "url_range": {"start": 5, "end": 7}}]}},
         ("u", "bytes=5-7")),
        ({"terms": []}, None),
        ({"terms": [{"hash": "h"}], "xorbs": {}}, None),
        ({"terms": [{"hash": "h"}], "xorbs": {"h": [{"url": 7, "ranges": []}]}}, None),
        ({"terms": [{"hash": "h"}], "fetch_info": {"h": [{"url": "u", "url_range": {}}]}}, None),
        ({"terms": [{"hash": []}], "xorbs": {}}, None),
        ({"terms": "x"}, None),
        (None, None),
        ([], None),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_first_place_in_both_versions_of_a_plan(plan, place):
    """And what is none says nothing."""
    assert chunk_store._first_place(plan) == place


@pytest.mark.parametrize("where", ["closed", "silent"])
def test_fetch_goes_on_over_http_when_the_store_stands_still(
    hub, tmp_path, silent_url, monkeypatch, where
):
    """The real client of the store, against hosts that do not answer: ended, and gone around."""
    limits = {"stall_s": 3.0, "least_bytes": 4096}
    monkeypatch.setattr(pace.Pace.__init__, "__kwdefaults__", limits)
    down = hub.closed_url if where == "closed" else silent_url
    hub.send_chunks_from(down)
    hub._state.urls["xet"] = down  # the plan neither
    config = access(hub, tmp_path, hub.issue_token())
    began = time.monotonic()
    fetched = fetch(MODEL, config, hub.commits()[TINY_REPO]["main"])
    assert time.monotonic() - began < 40
    for name, content in FILES.items():
        assert (fetched.directory / name).read_bytes() == content
    assert not any(entry.authorization_leaked for entry in hub.log)
    blobs = tmp_path / "cache" / "models--acme--tiny-llama" / "blobs"
    assert not list(blobs.glob("*incomplete*"))


KEY = xet.XetKey("http://127.0.0.1:1", "key", 2**33, "http://127.0.0.1:1/refresh", {})


def child(monkeypatch, tmp_path, code):
    """Let this code run in place of the store's client."""
    (tmp_path / "stand_in_for_the_client.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(xet, "CHILD", "stand_in_for_the_client")


def target(tmp_path, size):
    (tmp_path / "blob").touch()
    return xet.XetFile("a" * 64, size, str(tmp_path / "blob"))


def test_xet_fetch_ends_well_when_the_client_brings_the_files(monkeypatch, tmp_path):
    """It takes its order from its input, and knows where to."""
    code = """
import json, pathlib
order = json.loads(input())
file = order["files"][0]
pathlib.Path(file["path"]).write_bytes(b"x" * file["size"])
print(json.dumps({"bytes": 100}))
print(json.dumps({"done": True}))
"""
    child(monkeypatch, tmp_path, code)
    xet.fetch(KEY, [target(tmp_path, 100)])
    assert (tmp_path / "blob").read_bytes() == b"x" * 100


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit(3)", "ended without a word"),
        ("print('{\"error\": \"RuntimeError\"}', flush=True); input()", "RuntimeError"),
        ("import time; input(); time.sleep(60)", "fewer than"),
        ("import time\nwhile True: print('{\"bytes\": 1}', flush=True); time.sleep(0.1)",
         "fewer than"),
        ("import time\nwhile True: print('x' * 10000, flush=True); time.sleep(0.1)", "fewer than"),
        ("import json, time; order = json.loads(input())\n"
         "f = open(order['files'][0]['path'], 'wb')\n"
         "while True: f.write(b'x' * 1000); f.flush(); print('{\"bytes\": 99999}', flush=True);"
         " time.sleep(0.05)", "writes more than"),
    ],
    ids=["dies", "says why", "silent", "no progress", "no words", "endless"],
)  # fmt: skip
def test_xet_fetch_ends_a_client_that_fails(monkeypatch, tmp_path, code, words):
    """It dies, stands still, or writes without end."""
    child(monkeypatch, tmp_path, code)
    began = time.monotonic()
    limits = pace.Pace(stall_s=1.5, least_bytes=4096)
    with pytest.raises(xet.XetFailed, match=words):
        xet.fetch(KEY, [target(tmp_path, 5000)], pace=limits)
    assert time.monotonic() - began < 20


def test_xet_child_ends_with_its_parent(tmp_path):
    """A killed replica leaves nobody behind who writes to the cache."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_app.access.hub.xet_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    process.stdin.write(b'{"key": {"headers": {}}, "files": []}')
    process.stdin.close()
    assert process.wait(20) != 0
