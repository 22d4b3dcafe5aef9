"""One request: its times, its counts, and every way in which it can fail."""

import asyncio
import time
from dataclasses import replace

import pytest

from serve_app.errors import ConfigError
from serve_app.loadtest.client import Target, ask, authorization, calibrate, find_model, session
from serve_app.loadtest.stage import Shot
from tests.api.harness import Service, listening
from tests.fakes import FakeEngine, Pause
from tests.loadtest.scripted import Scripted, serving

SHOT = Shot(0.0, 20, 4)


async def one(url, *, late_s=0.0, shot=SHOT, **more):
    target = Target(url, "acme/tiny", **more)
    async with session(target) as http:
        return await ask(http, target, shot, "some words", start=time.monotonic() - late_s)


def played(*script):
    """A server that plays this from the first request on."""
    return serving(Scripted(script, calibrations=0))


async def test_ask_measures_the_times_of_the_server():
    """ttft, gaps and the count of tokens are what was scripted."""
    with played(0.2, "a", 0.05, "b", 0.05, "c") as url:
        got = await one(url)
    assert got.error is None
    assert got.ttft_s == pytest.approx(0.2, abs=0.04)
    assert got.gaps_s == pytest.approx((0.05, 0.05), abs=0.02)
    assert got.tpot_s == pytest.approx(0.05, abs=0.02)
    assert (got.prompt_tokens, got.output_tokens) == (12, 3)


async def test_ask_times_no_token_after_the_last_text():
    """Usage and the end mark may take their time; GuideLLM and AIPerf do not count it either."""
    with played(0.05, "a", 0.05, "b", 0.3, "") as url:
        got = await one(url)
    assert got.tpot_s < 0.1
    assert got.e2e_s > 0.35


async def test_ask_gives_tokens_that_come_at_once_no_time_of_their_own():
    """Zero would flatter a server that holds its tokens back."""
    with played(0.05, "abc") as url:
        got = await one(url)
    assert replace(got, output_tokens=3).tpot_s is None


async def test_ask_counts_latency_from_the_intended_time():
    """A request that is sent a second late has a second more of latency."""
    with played(0.05, "a") as url:
        got = await one(url, late_s=1.0)
    assert got.sent_s == pytest.approx(1.0, abs=0.05)
    assert got.ttft_s == pytest.approx(1.05, abs=0.05)
    assert got.e2e_s >= got.ttft_s


async def test_ask_counts_tokens_in_one_piece_as_one_arrival():
    """Texts that come together make no gaps of zero."""
    with played(0.05, "a", "b", "c", 0.1, "d") as url:
        got = await one(url)
    assert got.output_tokens == 4
    assert len([gap for gap in got.gaps_s if gap > 0.05]) == 1


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ((429,), "http_429"),
        ((500,), "http_500"),
        ((0.01, "a", "error"), "stream_error"),
        ((0.01, "a", "cut"), "disconnected"),
        ((0.01, "garbage"), "malformed"),
        ((0.01, "a", 5.0, "b"), "timeout"),
    ],
)
async def test_ask_gives_every_failure_its_kind(script, kind):
    """No failure is a success, and none is taken for another."""
    with played(*script) as url:
        assert (await one(url, timeout_s=0.5)).error == kind


async def test_ask_gives_a_closed_port_its_own_kind():
    """Nobody listens."""
    with played(0.01, "a") as url:
        pass
    assert (await one(url)).error == "connect"


async def test_ask_cancelled_leaves_its_sample():
    """The end of a stage does not lose what was in flight."""
    with played(0.05, "a", 9.0, "b") as url:
        task = asyncio.create_task(one(url))
        await asyncio.sleep(0.5)
        task.cancel()
        got = await task
    assert got.error == "unfinished"
    assert got.ttft_s == pytest.approx(0.05, abs=0.05)


async def test_ask_our_own_service_for_chat_and_completions():
    """The client's body is one that the API takes, and its stream one that the client reads."""
    engine = FakeEngine(("Hello", Pause(0.02), " you"), prompt_tokens=7)
    async with listening(Service(engine).app) as url:
        for chat in (True, False):
            target = Target(url, "acme/tiny-llama", chat=chat)
            async with session(target) as http:
                got = await ask(http, target, SHOT, "words", start=time.monotonic())
            assert (got.error, got.prompt_tokens, got.output_tokens) == (None, 7, 2)
    assert {request.sampling.max_tokens for request in engine.requests} == {4}
    assert all(request.sampling.ignore_eos for request in engine.requests)


async def test_find_model_finds_its_window():
    """Both stand in the list of models."""
    with serving(Scripted(window=512)) as url:
        async with session(Target(url)) as http:
            assert await find_model(http, url) == ("acme/tiny", 512)
            with pytest.raises(ConfigError, match="answered 404"):
                await find_model(http, url + "/metrics?")


async def test_calibrate_fits_prompts():
    """A server whose template costs ten tokens gets ten words fewer."""
    with serving(Scripted()) as url:
        target = Target(url, "acme/tiny")
        async with session(target) as http:
            prompts = await calibrate(http, target)
    assert len(prompts.text(replace(SHOT, prompt_tokens=100), 0).split()) == 90


async def test_find_model_without_a_service_is_one_sentence():
    """A port where nobody listens ends the command with its name."""
    with serving(Scripted()) as url:
        pass
    async with session(Target(url)) as http:
        with pytest.raises(ConfigError, match="cannot be reached"):
            await find_model(http, url)


@pytest.mark.parametrize("content", [None, "", "a\nb", "ключ"])
def test_authorization_refuses_a_file_without_a_key(tmp_path, content):
    """The message names the option, and the value is not in it."""
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="--api-key-file") as refused:
        authorization(path)
    assert not content or content not in str(refused.value)
