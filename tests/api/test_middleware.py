"""Request ids, records, and the boundary where every exception ends."""

import pytest
from structlog.testing import capture_logs

from serve_app.api.middleware import Boundary, RequestId
from serve_app.errors import InvalidRequest, RequestCancelled
from tests.api.harness import CHAT, HELLO, MODEL, Connection, Service, refusal
from tests.fakes import FakeEngine


@pytest.mark.parametrize("given", ["abc", "a" * 128, "req/1:2-3_4.5"])
async def test_request_id_that_is_sane_is_kept(given):
    """The client's id comes back and stands in the record."""
    service = Service()
    response = await service.post(CHAT, HELLO, headers={"x-request-id": given})
    assert response.headers["x-request-id"] == given
    assert service.records[0].request_id == given


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "\x7f", "é".encode("latin-1")])
async def test_request_id_that_is_not_is_replaced(given):
    """Too long or not printable: a fresh one."""
    response = await Service().post(CHAT, HELLO, headers={"x-request-id": given})
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/nowhere", 404),
        ("GET", CHAT, 405),
        ("POST", CHAT, 415),
        ("OPTIONS", CHAT, 405),
        ("HEAD", "/v1/models", 200),
    ],
)
async def test_request_id_is_another_one_for_every_answer(method, path, status):
    """Good or bad, and another one each time."""
    service = Service()
    responses = [await service.request(method, path) for _ in range(2)]
    assert [response.status_code for response in responses] == [status, status]
    ids = {response.headers["x-request-id"] for response in responses}
    assert len(ids) == 2


async def test_record_has_a_template_for_its_path():
    """A metric's label has few values, whatever clients ask for."""
    service = Service()
    for path in (f"/v1/models/{MODEL}", "/v1/models/x", "/a/b/c", "/a/b/d"):
        await service.request("GET", path)
    await service.request("GET", CHAT)
    paths = [record.path for record in service.records]
    assert paths == ["/v1/models/{model:path}"] * 2 + ["unmatched"] * 2 + [CHAT]
    codes = [record.error_code for record in service.records]
    assert codes == [None, "model_not_found", "not_found", "not_found", "method_not_allowed"]


async def test_record_is_not_left_by_probes():
    """They come every second, and say nothing when all is well."""
    service = Service()
    for path in ("/health", "/ready", "/version"):
        assert (await service.request("GET", path)).status_code == 200
    assert service.records == []


@pytest.mark.parametrize("body", [HELLO, {}, HELLO | {"tools": [1]}, HELLO | {"model": "x"}])
async def test_record_is_one_for_one_request(body):
    """However it ended."""
    service = Service()
    response = await service.post(CHAT, body)
    assert [record.status for record in service.records] == [response.status_code]


async def test_boundary_logs_a_foreign_exception_by_place():
    """The log says which class, where, and for which request; not the exception's text."""
    service = Service(FakeEngine([KeyError("a prompt's words")]))
    with capture_logs() as logged:
        response = await service.chat()
    refusal(response, 500)
    (entry,) = [entry for entry in logged if entry["event"] == "request.failed"]
    assert entry["cause"] == "KeyError"
    assert entry["request_id"] == response.headers["x-request-id"]
    assert "fakes.py" in entry["where"]
    assert "words" not in str(entry)


async def test_boundary_logs_ignored_fields_by_name_only():
    """At debug level, bounded in number and length."""
    with capture_logs() as logged:
        await Service().chat(**{f"x{number:03}" + "y" * 100: "value" for number in range(50)})
    (entry,) = [entry for entry in logged if entry["event"] == "request.fields_ignored"]
    assert entry["log_level"] == "debug"
    assert len(entry["fields"]) == 16
    assert all(len(name) == 64 for name in entry["fields"])
    assert "value" not in str(entry)


async def test_boundary_passes_other_scopes_through():
    """The lifespan reaches the application untouched."""
    connection = Connection("/")
    connection.scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    connection.incoming.put_nowait({"type": "lifespan.startup"})
    connection.incoming.put_nowait({"type": "lifespan.shutdown"})
    await connection.run(Service().app)
    assert [message["type"] for message in connection.sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


@pytest.mark.parametrize("late", [RequestCancelled("the client went away"), ValueError("x")])
async def test_boundary_takes_an_answer_that_went_out_whole_as_ended_well(late):
    """What happens after the last byte neither adds to the answer nor to the record's errors."""

    async def answer_then_fail(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
        raise late

    records = []
    connection = Connection("/")
    await connection.run(RequestId(Boundary(answer_then_fail, records.append, frozenset())))
    assert connection.body == b"{}"
    assert [(record.status, record.error_code) for record in records] == [(200, None)]


async def test_boundary_error_that_is_no_utf8():
    """Half a surrogate pair, which a request's own chat template can raise, is a 400 as it was."""
    service = Service(FakeEngine([InvalidRequest("a\ud800b")]))
    response = await service.post(CHAT, HELLO)
    assert refusal(response, 400)["message"] == "a?b"
