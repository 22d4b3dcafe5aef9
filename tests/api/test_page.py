"""The status page as a person's browser shows it: every part filled, nothing complained of."""

import asyncio
import re
import shutil
import subprocess

import pytest

from serve_app.api.status_page import Load, View
from tests.api.harness import CHAT, HELLO, Service, listening

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
COMMIT = "c" * 40
REPLICAS = [
    {
        "name": "abc",
        "node": "gpu-1",
        "state": "RUNNING",
        "phase": None,
        "done_bytes": None,
        "total_bytes": None,
    },
    {
        "name": "xyz",
        "node": "gpu-2",
        "state": "STARTING",
        "phase": "download",
        "done_bytes": 3e6,
        "total_bytes": 10e6,
    },
]
LICENSE = {"title": "LLAMA 3.2 <b>COMMUNITY</b> LICENSE", "sha256": "ab" * 32, "commit": COMMIT}
TOKEN = {"source": "env:HF_TOKEN", "fingerprint": "01234567", "account": "alice"}
LINK = "http://hub.test/acme/tiny"
DENIED = {"outcome": "license_not_accepted", "remedy": "Accept the license.", "url": LINK}


class Whole:
    """Two replicas, one of them on its way, and a license."""

    async def look(self):
        return View(REPLICAS, LICENSE)

    async def load(self):
        return Load(waiting=0, running=0, finished=1, failed=0, generation_tokens=3)


def access():
    """Return what `/access` says of two nodes, one of them denied."""
    good = {"outcome": "granted", "remedy": "Nothing to do.", "url": None}
    nodes = [{"node_name": name, "token": TOKEN} for name in ("gpu-1", "gpu-2")]
    return {
        "repo_id": "acme/tiny",
        "endpoint": "http://hub.test",
        "commit": COMMIT,
        "nodes": [nodes[0] | good, nodes[1] | DENIED],
    }


def browse(url, tmp_path, scheme, what):
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr"),
        *("--window-size=1000,1200", "--virtual-time-budget=5000", what, f"{url}/"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


async def in_a_real_browser(tmp_path, scheme):
    """Headline, numbers, replicas, grants and license, in light and in dark."""
    service = Service(access=access, service=Whole(), commit=COMMIT)
    picture = tmp_path / "page.png"
    async with listening(service.app) as url:
        await service.post(CHAT, HELLO)
        shown = await asyncio.to_thread(browse, url, tmp_path, scheme, "--dump-dom")
        await asyncio.to_thread(browse, url, tmp_path, scheme, f"--screenshot={picture}")
    assert "CONSOLE" not in shown.stderr
    page = re.sub(r"<script>.*?</script>", "", shown.stdout, flags=re.DOTALL)
    assert re.search(r'id="state"[^>]*>ready, 1 more starting, access lost on 1 node<', page)
    assert re.search(r'id="finished">1<', page)
    assert re.search(r'id="rate">–<', page)  # not measured yet
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    text = [re.sub(r"<[^>]*>", "|", row) for row in rows]
    assert any("abc" in row and "gpu-1" in row and "running" in row for row in text)
    assert any("gpu-2" in row and "download 3.0 of 10.0 MB" in row for row in text)
    assert any("✓ granted" in row and "env:HF_TOKEN · 01234567 · alice" in row for row in text)
    (denied,) = [row for row in rows if "✗ license_not_accepted" in row]
    assert f'href="{LINK}"' in denied
    assert "Accept the license." in denied
    assert "LLAMA 3.2 &lt;b&gt;COMMUNITY&lt;/b&gt; LICENSE (SHA-256 abababababab…)" in page
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


if BROWSER is not None:  # one more test where there is a Chromium; it is not counted elsewhere
    test_status_page_in_a_real_browser = pytest.mark.parametrize("scheme", ["light", "dark"])(
        in_a_real_browser
    )
