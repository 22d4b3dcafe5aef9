"""The whole chain of questions against answers of every kind, without a network."""

import json

import httpx2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.access.hub import client
from serve_app.access.hub import probe as probing
from serve_app.access.hub.probe import Probe
from serve_app.access.token import ResolvedToken, Token
from serve_app.access.verdict import Outcome, TokenReport
from serve_app.config import AccessConfig
from tests.access.cases import COMMIT, MODEL, fake_token
from tests.conftest import safetensors

HUB, CDN = "https://hub.example", "https://cdn.example"
WEIGHTS = safetensors({"weight": [64, 8]})
ACCESS = AccessConfig(endpoint=HUB, timeout_s=1, deadline_s=1)
TOKEN = fake_token()


def sound(request: httpx2.Request) -> httpx2.Response:
    """Answer as the Hub and its storage do when all is well."""
    if request.url.host == "cdn.example":
        headers = {"content-range": f"bytes 0-8/{len(WEIGHTS)}"}
        return httpx2.Response(206, headers=headers, content=WEIGHTS[:9])
    if "/revision/" in request.url.path:
        names = ["config.json", "model.safetensors"]
        siblings = [{"rfilename": name} for name in names]
        return httpx2.Response(200, json={"sha": COMMIT, "siblings": siblings})
    headers = {
        "location": f"{CDN}/weights?signature=secret",
        "x-repo-commit": COMMIT,
        "x-linked-size": str(len(WEIGHTS)),
    }
    return httpx2.Response(302, headers=headers)


def probe(monkeypatch, answer):
    monkeypatch.setattr(client, "_pause", lambda *_: None)
    monkeypatch.setattr(client, "_may_pass", lambda _: False)
    resolved = ResolvedToken(Token(TOKEN), TokenReport("env:HF_TOKEN", "0" * 8))
    monkeypatch.setattr(probing, "resolve_token", lambda _: resolved)
    return Probe(MODEL, ACCESS, transport=httpx2.MockTransport(answer)).run(1.0)


def test_probe_grants_sound_answers(monkeypatch):
    """The baseline of the properties below: untouched, the chain proves access."""
    assert probe(monkeypatch, sound).outcome is Outcome.GRANTED


statuses = st.sampled_from([200, 204, 206, 301, 302, 307, 400, 401, 403, 404, 416, 429, 500, 503])
headers = st.dictionaries(
    st.sampled_from(
        ["x-error-code", "x-error-message", "location", "x-repo-commit", "x-linked-size",
         "x-xet-hash", "content-range", "content-length", "retry-after", "ratelimit", "link"]
    ),
    st.sampled_from(
        ["GatedRepo", "RepoNotFound", "EntryNotFound", "f" * 40, COMMIT, "0", "-1", "a" * 64,
         "https://evil.example/x", "/elsewhere", "ftp://x", "http://[", "bytes 0-8/5", "\x7f"]
    ),
    max_size=4,
)  # fmt: skip
bodies = st.binary(max_size=40) | st.sampled_from(
    [b"{}", b"[]", b"null", b'{"sha": 1}', b'{"sha": "x", "siblings": []}', b"<html>", b"[" * 9999]
    + [json.dumps({"sha": COMMIT, "siblings": found}).encode() for found in ([], None, [1], [{}])]
)
faults = st.sampled_from(
    [httpx2.ConnectError("x"), httpx2.ReadTimeout("x"), httpx2.RemoteProtocolError("x"),
     httpx2.ProxyError("x"), httpx2.DecodingError("x"), OSError("x"), ValueError("x"),
     RuntimeError("x"), KeyError("x")]
)  # fmt: skip
LENIENT = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@LENIENT
@given(st.integers(0, 2), statuses, headers, bodies)
def test_probe_grants_no_false_answer(monkeypatch, victim, status, extra, body):
    """Replace one of the three answers by anything: one outcome, never a false yes or a leak."""
    asked = []

    def answer(request):
        asked.append(request)
        if len(asked) == victim + 1:
            return httpx2.Response(status, headers=extra, content=body)
        return sound(request)

    verdict = probe(monkeypatch, answer)
    assert isinstance(verdict.outcome, Outcome)
    if verdict.outcome is Outcome.GRANTED:
        # A yes still ends with the sound bytes, or with the replaced ones if they are the same.
        assert asked[-1].url.host != "hub.example"
        assert len(asked) >= 3
        assert victim != 2 or status in (301, 302, 307)
    leaked = [r.url.host for r in asked if TOKEN in r.headers.get("authorization", "")]
    assert set(leaked) <= {"hub.example"}
    assert TOKEN not in repr(verdict)
    assert "signature" not in repr(verdict)


@LENIENT
@given(st.integers(0, 2), faults)
def test_probe_turns_any_exception_into_an_outcome(monkeypatch, victim, fault):
    """Whatever the client raises, wherever: no answer came, so it is not granted."""
    asked = []

    def answer(request):
        asked.append(request)
        if len(asked) == victim + 1:
            raise fault
        return sound(request)

    outcome = probe(monkeypatch, answer).outcome
    if type(fault) in (RuntimeError, KeyError):
        assert outcome is Outcome.UNKNOWN
    elif victim == 2:
        assert outcome is Outcome.WEIGHTS_UNREACHABLE
    else:
        assert outcome is Outcome.HUB_UNREACHABLE
