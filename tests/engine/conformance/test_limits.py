"""Limits, cancelling, draining and death: engines of their own, since each is broken or ended."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from serve_app.errors import EngineDead, EngineError, Overloaded
from serve_app.protocol import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    Priority,
    SamplingParams,
    Structure,
    TokenPrompt,
)
from tests.engine.conformance.conftest import load_backend
from tests.engine.conftest import GREEDY, collect, drained, run
from tests.models import make_model, make_tokenizer

PROMPT = list(range(10, 30))
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture
def small(kind, directory):
    """An engine that runs two requests and lets three wait."""
    engine = load_backend(directory, kind, max_running_requests=2, queued=3, queued_tokens=2000)
    with closing(engine):
        yield engine


async def begun(engine, request_id="r"):
    stream = engine.generate(GenerationRequest(request_id, TokenPrompt(tuple(PROMPT)), LONG))
    await anext(stream)
    return stream


async def test_engine_of_a_replica_from_load_to_close(small):
    """Report, cancel, overload with a time, drain, death: one engine, in this order."""
    report = small.load_report
    assert report.device == "cpu"
    assert report.dtype == "float32"
    assert report.weights_bytes > 0
    assert report.kv_tokens == small.stats().kv_tokens_total > 512
    assert report.total_s > 0
    small.prepare_grammars()

    for _ in range(2):
        await run(small, PROMPT)
    stream = await begun(small)
    assert (small.stats().running, small.stats().running_tokens) == (1, 420)
    before = small.stats().generation_tokens
    await stream.aclose()
    stats = await drained(small, 20.0)
    assert stats.kv_tokens_used == 0
    await asyncio.sleep(0.5)
    assert small.stats().generation_tokens - before < 300
    assert small.stats().running_tokens + small.stats().waiting_tokens == 0

    running = [await begun(small, f"r{i}") for i in range(2)]
    waiting = [asyncio.create_task(run(small, PROMPT)) for _ in range(3)]
    deadline = time.monotonic() + 20
    while small.stats().waiting < 3:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    with pytest.raises(Overloaded, match="3 waiting") as caught:
        await run(small, PROMPT)
    assert caught.value.details["retry_after_s"] >= 1
    for stream in running:
        await stream.aclose()
    for task in waiting:  # drained
        assert (await task)[1]
    assert (await drained(small, 20.0)).waiting == 0
    await a_higher_class_goes_first(small)

    for stream in [await begun(small)]:
        await asyncio.to_thread(small.close)
        with pytest.raises(EngineError):
            async for _ in stream:
                pass
    small.close()
    assert not await small.ready()
    with pytest.raises(EngineDead):
        small.check()
    with pytest.raises(EngineDead):
        await run(small, PROMPT)


async def a_higher_class_goes_first(engine):
    """In the line; the one that came first is of the lowest class and ends last."""
    running, ended = [await begun(engine, f"r{i}") for i in range(2)], []

    async def ask(priority):
        prompt = TokenPrompt(tuple(PROMPT))
        request = GenerationRequest(priority.name, prompt, GREEDY, priority=priority)
        await collect(engine, request)
        ended.append(priority)

    waiting = []
    for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH):
        waiting.append(asyncio.create_task(ask(priority)))
        async with asyncio.timeout(20):
            while engine.stats().waiting < len(waiting) and not ended:
                await asyncio.sleep(0.001)
    for stream in running:
        await stream.aclose()
    await asyncio.gather(*waiting)
    assert len(ended) == 3
    assert ended[-1] is Priority.LOW


def core_processes() -> set[int]:
    """Return the processes of vLLM's below this one."""
    found, left = set(), [os.getpid()]
    while left:
        for task in Path(f"/proc/{left.pop()}/task").iterdir():
            below = [int(child) for child in (task / "children").read_text().split()]
            left += below
            found.update(pid for pid in below if "VLLM" in Path(f"/proc/{pid}/comm").read_text())
    return found


@pytest.mark.vllm
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
async def test_engine_ends_when_a_process_of_vllms_is_lost(directory, busy):
    """Open requests fail once, health fails, nothing hangs: the replica is replaced."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    others = core_processes()
    with closing(load_backend(directory, "vllm", max_running_requests=2)) as engine:
        pid = min(core_processes() - others)
        tasks = [asyncio.create_task(run(engine, PROMPT, LONG)) for _ in range(3)]
        if busy:
            while not engine.stats().running:
                await asyncio.sleep(0.005)
        else:
            await asyncio.gather(*tasks)
        with capture_logs() as logs:
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while await engine.ready():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            with pytest.raises(EngineDead):
                engine.check()
            results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
            await asyncio.sleep(1.0)
        if busy:
            assert {type(result) for result in results} == {EngineDead}
        assert [entry["event"] for entry in logs].count("engine.died") == 1


HOLDS = """
import sys, time
from pathlib import Path
from tests.engine.conformance.conftest import load_backend
if __name__ == "__main__":
    engine = load_backend(Path(sys.argv[1]), "vllm")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.vllm
def test_engine_killed_leaves_none_of_vllms_processes(directory, tmp_path):
    """Nobody tells vLLM then; its memory would be lost to the next replica."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    program = tmp_path / "holds.py"
    program.write_text(HOLDS)
    command = [sys.executable, str(program), str(directory)]
    path = {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | path) as replica:
        assert b"ready\n" in iter(replica.stdout.readline, b"")  # others log there, too
        lost = core_processes()
        assert len(lost) >= 2
        replica.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in lost):
        assert time.monotonic() < deadline
        time.sleep(0.1)


async def test_structure_begins_behind_the_thoughts(kind, tmp_path):
    """Where the prompt has opened them; they are free, the answer is not."""
    directory = make_model(tmp_path / "thinks", hidden_size=128, head_dim=32)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    tokenizer.save_pretrained(directory)
    close = tokenizer.convert_tokens_to_ids("</think>")
    with closing(load_backend(directory, kind, reasoning="think")) as engine:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=40,
            logit_bias=((close, 8.0),),
            structure=Structure("choice", '["yes", "no"]'),
        )
        chat = ChatPrompt(({"role": "user", "content": "Hello"},))
        deltas = [d async for d in engine.generate(GenerationRequest("r", chat, sampling))]
        assert close in [token for delta in deltas for token in delta.token_ids]
        assert "".join(delta.text for delta in deltas) in ("yes", "no")
        assert deltas[-1].finish_reason is FinishReason.STOP


async def test_logprobs_of_forced_tokens_are_finite(kind, directory):
    """Under a structure vLLM's come after the mask, ours before it; JSON can say both."""
    with closing(load_backend(directory, kind)) as engine:
        structure = Structure("choice", '["yes"]')
        sampling = SamplingParams(temperature=0, max_tokens=9, logprobs=3, structure=structure)
        request = GenerationRequest("r", TokenPrompt(tuple(PROMPT)), sampling)
        deltas = [delta async for delta in engine.generate(request)]
        scores = [score for delta in deltas for score in delta.logprobs]
        assert all(-9999 <= top.logprob <= 0 for score in scores for top in score.top)
        if kind == "vllm":
            assert scores[0].chosen.logprob == 0
            assert scores[0].top[-1].logprob == -9999
        else:
            assert scores[0].chosen.logprob < 0
