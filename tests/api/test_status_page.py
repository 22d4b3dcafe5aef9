"""The status page and its numbers."""

import asyncio
import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from serve_app.api.status_page import PAGE, Load, StatusPage, View
from serve_app.errors import EngineError
from tests.api.harness import CHAT, HELLO, MODEL, Connection, Service
from tests.fakes import FakeEngine, Pause

ABOUT = {"model": "org/name", "commit": "c" * 40, "version": "1"}
LOAD = Load(waiting=1, running=2, finished=31, failed=4, generation_tokens=503, tokens_per_s=10.3)
REPLICAS = [{"name": "a", "node": "gpu-1", "state": "STARTING", "phase": "load"}]


class Whole:
    """A service with one replica and some load."""

    def __init__(self, load=LOAD):
        self._load = load

    async def look(self):
        return View(REPLICAS)

    async def load(self):
        return self._load


async def test_status_page_runs_its_own_script_and_nothing_else():
    """One file, no outside resource; the policy names the script's hash."""
    page = await Service().request("GET", "/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    (script,) = re.findall(rb"<script>(.*?)</script>", page.content, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.headers["content-security-policy"]
    assert not re.findall(rb"(?:src|href)\s*=\s*[\"']", page.content)
    assert b"http://" not in page.content.replace(b"http://www.w3.org", b"")
    assert b"https://" not in page.content


async def test_status_page_numbers_are_an_answer_of_their_own():
    """`/status` is JSON, says what is known of the service, and leaves no record itself."""
    service = Service(service=Whole())
    assert (await service.post(CHAT, HELLO)).status_code == 200
    assert len(service.records) == 1
    status = (await service.request("GET", "/status")).json()
    assert status["requests"] == {"waiting": 1, "running": 2, "finished": 31, "failed": 4}
    assert (status["generation_tokens"], status["tokens_per_s"]) == (503, 10.3)
    assert status["replicas"] == REPLICAS
    assert (status["model"], status["version"]) == (MODEL, "1.2.3")
    assert len(service.records) == 1


@pytest.mark.parametrize("options", [{}, {"service": Whole(None)}])
async def test_status_page_has_null_for_what_nobody_knows(options):
    """With the same keys, so that a script or the page reads them all the same."""
    status = (await Service(**options).request("GET", "/status")).json()
    assert status["requests"] == dict.fromkeys(("waiting", "running", "finished", "failed"))
    assert status["generation_tokens"] is status["tokens_per_s"] is None
    assert status["model"] == MODEL


def test_status_page_uptime_is_of_this_process():
    """In seconds, by a clock that only goes on."""
    now = [100.0]
    page = StatusPage(ABOUT, clock=lambda: now[0])
    now[0] += 60.04
    assert page.numbers(View(None), None)["uptime_s"] == 60.0


async def test_status_page_costs_a_stream_nothing():
    """A client that leaves, and an engine that fails, reach the engine without a detour."""
    engine = FakeEngine(("a", Pause()))
    service = Service(engine, service=Whole())
    connection = Connection.json(CHAT, HELLO | {"stream": True})
    running = connection.run(service.app)
    async with asyncio.timeout(5):
        while not connection.sent:
            await asyncio.sleep(0.01)
        connection.disconnect()
        await running
    assert len(engine.closed_early) == 1
    failing = Service(FakeEngine(("a", EngineError("no"))), service=Whole())
    assert (await failing.post(CHAT, HELLO)).status_code == 500


async def test_status_page_is_open_and_its_numbers_need_the_key(tmp_path):
    """The page holds no data; what it asks for is the API's."""
    keys = tmp_path / "keys"
    keys.write_text(hashlib.sha256(b"key").hexdigest() + "\n")
    service = Service(api_keys_file=str(keys))
    assert (await service.request("GET", "/")).status_code == 200
    assert (await service.request("GET", "/status")).status_code == 401
    allowed = await service.request("GET", "/status", headers={"authorization": "Bearer key"})
    assert allowed.status_code == 200


def test_status_page_names_every_field_and_has_every_id_once():
    """What a screen reader needs; ids that the script uses exist."""
    seen: list[str] = []
    unnamed: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            attributes = dict(attrs)
            seen.extend(filter(None, [attributes.get("id")]))
            if tag in ("input", "svg") and not attributes.get("aria-label"):
                unnamed.append(tag)

    page = PAGE.read_text(encoding="utf-8")
    Reader().feed(page)
    assert not unnamed
    assert len(seen) == len(set(seen))
    assert set(re.findall(r'\$\("([a-z]+)"\)', page)) <= set(seen)


@pytest.mark.parametrize("commit", ["new", "old"])
def test_status_page_license_is_of_the_commit_that_is_served(commit):
    """During an update the other version's is nobody's business."""
    text = {"title": "A LICENSE", "sha256": "ab" * 32, "commit": commit}
    shown = StatusPage(ABOUT | {"commit": "new"}).numbers(View([], text), LOAD)
    assert shown["license"] == (text if commit == "new" else None)
