"""The status page and its numbers."""

import asyncio
import base64
import hashlib
import json
import re
import threading
import time
from html.parser import HTMLParser
from typing import ClassVar

import pytest

from serve_app.api import status_page as board_module
from serve_app.api.status_page import PAGE, Board, View
from serve_app.errors import EngineError
from serve_app.protocol import GenerationRequest, TextPrompt
from tests.api.harness import CHAT, HELLO, MODEL, Service
from tests.fakes import FakeEngine, Pause

ABOUT = {"model": "org/name", "commit": "c" * 40, "version": "1"}


ALONE = View(None, ())


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def request(name="r"):
    return GenerationRequest(name, TextPrompt("hello"))


async def test_what_passes_is_counted():
    """Running while it runs, then finished; tokens per second over the last ten."""
    clock = Clock()
    board = Board(FakeEngine(), ABOUT, clock=clock)
    clock.now += 60
    stream = board.generate(request())
    await anext(stream)
    assert board.numbers(ALONE)["requests"] == {
        "waiting": 0,
        "running": 1,
        "finished": 0,
        "failed": 0,
    }
    async for _ in stream:
        pass
    numbers = board.numbers(ALONE)
    assert numbers["requests"] == {"waiting": 0, "running": 0, "finished": 1, "failed": 0}
    assert (numbers["generation_tokens"], numbers["tokens_per_s"]) == (3, 0.3)
    assert (numbers["uptime_s"], numbers["model"]) == (60, "org/name")
    clock.now += 11
    assert board.numbers(ALONE)["tokens_per_s"] == 0


async def test_failures_and_goodbyes_are_told_apart():
    """An error counts as failed; a client that left counts as neither, and the engine is told."""
    board = Board(FakeEngine(("a", EngineError("no"))), ABOUT)
    with pytest.raises(EngineError):
        async for _ in board.generate(request()):
            pass
    assert board.numbers(ALONE)["requests"] == {
        "waiting": 0,
        "running": 0,
        "finished": 0,
        "failed": 1,
    }
    engine = FakeEngine(("a", Pause()))
    board = Board(engine, ABOUT)
    stream = board.generate(request("gone"))
    await anext(stream)
    await stream.aclose()
    assert board.numbers(ALONE)["requests"] == {
        "waiting": 0,
        "running": 0,
        "finished": 0,
        "failed": 0,
    }
    assert engine.closed_early == ["gone"]


async def test_the_page_runs_its_own_script_and_nothing_else():
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


async def test_the_numbers_are_an_answer_of_their_own():
    """`/status` is JSON, counts what the API did, and leaves no record itself."""
    service = Service()
    assert (await service.post(CHAT, HELLO)).status_code == 200
    assert len(service.records) == 1
    status = (await service.request("GET", "/status")).json()
    assert status["requests"] == {"waiting": 0, "running": 0, "finished": 1, "failed": 0}
    assert status["model"] == MODEL
    assert len(service.records) == 1


async def test_the_page_is_open_and_its_numbers_need_the_key(tmp_path):
    """The page holds no data; what it asks for is the API's."""
    keys = tmp_path / "keys"
    keys.write_text(hashlib.sha256(b"key").hexdigest() + "\n")
    service = Service(api_keys_file=str(keys))
    assert (await service.request("GET", "/")).status_code == 200
    assert (await service.request("GET", "/status")).status_code == 401
    allowed = await service.request("GET", "/status", headers={"authorization": "Bearer key"})
    assert allowed.status_code == 200


def test_every_field_has_a_name_and_every_id_is_one():
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


class Two:
    """Another board beside this one."""

    replicas: ClassVar = [{"name": "a", "node": "gpu-1", "state": "STARTING", "phase": "load"}]

    def __init__(self):
        self.told = []

    def tell(self, counts):
        self.told.append(counts)

    async def look(self):
        now = int(time.time())
        other = {"waiting": 1, "running": 2, "finished": 30, "failed": 4}
        return View(
            self.replicas,
            ({**other, "generation_tokens": 500, "recent": [[now - 60, 400], [now - 1, 100]]},),
        )


async def test_the_status_is_of_the_whole_service():
    """Whichever ingress is asked; replicas as they are found, null where nobody knows."""
    service = Service(whole=Two())
    await service.post(CHAT, HELLO)
    status = (await service.request("GET", "/status")).json()
    assert status["requests"] == {"waiting": 1, "running": 2, "finished": 31, "failed": 4}
    assert status["generation_tokens"] == 503
    assert status["tokens_per_s"] == pytest.approx(103, abs=1)
    assert status["replicas"] == Two.replicas
    assert (await Service().request("GET", "/status")).json()["replicas"] is None


@pytest.mark.parametrize("commit", ["new", "old"])
def test_the_license_is_of_the_commit_that_is_served(commit):
    """During an update the other version's is nobody's business."""
    text = {"title": "A LICENSE", "sha256": "ab" * 32, "commit": commit}
    shown = Board(FakeEngine(), ABOUT | {"commit": "new"}).numbers(View([], (), text))
    assert shown["license"] == (text if commit == "new" else None)


async def test_the_others_are_told_once_a_second_and_after_the_last_change(monkeypatch):
    """Many requests are one message, and the last message has them all."""
    monkeypatch.setattr(board_module, "TELL_S", 0.05)
    whole = Two()
    board = Board(FakeEngine(), ABOUT, whole)
    for number in range(20):
        async for _ in board.generate(request(str(number))):
            pass
    await asyncio.sleep(0.2)
    assert 1 <= len(whole.told) <= 4
    assert whole.told[-1]["finished"] == 20
    assert whole.told[-1]["running"] == whole.told[-1]["waiting"] == 0
    assert json.loads(json.dumps(whole.told[-1])) == whole.told[-1]


async def test_a_store_that_does_not_answer_holds_one_thread(monkeypatch):
    """However long and however much passes: the others stay for whoever needs them."""
    monkeypatch.setattr(board_module, "TELL_S", 0.01)
    released = threading.Event()

    class Hanging(Two):
        def tell(self, counts):
            self.told.append(counts)
            released.wait(10)

    whole = Hanging()
    board = Board(FakeEngine(), ABOUT, whole)
    for number in range(20):
        async for _ in board.generate(request(str(number))):
            pass
        await asyncio.sleep(0.02)
    assert len(whole.told) == 1
    released.set()
    async with asyncio.timeout(5):
        while whole.told[-1]["finished"] < 20:
            await asyncio.sleep(0.01)
    assert len(whole.told) <= 4


async def test_a_request_waits_until_its_first_token():
    """The page tells the queue from the batch; who leaves the queue is counted in neither."""
    board = Board(FakeEngine((Pause(), "a")), ABOUT)
    waiting = asyncio.ensure_future(anext(board.generate(request())))
    await asyncio.sleep(0.01)
    assert board.numbers(ALONE)["requests"]["waiting"] == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    at_rest = {"waiting": 0, "running": 0, "finished": 0, "failed": 0}
    assert board.numbers(ALONE)["requests"] == at_rest
    board = Board(FakeEngine(), ABOUT)
    stream = board.generate(request())
    await anext(stream)
    assert board.numbers(ALONE)["requests"] == at_rest | {"running": 1}
    await stream.aclose()
    assert board.numbers(ALONE)["requests"] == at_rest
