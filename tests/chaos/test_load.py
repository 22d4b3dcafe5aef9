"""A load that records how each stream ended, from a server that ends them in every way."""

import asyncio
import time
from collections import Counter

import pytest
from aiohttp import web

from tests.chaos.load import Load

EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'
ERROR = b'{"error": {"message": "gone", "code": "engine_dead"}}'


async def whole(response, request):
    await response.write(EVENT + b"data: [DONE]\n\n")


async def failing(response, request):
    await response.write(EVENT + b"data: " + ERROR + b"\n\n")


async def ending_early(response, request):
    await response.write(EVENT)


async def breaking(response, request):
    await response.write(EVENT)
    request.transport.abort()


@pytest.fixture
async def start():
    """Serve one way of ending a stream; None answers 503."""
    runners = []

    async def start(end):
        async def answer(request):
            if end is None:
                return web.Response(status=503, body=ERROR)
            response = web.StreamResponse()
            await response.prepare(request)
            await end(response, request)
            return response

        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


async def loaded(url):
    """Load a service for a third of a second, beside this loop."""
    load = Load(url, "m", per_s=20, tokens=4)

    def run():
        with load:
            time.sleep(0.3)

    await asyncio.to_thread(run)
    return load.answers


@pytest.mark.parametrize(
    ("end", "kind", "code"),
    [
        (whole, "ok", ""),
        (failing, "error event", "engine_dead"),
        (ending_early, "cut", ""),
        (breaking, "cut", ""),
        (None, "http 503", "engine_dead"),
    ],
)
async def test_counter_names_every_end_of_a_stream(start, end, kind, code):
    """Each request is counted once, with the way it ended and the error's code."""
    answers = await loaded(await start(end))
    ends = Counter((answer.kind, answer.code) for answer in answers)
    assert list(ends) == [(kind, code)]
    assert 4 <= ends[kind, code] <= 8
    assert all(answer.began < answer.ended for answer in answers)


async def test_counter_says_refused_where_nobody_listens():
    """A service that is away is distinguished from one that fails."""
    answers = await loaded("http://127.0.0.1:1")
    assert {answer.kind for answer in answers} == {"refused"}
