"""Slips in a base URL: slashes lead to the same route, everything else gets a hint what to do."""

import hashlib

import httpx
import pytest

from serve_app.api.paths import lost
from tests.api.harness import CHAT, COMPLETIONS, HELLO, Connection, Service, listening, refusal


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT + "/"),
        ("POST", "/" + CHAT),
        ("POST", "//v1//chat///completions//"),
        ("POST", COMPLETIONS + "/"),
        ("POST", "/v1/responses/"),
        ("POST", "/tokenize/"),
        ("GET", "/v1/models/"),
        ("GET", "//v1/models"),
        ("GET", "/v1/models/acme/tiny-llama/"),
        ("GET", "/health/"),
        ("GET", "//"),
    ],
)
async def test_paths_with_more_slashes_lead_to_the_same_route(method, path):
    """Without a redirect, which would lose a body; in process and on a socket."""
    bodies = {CHAT: HELLO, COMPLETIONS: {"prompt": "a"}, "/v1/responses": {"input": "a"}}
    plain = next((p for p in bodies if "".join(path.split("/")) == "".join(p.split("/"))), None)
    body = bodies.get(plain, {"prompt": "a"}) if method == "POST" else None
    service = Service()
    async with listening(service.app) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        async with httpx.AsyncClient(follow_redirects=False) as client:
            target = httpx.URL(scheme="http", host=host, port=int(port), raw_path=path.encode())
            response = await client.request(method, target, json=body)
    assert response.status_code == 200, response.text


async def test_paths_under_a_prefix_too():
    """Serve mounts an application at its route prefix."""
    service = Service()
    connection = Connection.json(f"/llm/{CHAT}/", HELLO)
    connection.scope["root_path"] = "/llm"
    await connection.run(service.app)
    assert connection.status == 200
    assert service.records[0].path == CHAT


async def test_paths_ask_for_a_key_under_any_spelling(tmp_path):
    """What is open stays open, and nothing else becomes it."""
    (tmp_path / "keys").write_text(hashlib.sha256(b"k").hexdigest())
    service = Service(api_keys_file=str(tmp_path / "keys"), access=dict)
    for path in ("/health/", "//health", "//ready/"):
        assert (await service.request("GET", f"http://test{path}")).status_code == 200, path
    for path in ("//access", "/access/", "/v1//models", "/health/x", "//v1/models/"):
        refusal(await service.request("GET", f"http://test{path}"), 401)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1", "/v1/models"),
        ("/v1/", "/v1/models"),
        ("/v1/v1/chat/completions", "twice"),
        ("/v1/v1/models", "ends in /v1, once"),
        ("/chat/completions", "base URL in /v1"),
        ("/completions", "base URL in /v1"),
        ("/responses", "base URL in /v1"),
        ("/models", "base URL in /v1"),
        ("/models/acme/tiny-llama", "base URL in /v1"),
        ("/v1/embeddings", "not done here"),
        ("/v1/moderations", "not done here"),
        ("/v1/audio/speech", "not done here"),
        ("/v1/files/x", "not done here"),
        ("/v1/responses/resp_1", "not stored here"),
        ("/v1/responses/resp_1/cancel", "not stored here"),
        ("/v1/responses/input_tokens", "/tokenize"),
        ("/v1/chat/completions/chatcmpl-1", "not stored here"),
        ("/v1/messages", "Anthropic"),
        ("/messages", "Anthropic"),
        ("/api/chat", "Ollama"),
        ("/completion", "/v1/completions"),
        ("/nowhere", "the API is under /v1"),
        ("/v1/nowhere", "the API is under /v1"),
    ],
)
async def test_paths_that_lead_nowhere_get_a_hint_where_to_go(path, words):
    """A 404 in the envelope that names the base URL, or what is not done here."""
    for method in ("GET", "POST"):
        error = refusal(await Service().request(method, path), 404)
        assert words in error["message"]
        assert error["code"] == "not_found"


def test_lost_names_the_prefix_under_which_the_service_is():
    """So that they can be followed."""
    assert "/llm/v1" in lost("/chat/completions", "/llm")
    assert "/llm/v1/models" in lost("/nowhere", "/llm")


async def test_ping_is_health():
    """As other servers have it."""
    assert (await Service().request("GET", "/ping")).json() == {"status": "ok"}
