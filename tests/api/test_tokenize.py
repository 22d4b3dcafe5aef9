"""Text to ids and back, over HTTP."""

import pytest

from tests.api.harness import HELLO, MODEL, Service, refusal
from tests.fakes import FakeEngine, Pause


async def test_tokenize_makes_ids_of_a_prompt_or_a_conversation():
    """As many as a request with it would begin with, and the window beside them."""
    service = Service(FakeEngine(prompt_tokens=4, max_context_tokens=512))
    for body in ({"prompt": "hello"}, HELLO, {**HELLO, "model": MODEL}):
        answer = await service.post("/tokenize", body)
        assert answer.json() == {
            "count": 4,
            "max_model_len": 512,
            "tokens": [0, 1, 2, 3],
            "token_strs": None,
        }
    answer = await service.post("/tokenize", {"prompt": [7, 8]})
    assert answer.json()["tokens"] == [7, 8]


async def test_tokenize_names_ids_where_that_is_asked_for():
    """As the vocabulary writes them."""
    body = {"prompt": [7, 8], "return_token_strs": True}
    answer = (await Service().post("/tokenize", body)).json()
    assert answer["token_strs"] == ["token7", "token8"]


class Tokenizing(FakeEngine):
    """Remembers what it was asked to encode."""

    async def tokenize(self, prompt):
        self.asked = prompt
        return await super().tokenize(prompt)


@pytest.mark.parametrize(
    ("body", "adds"),
    [
        ({"prompt": "hi"}, True),
        ({"prompt": "hi", "add_special_tokens": True}, True),
        ({"prompt": "hi", "add_special_tokens": False}, False),
        (HELLO, False),
        (HELLO | {"add_special_tokens": False}, False),
        (HELLO | {"add_special_tokens": True}, True),
    ],
)
async def test_tokenize_can_leave_out_special_tokens(body, adds):
    """Of a text they are part by itself, of a conversation the template writes them."""
    engine = Tokenizing()
    answer = await Service(engine).post("/tokenize", body)
    assert (answer.status_code, engine.asked.add_special_tokens) == (200, adds)


async def test_tokenize_encodes_a_conversation_as_a_request_with_it():
    """With its tools, and with the variables of its template."""
    tool = {"type": "function", "function": {"name": "f"}}
    fields = {
        "tools": [tool],
        "chat_template_kwargs": {"a": 1},
        "enable_thinking": False,
        "add_generation_prompt": False,
    }
    engine = Tokenizing()
    service = Service(engine)
    assert (await service.post("/tokenize", HELLO | fields)).status_code == 200
    await service.chat(**fields)
    assert engine.asked == engine.requests[0].prompt
    assert engine.asked.tools
    assert engine.asked.template_kwargs["enable_thinking"] is False


async def test_tokenize_has_vllms_paths_and_those_of_the_api():
    """With and without `/v1`."""
    service = Service()
    for base in ("", "/v1"):
        assert (await service.post(f"{base}/tokenize", {"prompt": "a"})).json()["count"] == 5
        assert (await service.post(f"{base}/detokenize", {"tokens": [3]})).json()["prompt"] == "3"
        info = await service.request("GET", f"{base}/tokenizer_info")
        assert info.json()["tokenizer_class"] == "Fake"


async def test_detokenize_makes_text_of_ids():
    """Also none at all."""
    service = Service()
    assert (await service.post("/detokenize", {"tokens": [3, 4]})).json() == {"prompt": "3 4"}
    assert (await service.post("/detokenize", {"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "no"}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "return_token_strs": "yes"}, 400, "return_token_strs"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "12"}, 400, "tokens"),
    ],
)
async def test_tokenize_names_what_cannot_be_done(path, body, status, param):
    """In the envelope, with the field."""
    error = refusal(await Service().post(path, body), status)
    assert error["param"] == param


async def test_server_timing_says_where_the_time_went():
    """`server-timing` on whole and streamed answers; the record has the same and the gaps."""
    service = Service(FakeEngine(("a", Pause(0.01), "b")))
    for stream in (False, True):
        answer = await service.post("/v1/chat/completions", {**HELLO, "stream": stream})
        names = [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")]
        assert names == ["queue", "prefill", "decode", "total"]
    assert all(0.005 < record.itl_s[0] < 5 for record in service.records)
    assert [len(record.itl_s) for record in service.records] == [1, 1]
