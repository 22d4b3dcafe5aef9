"""Names of the one model: what it answers to, and what it lists."""

import pytest

from serve_app.api.status_page import View
from tests.api.harness import CHAT, COMPLETIONS, HELLO, MODEL, Service, events, refusal

ALIASES = ("chat", "gpt-4o", MODEL)
SMALLEST = {CHAT: HELLO, COMPLETIONS: {"prompt": "a"}, "/v1/responses": {"input": "a"}}


class Whole:
    """The rest of a service."""

    def __init__(self, window):
        self.window, self.looks = window, 0

    async def look(self):
        """Return what is known."""
        self.looks += 1
        return View([], None, self.window)


async def test_models_lists_all_names():
    """The own one first, none twice, each with the window."""
    service = Service(aliases=ALIASES, max_context_tokens=512)
    body = (await service.request("GET", "/v1/models")).json()
    assert [card["id"] for card in body["data"]] == [MODEL, "chat", "gpt-4o"]
    assert {card["max_model_len"] for card in body["data"]} == {512}
    for name in (MODEL, "chat", "gpt-4o"):
        assert (await service.request("GET", f"/v1/models/{name}")).json()["id"] == name
    refusal(await service.request("GET", "/v1/models/gpt-9"), 404)


@pytest.mark.parametrize("path", SMALLEST)
@pytest.mark.parametrize(
    ("asked", "answered"),
    [("chat", "chat"), ("gpt-4o", "gpt-4o"), (MODEL, MODEL), ("", MODEL), (None, MODEL)],
)
async def test_models_answers_by_the_name_that_was_asked_for(path, asked, answered):
    """Complete or streamed; nothing and an empty text ask for the own one."""
    service = Service(aliases=ALIASES)
    body = (await service.post(path, SMALLEST[path] | {"model": asked})).json()
    assert body["model"] == answered
    assert service.records[0].model == MODEL  # one label in the metrics
    if path != "/v1/responses":
        sent = await service.post(path, SMALLEST[path] | {"model": asked, "stream": True})
        assert {chunk["model"] for chunk in events(sent)[:-1]} == {answered}


async def test_models_lists_adapters_too():
    """Listed with their base; a request for one says so to the engine, and to the metrics."""
    service = Service(adapters=("legal",), max_context_tokens=512)
    body = (await service.request("GET", "/v1/models")).json()
    assert [(card["id"], card.get("parent")) for card in body["data"]] == [
        (MODEL, None),
        ("legal", MODEL),
    ]
    for path, smallest in SMALLEST.items():
        for asked, adapter in (("legal", "legal"), (MODEL, "")):
            answer = await service.post(path, smallest | {"model": asked})
            assert answer.json()["model"] == asked
            assert service.engine.requests[-1].adapter == adapter
            assert service.records[-1].model == asked
    refusal(await service.post(CHAT, HELLO | {"model": "medical"}), 404)


async def test_models_names_count_for_token_counts_too():
    """And refuse others as everywhere."""
    service = Service(aliases=ALIASES)
    for name in ("chat", "", None):
        answer = await service.post("/tokenize", {"prompt": "a", "model": name})
        assert answer.status_code == 200
    refusal(await service.post("/tokenize", {"prompt": "a", "model": "gpt-9"}), 404)
    assert refusal(await service.post("/detokenize", {"tokens": [], "model": 1}), 400)


async def test_models_have_the_window_that_the_replicas_report():
    """Asked for until it is known, and never again."""
    whole = Whole(None)
    service = Service(service=whole)
    body = (await service.request("GET", "/v1/models")).json()
    assert "max_model_len" not in body["data"][0]
    whole.window = 4096
    for _ in range(3):
        body = (await service.request("GET", f"/v1/models/{MODEL}")).json()
        assert body["max_model_len"] == 4096
    assert whole.looks == 2
