"""Pages, routes and layers of the application."""

import asyncio

import pytest

import serve_app.api.app as api_app
from serve_app.errors import EngineDead
from tests.api.harness import CHAT, COMPLETIONS, MODEL, Service, refusal
from tests.fakes import FakeEngine, Pause


async def test_models_lists_the_one_model():
    """Id, owner and time; the window if it is known."""
    body = (await Service().request("GET", "/v1/models")).json()
    card = {"id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "acme"}
    assert body == {"object": "list", "data": [card]}
    body = (await Service(max_context_tokens=512).request("GET", "/v1/models")).json()
    assert body["data"] == [card | {"max_model_len": 512}]


@pytest.mark.parametrize("path", [MODEL, MODEL.replace("/", "%2F")])
async def test_models_finds_a_model_by_its_id_with_a_slash(path):
    """Written plainly or escaped, as the official client does."""
    response = await Service().request("GET", f"/v1/models/{path}")
    assert response.json()["id"] == MODEL


async def test_models_does_not_find_another_model():
    """404 that names the served one."""
    error = refusal(await Service().request("GET", "/v1/models/gpt-9"), 404)
    assert error["code"] == "model_not_found"
    assert MODEL in error["message"]


async def test_version_says_what_runs():
    """Package, model and the commit of the weights."""
    body = (await Service(commit="c0ffee").request("GET", "/version")).json()
    assert body == {"version": "1.2.3", "model": MODEL, "commit": "c0ffee"}


async def test_health_does_not_ask_the_engine():
    """The process lives, whatever the replicas do."""
    service = Service(FakeEngine(is_ready=False))
    assert (await service.request("GET", "/health")).status_code == 200


@pytest.mark.parametrize("is_ready", [False, Pause(), EngineDead("the replica was lost")])
async def test_ready_is_503_when_no_replica_answers(is_ready, monkeypatch):
    """No, no answer in time, or an error: an envelope with a time to retry."""
    monkeypatch.setattr(api_app, "READY_TIMEOUT_S", 0.05)
    response = await Service(FakeEngine(is_ready=is_ready)).request("GET", "/ready")
    refusal(response, 503)
    assert response.headers["retry-after"] == "5"


async def test_ready_is_200_when_one_does():
    """A request sent now would be answered."""
    assert (await Service().request("GET", "/ready")).json() == {"status": "ready"}


async def test_access_shows_the_last_verdict_if_there_is_one():
    """The page is what the gate says; without a gate it does not exist."""
    service = Service(access=lambda: {"approved": True, "nodes": []})
    assert (await service.request("GET", "/access")).json() == {"approved": True, "nodes": []}
    refusal(await Service().request("GET", "/access"), 404)


async def test_metrics_are_prometheus_text_and_leave_no_record():
    """A scraper reads them by their version; asking every few seconds fills no log."""

    async def page():
        return "up 1\n"

    service = Service(metrics=page)
    response = await service.request("GET", "/metrics")
    assert response.text == "up 1\n"
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert not service.records
    refusal(await Service().request("GET", "/metrics"), 404)


@pytest.mark.parametrize("path", ["/v1", "/v1/chat", "/v1/models/x", "/v2/models", "/docs"])
async def test_app_answers_another_path_with_an_envelope(path):
    """Also with a slash at the end: no redirect that would drop a body."""
    error = refusal(await Service().request("GET", path), 404)
    assert error["code"] in ("not_found", "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", COMPLETIONS, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", f"/v1/models/{MODEL}", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
    ],
)
async def test_app_answers_another_method_with_those_that_are_allowed(method, path, allow):
    """405 with the Allow header that HTTP asks for."""
    response = await Service().request(method, path)
    assert refusal(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == allow


async def test_cors_allows_no_origin_unless_configured():
    """A page of another origin may not read answers."""
    response = await Service().request("GET", "/v1/models", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in response.headers


async def test_cors_allows_configured_origins_also_for_errors():
    """Only those; a browser can read the error and its id."""
    service = Service(cors_allow_origins=("https://a.example",))
    for path, status in (("/v1/models", 200), ("/nowhere", 404)):
        response = await service.request("GET", path, headers={"origin": "https://a.example"})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in response.headers
    response = await service.request("GET", "/v1/models", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in response.headers


async def test_app_does_not_let_requests_wait_for_each_other():
    """A pending generation does not hold up another request."""
    scripts = iter([["a", Pause(), "b"], ["c"]])
    service = Service(FakeEngine(lambda request: next(scripts)))
    pending = asyncio.create_task(service.chat())
    await asyncio.sleep(0)
    response = await asyncio.wait_for(service.chat(), 5)
    assert response.json()["choices"][0]["message"]["content"] == "c"
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    assert not service.engine.running
