"""API keys: asked of all but probes, with limits, and an end."""

import asyncio
import logging
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from serve_app.api.keys import ApiKeys
from serve_app.errors import EngineError
from tests.api.harness import API_KEY as KEY
from tests.api.harness import CHAT, HELLO, Connection, Service, hashed, refusal
from tests.fakes import FakeEngine, Pause


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


async def test_api_keys_hold_up_no_request_when_a_file_system_hangs(key_file, monkeypatch, capfd):
    """It costs the one thread that looks; the keys read before count, and the log says so once."""
    monkeypatch.setattr("serve_app.api.keys.STALE_S", 0.1)
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


def keyed(tmp_path, *lines, engine=None, **options):
    """Return a service with these keys, `k0` and on, and how to ask it with one of them."""
    path = tmp_path / "keys"
    path.write_text("\n".join(f"{hashed(f'k{n}')} {fields}" for n, fields in enumerate(lines)))
    service = Service(engine, api_keys_file=str(path), **options)

    async def ask(number=0, **fields):
        headers = {"authorization": f"Bearer k{number}"}
        return await service.post(CHAT, HELLO | fields, headers=headers)

    return service, ask


async def test_auth_answers_an_expired_key_with_a_401_that_says_so(tmp_path):
    """With a code of its own; the record has its name."""
    service, ask = keyed(tmp_path, "name=a expires=2020-01-31", "name=b expires=2999-01-01")
    answer = await ask()
    error = refusal(answer, 401)
    assert error["code"] == "api_key_expired"
    assert "2020-01-31" in error["message"]
    assert answer.headers["www-authenticate"] == "Bearer"
    assert (await ask(1)).status_code == 200
    assert [record.key.name for record in service.records] == ["a", "b"]


async def test_auth_answers_a_limit_with_a_429_that_says_which(tmp_path):
    """And when to come back, and what is left; other keys and other paths are not limited."""
    service, ask = keyed(tmp_path, "name=a rpm=2 tpm=9000", "name=b")
    first, second, refused = [await ask(max_tokens=9) for _ in range(3)]
    error = refusal(refused, 429)
    assert (error["code"], error["param"]) == ("key_limit_exceeded", "rpm")
    assert "2 requests a minute" in error["message"]
    assert 55 <= int(refused.headers["retry-after"]) <= 60
    left = [each.headers["x-ratelimit-remaining-requests"] for each in (first, second, refused)]
    assert left == ["1", "0", "0"]
    # Until the answer has ended it is taken for its longest.
    assert 8000 < int(first.headers["x-ratelimit-remaining-tokens"]) < 9000 - 9
    assert refused.headers["x-ratelimit-remaining-tokens"] == str(9000 - 2 * (5 + 3))
    unlimited = await ask(1)
    assert unlimited.status_code == 200
    assert "x-ratelimit-limit-requests" not in unlimited.headers
    models = await service.request("GET", "/v1/models", headers={"authorization": "Bearer k0"})
    assert models.status_code == 200


async def test_auth_limits_the_tokens_that_a_request_may_come_to(tmp_path):
    """Its own limit, for each completion; without one some hundred; then what it came to."""
    service, ask = keyed(tmp_path, "name=a tpm=600", *["name=b tpm=600"] * 2)
    assert (await ask(max_tokens=250, n=2)).status_code == 200  # comes to 5 + 2 * 3
    assert (await ask(max_tokens=250, n=2)).status_code == 200
    error = refusal(await ask(max_tokens=290, n=2), 429)
    assert error["param"] == "tpm"
    assert (await ask()).status_code == 200
    assert len(service.engine.requests) == 3
    long = await ask(1, messages=[{"role": "user", "content": "x" * 4000}])
    assert long.status_code == 200
    refusal(await ask(1, messages=[{"role": "user", "content": "x" * 4000}]), 429)


@pytest.mark.parametrize("end", ["leaves", "fails", "cancelled"])
async def test_auth_gives_a_stream_back_however_it_ends(tmp_path, end):
    """The client goes away, the engine fails in the middle, the server stops."""
    fault = EngineError("no") if end == "fails" else Pause()
    engine = FakeEngine(lambda request: ("a", fault) if request.sampling.seed == 1 else ("a",))
    service, ask = keyed(tmp_path, "name=a streams=1 tpm=300", engine=engine)
    headers = {"authorization": "Bearer k0"}
    for _ in range(3):
        body = HELLO | {"stream": True, "seed": 1, "max_tokens": 200}
        connection = Connection.json(CHAT, body, headers)
        running = connection.run(service.app)
        await connection.arrived.wait()
        if end != "fails":
            error = refusal(await ask(), 429)
            assert (error["param"], error["code"]) == ("streams", "key_limit_exceeded")
            if end == "leaves":
                connection.disconnect()
            else:
                running.cancel()
        await asyncio.wait([running])
        assert (await ask(max_tokens=200)).status_code == 200
    assert not engine.running


@pytest.mark.parametrize("change", ["rotated", "expired"])
async def test_auth_lets_a_stream_go_on_when_its_key_ends(tmp_path, change):
    """New requests are refused from then on; the new key of the name counts the old one's."""
    ends = datetime.now(UTC) + timedelta(seconds=1.5)
    expires = ends.isoformat() if change == "expired" else "2999-01-01"
    engine = FakeEngine(("a", Pause(3), "b"))
    service, ask = keyed(tmp_path, f"name=a streams=1 expires={expires}", engine=engine)
    body = HELLO | {"stream": True}
    connection = Connection.json(CHAT, body, {"authorization": "Bearer k0"})
    running = connection.run(service.app)
    await connection.arrived.wait()
    new = f"{hashed('k1')} name=a streams=1"
    old = "" if change == "rotated" else f"{hashed('k0')} name=a streams=1 expires={expires}\n"
    (tmp_path / "keys").write_text(old + new)
    await asyncio.sleep(2.2)
    code = "api_key_expired" if change == "expired" else "invalid_api_key"
    assert refusal(await ask(), 401)["code"] == code
    assert refusal(await ask(1), 429)["param"] == "streams"
    await running
    assert connection.body.endswith(b"data: [DONE]\n\n")
    assert (connection.status, service.records[-1].error_code) == (200, None)
    engine.script = ("a",)
    assert (await ask(1)).status_code == 200


async def test_auth_tells_the_engine_a_keys_class_and_name(tmp_path):
    """Names take turns, not keys; without keys all are of one class."""
    service, ask = keyed(tmp_path, "name=a priority=low", "name=a priority=low", "name=b")
    for number in (0, 1, 2):
        await ask(number)
    seen = [(request.client, request.priority.name) for request in service.engine.requests]
    assert seen == [("a", "LOW"), ("a", "LOW"), ("b", "NORMAL")]
