"""API keys: hashes in a file, fresh, and never asked of probes."""

import asyncio
import hashlib
import logging
import os
import threading
import time
import weakref

import pytest

from serve_app.api.auth import ApiKeys
from serve_app.errors import ConfigError
from tests.api.harness import CHAT, HELLO, Service, refusal
from tests.fakes import FakeEngine

KEY = "key-" + "k" * 20


def hashed(key):
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# who may call\n\n{hashed('other')} a note\n{hashed(KEY).upper()}\n")
    return path


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_auth_passes_a_known_key(key_file, scheme):
    """The scheme's case does not matter, as HTTP says."""
    service = Service(api_keys_file=str(key_file))
    for key in (KEY, "other"):
        response = await service.post(CHAT, HELLO, headers={"authorization": f"{scheme} {key}"})
        assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {hashed(KEY)}"},
        {"authorization": "Bearer é".encode()},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/access"),
        ("GET", "/metrics"),
        ("GET", "/x"),
    ],
)
async def test_auth_answers_anything_else_with_a_401(key_file, headers, method, path):
    """No key, another scheme, a wrong key, the hash itself; the header says what is missing."""
    service = Service(api_keys_file=str(key_file), access=dict)
    response = await service.request(method, path, headers=headers)
    error = refusal(response, 401)
    assert error["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text
    assert not service.engine.requests


@pytest.mark.parametrize("path", ["/health", "/ready", "/version"])
async def test_auth_needs_no_key_for_probes(key_file, path):
    """An orchestrator has none."""
    response = await Service(api_keys_file=str(key_file)).request("GET", path)
    assert response.status_code == 200


async def test_auth_never_answers_options_with_a_401(key_file):
    """A browser asks before it sends the key."""
    service = Service(api_keys_file=str(key_file), cors_allow_origins=("https://a.example",))
    assert (await service.request("OPTIONS", CHAT)).status_code == 405
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert (await service.request("OPTIONS", CHAT, headers=preflight)).status_code == 200


async def until_allowed(keys, key):
    """Wait for the file to be read again, or fail."""
    async with asyncio.timeout(5):
        while not await keys.allow(key):
            await asyncio.sleep(0.01)


async def test_api_keys_take_a_changed_file_without_a_restart(key_file):
    """A new key works and a removed one does not."""
    keys = ApiKeys(str(key_file), check_interval_s=0)
    assert await keys.allow(KEY)
    key_file.write_text(f"{hashed('new')}\n")
    await until_allowed(keys, "new")
    assert not await keys.allow(KEY)


async def test_api_keys_end_a_revoked_one_where_nobody_asks(key_file):
    """Each ingress looks by itself: the first request after a quiet hour is refused, too."""
    keys = [ApiKeys(str(key_file), check_interval_s=0.05) for _ in range(2)]
    assert all([await each.allow(KEY) for each in keys])
    key_file.write_text(f"{hashed('new')}\n")
    await asyncio.sleep(0.5)  # without a request
    assert [await each.allow(KEY) for each in keys] == [False, False]


@pytest.mark.parametrize("fault", ["gone", "broken", "fifo", "endless"])
async def test_api_keys_keep_the_last_ones_when_a_file_breaks(key_file, fault, capfd):
    """A half-written or missing file neither opens the door nor locks everybody out."""
    keys = ApiKeys(str(key_file), check_interval_s=0)
    key_file.unlink()
    if fault == "fifo":
        os.mkfifo(key_file)
    elif fault == "endless":
        key_file.symlink_to("/dev/zero")
    elif fault == "broken":
        key_file.write_text("half a ha")
    await asyncio.sleep(0.2)
    assert await keys.allow(KEY)
    assert not await keys.allow("half a ha")
    assert "keys.failed" in capfd.readouterr().out
    key_file.unlink(missing_ok=True)
    key_file.write_text(hashed("new"))
    await until_allowed(keys, "new")
    assert not await keys.allow(KEY)


async def test_api_keys_hold_up_no_request_when_a_file_system_hangs(key_file, monkeypatch, capfd):
    """It costs the one thread that looks; the keys read before count, and the log says so once."""
    monkeypatch.setattr("serve_app.api.auth.STALE_S", 0.1)
    released, before = threading.Event(), threading.active_count()
    service = Service(api_keys_file=str(key_file))
    monkeypatch.setattr(ApiKeys, "_look", lambda _self: released.wait(10))
    try:
        await asyncio.sleep(1.5)  # over an interval: the thread hangs by now
        began = time.monotonic()
        for _ in range(50):
            response = await service.post(CHAT, HELLO, headers={"authorization": f"Bearer {KEY}"})
            assert response.status_code == 200
        assert time.monotonic() - began < 8  # none of them waited for the file
        assert threading.active_count() <= before + 2  # it, and none more for each request
        assert capfd.readouterr().out.count("keys.failed") == 1
    finally:
        released.set()


async def test_api_keys_end_their_thread_with_them(key_file):
    """An application that is gone leaves nothing that looks at files."""
    keys = ApiKeys(str(key_file), check_interval_s=0)
    watching = [t for t in threading.enumerate() if t.name == "serve-app-keys"]
    assert watching
    gone = weakref.ref(keys)
    del keys
    async with asyncio.timeout(5):
        while gone() is not None:
            await asyncio.sleep(0.01)


async def test_api_keys_do_not_read_the_file_for_each_request(key_file):
    """Between two looks the keys are those of the last one."""
    keys = ApiKeys(str(key_file), check_interval_s=60)
    await asyncio.sleep(0.1)  # the first look
    key_file.write_text("")
    assert await keys.allow(KEY)


async def test_api_keys_of_an_empty_file_let_nobody_in(tmp_path):
    """Keys are asked for and none exists."""
    path = tmp_path / "keys"
    path.write_text("# none yet\n")
    assert not await ApiKeys(str(path)).allow("")


def test_api_keys_of_a_wrong_file_stop_the_start(tmp_path):
    """The message names the file, the line and the fix; never the line's text."""
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(str(tmp_path))
    path = tmp_path / "keys"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a file"):
        ApiKeys(str(path))
    path.unlink()
    path.write_text("#" * 5_000_000)
    with pytest.raises(ConfigError, match="over 4194304 bytes"):
        ApiKeys(str(path))
    path.write_text(f"{hashed(KEY)}\nplain-text-key\n")
    with pytest.raises(ConfigError, match=r"line 2.*sha256sum") as caught:
        Service(api_keys_file=str(path))
    assert "plain-text-key" not in caught.value.message
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        ApiKeys(str(path))


async def test_auth_writes_a_key_nowhere(key_file, caplog, capfd):
    """At debug level, in answers, records and logs, whether the request is good, bad or breaks."""
    caplog.set_level(logging.DEBUG)
    script = iter([["a"], [RuntimeError(f"a fault that quotes {KEY}")]])
    service = Service(FakeEngine(lambda _request: next(script)), api_keys_file=str(key_file))
    headers = {"authorization": f"Bearer {KEY}"}
    bodies = (HELLO, HELLO, {"messages": KEY}, HELLO | {"model": "x"})
    seen = [(await service.post(CHAT, body, headers=headers)).text for body in bodies]
    wrong = {"authorization": f"Bearer {KEY}x", "x-request-id": "r1"}
    seen.append((await service.post(CHAT, HELLO, headers=wrong)).text)
    logged = capfd.readouterr()
    seen += [repr(service.records), caplog.text, logged.out, logged.err]
    assert "request.failed" in "".join(seen)
    assert KEY not in "".join(seen)


async def test_auth_makes_each_key_a_client_of_its_own(key_file):
    """The engine lets clients take turns; without keys they are distinguished by their address."""
    seen: list[str] = []

    def script(request):
        seen.append(request.client)
        return ("Hello",)

    service = Service(FakeEngine(script), api_keys_file=str(key_file))
    for key in (KEY, "other", KEY):
        headers = {"authorization": f"Bearer {key}"}
        assert (await service.post(CHAT, HELLO, headers=headers)).status_code == 200
    assert seen[0] == seen[2] != seen[1]
    assert all(name.startswith("key:") and "other" not in name for name in seen)
    seen.clear()
    await Service(FakeEngine(script)).chat()
    assert seen == ["127.0.0.1"]
