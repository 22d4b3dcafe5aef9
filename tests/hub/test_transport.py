"""Sockets: many clients at once, https, going down and coming back, ports in use."""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from scripts.local_hub import Behaviour, LocalHub, Repo
from tests.certificates import Certificates
from tests.conftest import TINY_REPO, tiny_files


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_transport_of_many_connections(hub: LocalHub):
    """Two hundred clients are answered while others hang."""
    hanging, granted = hub.issue_token(Behaviour.hang), hub.issue_token()
    url = f"{hub.url}/api/models/{TINY_REPO}/auth-check"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=30) as client:
        stuck = [asyncio.create_task(client.get(url, headers=bearer(hanging))) for _ in range(20)]
        await asyncio.sleep(0.05)
        answers = await asyncio.gather(
            *(client.get(url, headers=bearer(granted)) for _ in range(200))
        )
        assert [answer.text for answer in answers] == ["OK"] * 200
        assert not any(task.done() for task in stuck)
        hub.stop()  # a Hub that goes down lets nobody hang
        outcomes = await asyncio.gather(*stuck, return_exceptions=True)
    assert all(isinstance(outcome, httpx.TransportError) for outcome in outcomes)


def test_transport_of_many_requests_on_one_connection(hub: LocalHub):
    """A connection outlives answers, refusals and bodies of every kind."""
    headers = bearer(hub.issue_token())
    connection = http.client.HTTPConnection("127.0.0.1", httpx.URL(hub.url).port, timeout=5)
    connection.connect()
    local_port = connection.sock.getsockname()[1]
    seen = []
    for path in ("config.json", "nope.json", "model-00001-of-00002.safetensors"):
        for method in ("GET", "HEAD"):
            connection.request(method, f"/{TINY_REPO}/resolve/main/{path}", headers=headers)
            answer = connection.getresponse()
            answer.read()
            seen.append(answer.status)
            assert connection.sock.getsockname()[1] == local_port
    assert seen == [200, 200, 404, 404, 302, 302]
    connection.close()


def test_transport_sends_a_body_right_after_its_headers(hub: LocalHub):
    """A kept connection answers in less than the 40 ms of a delayed acknowledgement."""
    headers = bearer(hub.issue_token())
    connection = http.client.HTTPConnection("127.0.0.1", httpx.URL(hub.url).port, timeout=5)
    seconds = []
    for _ in range(25):
        began = time.monotonic()
        connection.request("GET", f"/api/models/{TINY_REPO}/auth-check", headers=headers)
        connection.getresponse().read()
        seconds.append(time.monotonic() - began)
    connection.close()
    assert sorted(seconds)[5] < 0.03


def test_hub_down_and_up_again(hub: LocalHub):
    """A stopped Hub refuses connections; started again it is what it was, on the same ports."""
    token = hub.issue_token(Behaviour.pending)
    url = f"{hub.url}/api/models/{TINY_REPO}/auth-check"
    before = httpx.get(url, headers=bearer(token))
    hub.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    hub.start()
    assert httpx.get(url, headers=bearer(token)).text == before.text
    assert len(hub.log) == 2


def test_hub_on_a_port_in_use(hub: LocalHub):
    """Entering fails with the system's error, and what was opened before is closed again."""
    port = httpx.URL(hub.url).port
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        other = free.getsockname()[1]
    with pytest.raises(OSError, match="in use"):
        LocalHub(port=other, cdn_port=port or 0).start()
    with LocalHub(port=other) as second:
        assert httpx.URL(second.url).port == other


def test_hub_stops_quickly(hub: LocalHub):
    """Neither an idle connection nor a hanging request delays the end."""
    token = hub.issue_token(Behaviour.hang)
    idle = socket.create_connection(("127.0.0.1", httpx.URL(hub.url).port))

    def hang() -> None:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{hub.url}/api/whoami-v2", headers=bearer(token), timeout=30)

    waiting = threading.Thread(target=hang)
    waiting.start()
    deadline = time.monotonic() + 5
    while not hub.log and time.monotonic() < deadline:
        time.sleep(0.01)
    started = time.monotonic()
    hub.stop()
    waiting.join(timeout=5)
    assert not waiting.is_alive()
    assert time.monotonic() - started < 2
    idle.close()


CLIENT = """
import sys
from huggingface_hub import HfApi, snapshot_download
repo = sys.argv[1]
granted, expired = sys.stdin.read().split()
snapshot_download(repo, token=granted)
print("downloaded")
for token, name in ((expired, repo), (False, "acme/nothing")):
    try:
        HfApi(token=token).auth_check(name)
    except Exception as error:
        print(type(error).__name__)
"""


class TestTls:
    """The Hub, the CDN and the Xet store over https with an authority of our own."""

    @pytest.fixture
    def secure(self, certificates: Certificates):
        with LocalHub([Repo(TINY_REPO, tiny_files())], tls=certificates.server) as hub:
            yield hub

    def test_https(self, secure: LocalHub, certificates: Certificates):
        """Who trusts the authority reads weights through both origins."""
        context = ssl.create_default_context(cafile=certificates.authority)
        name = "model-00001-of-00002.safetensors"
        assert secure.url.startswith("https://")
        with httpx.Client(verify=context, follow_redirects=True) as client:
            url = f"{secure.url}/{TINY_REPO}/resolve/main/{name}"
            answer = client.get(url, headers=bearer(secure.issue_token()))
        assert answer.content == tiny_files()[name]
        assert str(answer.url).startswith(secure.cdn_url)

    def test_https_with_the_real_client(
        self, secure: LocalHub, certificates: Certificates, tmp_path: Path
    ):
        """Over https a bare 401 is a missing repository for huggingface_hub, as on the real Hub."""
        environment = {
            **os.environ,
            "HF_ENDPOINT": secure.url,
            "HF_HOME": str(tmp_path),
            "SSL_CERT_FILE": str(certificates.authority),
        }
        tokens = [secure.issue_token(), secure.issue_token(Behaviour.expired)]
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, TINY_REPO],
            env=environment,
            input="\n".join(tokens),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split() == [
            "downloaded",
            "RepositoryNotFoundError",
            "RepositoryNotFoundError",
        ]
        assert not any(entry.authorization_leaked for entry in secure.log)

    def test_https_is_not_disturbed_by_distrust_and_plain_http(
        self, secure: LocalHub, certificates: Certificates
    ):
        """A client that does not trust us, one without TLS and a mute one fail alone."""
        port = httpx.URL(secure.url).port
        mute = socket.create_connection(("127.0.0.1", port))
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(secure.url)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/")
        context = ssl.create_default_context(cafile=certificates.authority)
        url = f"{secure.url}/api/models/{TINY_REPO}"
        assert httpx.get(url, verify=context).status_code == 200
        mute.close()
