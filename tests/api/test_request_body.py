"""Reading bodies: bounded, strict, and silent about what the client sent."""

import json

import pytest
from starlette.datastructures import Headers

from serve_app.api.request_body import parse_object, require_json, require_small_headers, time_limit
from serve_app.errors import HeadersTooLarge, InvalidRequest, UnsupportedMediaType
from tests.api.harness import CHAT, HELLO, Connection, Service, refusal


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  \n",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"17",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": "\\ud800"}',
        b'{"a": "\x00"}',
        b'{"a": 1,}',
        b"[" * 100_000,
        b'{"a":' * 5_000,
        b"1" * 10_000,
        "{}".encode("utf-16"),
    ],
    ids=lambda body: repr(body[:12]),
)
def test_parse_object_refuses_what_is_no_json_object(body):
    """Bad JSON, other types, depth, huge numbers and broken text are the client's fault."""
    with pytest.raises(InvalidRequest) as caught:
        parse_object(body)
    assert "body" in caught.value.message


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"b":', "}")])
def test_parse_object_takes_a_body_200_levels_deep(opening, closing):
    """What the message says holds, far from where Python itself would give up."""
    parse_object(f'{{"a":{opening * 199}1{closing * 199}}}'.encode())
    for levels in (201, 100_000):
        with pytest.raises(InvalidRequest, match="nested too deeply; 200 levels"):
            parse_object(f'{{"a":{opening * levels}1{closing * levels}}}'.encode())


def test_parse_object_quotes_no_body():
    """What a client sent does not come back, and does not reach a log."""
    with pytest.raises(InvalidRequest) as caught:
        parse_object(b'{"prompt": "my secret diary')
    assert "diary" not in caught.value.message


def test_parse_object_takes_the_last_value_of_a_repeated_key():
    """As in every common JSON reader; no error, no surprise."""
    assert parse_object(b'{"n": 1, "n": 2}') == {"n": 2}


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/x+json",
    ],
)
def test_require_json_passes_json_content_types(kind):
    """Parameters and case do not matter."""
    require_json(Headers({"content-type": kind}))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_require_json_refuses_other_content_types(headers):
    """A browser may send these without asking, so they are not taken."""
    with pytest.raises(UnsupportedMediaType):
        require_json(Headers(headers))


@pytest.mark.parametrize(("text", "seconds"), [("1", 0.9), ("0.25", 0.225), ("1e2", 99.8)])
def test_time_limit_ends_a_little_early(text, seconds):
    """The answer leaves before a proxy that knows the same limit cuts the connection."""
    limit = time_limit(Headers({"x-request-timeout-seconds": text}))
    assert limit == pytest.approx(seconds)


@pytest.mark.parametrize("headers", [{}, *({"x-request-timeout-seconds": t} for t in ("0", "-1"))])
def test_time_limit_that_is_not_positive_is_none(headers):
    """Zero and less switch it off, as in Serve's proxy."""
    assert time_limit(Headers(headers)) is None


@pytest.mark.parametrize("text", ["", "nan", "inf", "-inf", "1e999", "soon", "5s"])
def test_time_limit_refuses_others(text):
    """The message names the header."""
    with pytest.raises(InvalidRequest) as caught:
        time_limit(Headers({"x-request-timeout-seconds": text}))
    assert caught.value.param == "x-request-timeout-seconds"


async def test_read_body_refuses_an_announced_size_over_the_limit_before_reading():
    """413 comes from the header alone; not a byte of the body is waited for."""
    service = Service(max_request_bytes=1024)
    connection = Connection(CHAT, headers={"content-length": "1025"})
    await connection.run(service.app)
    assert connection.status == 413
    assert json.loads(connection.body)["error"]["code"] == "request_too_large"


async def test_read_body_cuts_a_body_without_length_at_the_limit():
    """A chunked body is refused as soon as it is too large, though more would come."""
    service = Service(max_request_bytes=1024)
    connection = Connection(CHAT)
    for _ in range(3):
        connection.feed(b" " * 512, more=True)
    await connection.run(service.app)
    assert connection.status == 413
    assert connection.incoming.empty()
    assert not service.engine.requests


async def test_read_body_reads_one_at_the_limit():
    """The limit itself is allowed, in any number of parts."""
    body = json.dumps(HELLO).encode().ljust(1024)
    connection = Connection(CHAT)
    for start in range(0, 1024, 100):
        connection.feed(body[start : start + 100], more=start + 100 < 1024)
    await connection.run(Service(max_request_bytes=1024).app)
    assert connection.status == 200


async def test_read_body_of_a_client_that_leaves_is_recorded_as_cancelled():
    """No engine work, one record."""
    service = Service()
    connection = Connection(CHAT)
    connection.feed(b'{"mess', more=True)
    connection.disconnect()
    await connection.run(service.app)
    assert [record.error_code for record in service.records] == ["request_cancelled"]
    assert not service.engine.requests


async def test_bad_json_gets_an_envelope():
    """Over HTTP it is a 400 like any other."""
    error = refusal(await Service().post_raw(CHAT, b"{oops"), 400)
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_value"


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/nowhere"])
@pytest.mark.parametrize(("count", "size"), [(101, 1), (2, 16_384)])
async def test_require_small_headers_refuses_too_many_or_too_long_ones(path, count, size):
    """On every path, as 431 in the envelope; nothing is generated and one record is left."""
    service = Service()
    connection = Connection.json(path, HELLO)
    connection.scope["headers"] += [(b"x-%d" % n, b"a" * size) for n in range(count)]
    await connection.run(service.app)
    assert connection.status == 431
    assert json.loads(connection.body)["error"]["code"] == "headers_too_large"
    assert [record.error_code for record in service.records] == ["headers_too_large"]
    assert not service.engine.requests


def test_require_small_headers_reads_those_at_the_limit():
    """A hundred headers, and 32 KiB of them; not one and not a byte more."""
    for limit in ([(b"a", b"")] * 100, [(b"a" * 768, b"b" * 32_000)]):
        require_small_headers(limit)
    for more in ([(b"a", b"")] * 101, [(b"a" * 769, b"b" * 32_000)]):
        with pytest.raises(HeadersTooLarge):
            require_small_headers(more)
