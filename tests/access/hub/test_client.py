"""Limits of the requests: time, bytes, redirects, retries, credentials."""

import time

import httpx2
import pytest

from serve_app.access.hub.classify import Step
from serve_app.access.hub.client import Failed, Wire
from serve_app.access.verdict import Outcome

HUB = "https://hub.example"


def wire(answer, *, budget_s=5.0):
    return Wire(
        HUB,
        lambda url: {"x-credential": url},
        timeout_s=1,
        budget_s=budget_s,
        transport=httpx2.MockTransport(answer),
    )


def scripted(*answers):
    """Answer in this order; the last one again and again."""
    seen = []

    def answer(request):
        seen.append(request)
        result = answers[min(len(seen), len(answers)) - 1]
        if isinstance(result, Exception):
            raise result
        return result

    return answer, seen


def redirect(location, status=302):
    return httpx2.Response(status, headers={"location": location})


def test_client_keeps_only_the_wanted_bytes():
    """A server that ignores the range does not fill the memory."""
    answer, _ = scripted(httpx2.Response(200, content=b"x" * 1_000_000))
    assert wire(answer).ask(Step.BYTES, "GET", f"{HUB}/f", limit=9).body == b"x" * 9


def test_client_follows_and_counts_redirects_on_its_own_origin():
    """A renamed repository is one of them."""
    answer, seen = scripted(redirect("/b", 307), httpx2.Response(200))
    asking = wire(answer)
    assert asking.ask(Step.DESCRIPTION, "GET", f"{HUB}/a").url == f"{HUB}/b"
    assert (len(seen), asking.requests) == (2, 2)


@pytest.mark.parametrize(
    "location", ["https://evil.example/b", "http://hub.example/b", "https://hub.example:444/b"]
)
def test_client_does_not_follow_redirects_to_another_origin(location):
    """Another host, scheme or port is another origin."""
    answer, seen = scripted(redirect(location))
    assert wire(answer).ask(Step.WEIGHTS, "HEAD", f"{HUB}/a").status == 302
    assert len(seen) == 1


def test_client_follows_redirects_of_bytes_anywhere_and_counts_none():
    """A CDN may hand over to another one; those requests are not the Hub's."""
    answer, seen = scripted(redirect("https://two.example/b"), httpx2.Response(206))
    asking = wire(answer)
    assert asking.ask(Step.BYTES, "GET", "https://one.example/a").status == 206
    assert asking.requests == 0
    assert [request.headers["x-credential"] for request in seen] == [str(r.url) for r in seen]


def test_client_ends_a_circle_of_redirects():
    """After a few hops the last answer stands."""
    answer, seen = scripted(redirect("/again"))
    assert wire(answer).ask(Step.DESCRIPTION, "GET", f"{HUB}/a").status == 302
    assert len(seen) == 4


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_client_asks_a_sick_server_four_times(status, monkeypatch):
    """Then its last answer stands."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    answer, seen = scripted(httpx2.Response(status))
    assert wire(answer).ask(Step.DESCRIPTION, "GET", HUB).status == status
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after": "3"}, 3),
        ({"ratelimit": '"api";r=0;t=4'}, 4),
        ({"retry-after": "1", "ratelimit": '"api";r=0;t=2'}, 2),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 5),
        ({}, 5),
    ],
)
def test_client_waits_for_a_rate_limit_as_asked(headers, wait_s, monkeypatch):
    """The longer of what is asked, plus up to half a second so that nodes do not come at once."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    answer, _ = scripted(httpx2.Response(429, headers=headers), httpx2.Response(200))
    assert wire(answer, budget_s=30).ask(Step.DESCRIPTION, "GET", HUB).status == 200
    assert wait_s <= slept[0] <= wait_s + 0.5


def test_client_begins_no_wait_beyond_its_budget(monkeypatch):
    """The answer is known now, so it is given now."""
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("must not wait"))
    answer, _ = scripted(httpx2.Response(429, headers={"retry-after": "60"}))
    assert wire(answer).ask(Step.DESCRIPTION, "GET", HUB).status == 429


@pytest.mark.parametrize(
    ("error", "tries", "words"),
    [
        (httpx2.ConnectError("refused"), 4, "no connection to hub.example"),
        (httpx2.ReadTimeout("slow"), 4, "did not answer within 1 s"),
        (httpx2.RemoteProtocolError("?"), 4, "not HTTP"),
        (httpx2.ProxyError("407"), 1, "the proxy"),
        (httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), 1, "TLS certificate"),
        (httpx2.UnsupportedProtocol("x"), 1, "could not be asked"),
        (ValueError("x"), 1, "could not be asked"),
    ],
)
def test_client_reports_no_answer_by_its_cause(error, tries, words, monkeypatch):
    """What may pass is repeated, what needs a fix is not; no cause with a request in it."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    answer, seen = scripted(error)
    with pytest.raises(Failed, match=words) as caught:
        wire(answer).ask(Step.DESCRIPTION, "GET", f"{HUB}/a?signature=secret")
    assert len(seen) == tries
    assert caught.value.outcome is Outcome.HUB_UNREACHABLE
    assert caught.value.__cause__ is None
    assert "signature" not in caught.value.message


def test_client_reports_a_storage_that_does_not_answer_as_the_storage():
    """The Hub was reached by then."""
    answer, _ = scripted(httpx2.ProxyError("x"))
    with pytest.raises(Failed) as caught:
        wire(answer).ask(Step.BYTES, "GET", "https://cdn.example/a")
    assert (caught.value.outcome, caught.value.host) == (
        Outcome.WEIGHTS_UNREACHABLE,
        "cdn.example",
    )


def test_client_cuts_off_a_dripping_answer():
    """Each byte comes in time, the whole does not."""

    def drip():
        for _ in range(100):
            time.sleep(0.1)
            yield b"x"

    with pytest.raises(Failed, match="did not answer within"):
        wire(lambda _: httpx2.Response(200, content=drip()), budget_s=1.2).ask(
            Step.DESCRIPTION, "GET", HUB, limit=1000, tries=1
        )
