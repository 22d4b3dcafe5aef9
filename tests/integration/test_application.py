"""The whole application on two logical nodes: gate, replicas, streams, a blocked rollout."""

import asyncio
import json
import re
import shutil
import time

import httpx
import openai
import pytest

from scripts.local_hub import Behaviour, LocalHub, Repo
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import QUESTION, REPO, SERVING, Service
from tests.prometheus import prometheus, without_data

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def service(demo_model_dir, tmp_path_factory):
    files = {path.name: path for path in demo_model_dir.iterdir()}
    repo = Repo(REPO, files | {"LICENSE": b"A LICENSE\n\nBe kind.\n"}, gated="manual")
    with LocalHub([repo]) as hub:
        tokens = {name: hub.issue_token(Behaviour.granted, account=name) for name in ("a", "b")}
        nodes = [LogicalNode(name, token, SERVING, num_gpus=0) for name, token in tokens.items()]
        cache = {"HF_HOME": str(tmp_path_factory.mktemp("cache"))}
        with cluster_of(*nodes, env=cache) as running:
            service = Service(hub, running, tokens)
            service.put()
            status = service.wait("RUNNING", "DEPLOY_FAILED")
            assert status.status == "RUNNING", status.message
            yield service


def weights_sent(hub):
    return [entry for entry in hub.log if entry.origin != "hub" and entry.bytes_sent > 9]


def test_weights_are_sent_once_to_a_node_however_many_replicas(service):
    """Both replicas share this machine's cache: the weights were sent a single time."""
    assert len(weights_sent(service.hub)) == 1
    assert not any(entry.authorization_leaked for entry in service.hub.log)


def test_tokenize_and_detokenize(service):
    """A replica's tokenizer answers, and reports the window that the replica really has."""
    ask = {"model": "smol", "prompt": "The capital of France"}
    tokens = httpx.post(f"{service.url}/tokenize", json=ask).json()
    assert tokens["count"] == len(tokens["tokens"]) > 2
    assert tokens["max_model_len"] == 512
    back = httpx.post(f"{service.url}/detokenize", json={"tokens": tokens["tokens"]})
    assert back.json() == {"prompt": "The capital of France"}


async def test_streams_of_sixteen_clients_end_once_and_reach_both_replicas(service):
    """Every stream has one finish, its usage and its end; both replicas took part."""

    async def stream(client, number):
        messages = [{"role": "user", "content": f"Count from {number} to {number + 5}."}]
        events = await client.chat.completions.create(
            model="smol",
            messages=messages,
            stream=True,
            max_tokens=24,
            temperature=0,
            stream_options={"include_usage": True},
        )
        finishes, usages, ids = [], [], set()
        async for event in events:
            ids.add(event.id)
            usages += [event.usage] if event.usage else []
            finishes += [choice.finish_reason for choice in event.choices if choice.finish_reason]
        return finishes, usages, ids

    async with service.client(openai.AsyncOpenAI) as client:
        results = await asyncio.gather(*(stream(client, number) for number in range(16)))
    for finishes, usages, ids in results:
        assert finishes in (["stop"], ["length"])
        assert [usage.completion_tokens <= 24 for usage in usages] == [True]
        assert len(ids) == 1
    assert len(busy_replicas(service)) == 2
    shown = await everywhere_alike(service, at_least=16)
    assert shown["generation_tokens"] >= 16
    assert {replica["state"] for replica in shown["replicas"]} == {"RUNNING"}


async def everywhere_alike(service, at_least):
    """Wait until both ingresses show what Ray has exported, at most five seconds ago."""
    deadline = time.monotonic() + 30
    async with httpx.AsyncClient(timeout=10) as asker:
        while time.monotonic() < deadline:
            shown = [(await asker.get(f"{service.url}/status")).json() for _ in range(12)]
            finished = {status["requests"]["finished"] for status in shown}
            if len(finished) == 1 and min(finished) >= at_least:
                return shown[0]
            await asyncio.sleep(0.5)
    pytest.fail("it depends on which ingress is asked")


def busy_replicas(service):
    """Names of the LLM replicas whose request counter moved, which Ray pushes each second here."""
    pattern = (
        r'ray_serve_deployment_request_counter_total\{[^}]*deployment="LLMServer"[^}]*\} ([0-9.]+)'
    )
    deadline = time.monotonic() + 40
    while True:
        lines = [m for m in re.finditer(pattern, service.metrics()) if float(m[1]) > 0]
        names = {re.search(r'replica="([^"]+)"', m[0])[1] for m in lines}
        if len(names) >= 2 or time.monotonic() > deadline:
            return names
        time.sleep(1)


def test_chat_through_the_official_client(service):
    """A sensible answer, whole and streamed alike."""
    with service.client() as client:
        whole = client.chat.completions.create(
            model="smol", messages=QUESTION, temperature=0, max_tokens=32
        )
        events = client.chat.completions.create(
            model="smol", messages=QUESTION, temperature=0, max_tokens=32, stream=True
        )
        streamed = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert "Paris" in whole.choices[0].message.content
    assert streamed == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"


def test_errors_cross_the_cluster_as_the_clients_classes(service):
    """A replica's refusal is a 400 with a message for the client and no traceback."""
    with service.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="smol", messages=[{"role": "user", "content": "word " * 600}]
            )
        assert caught.value.code == "context_length_exceeded"
        assert "512" in caught.value.message
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=QUESTION)


def test_request_id_is_one_in_an_answer(service):
    """Serve's id and ours are the same, and stand in one header."""
    own = httpx.get(f"{service.url}/v1/models")
    assert len(own.headers.get_list("x-request-id")) == 1
    given = httpx.get(f"{service.url}/v1/models", headers={"x-request-id": "abc-1"})
    assert given.headers.get_list("x-request-id") == ["abc-1"]


def test_pages_report_readiness_version_and_grants(service):
    """The probes of a load balancer and of a person."""
    assert httpx.get(f"{service.url}/health").status_code == 200
    assert httpx.get(f"{service.url}/ready").status_code == 200
    commit = service.hub.commits()[REPO]["main"]
    assert httpx.get(f"{service.url}/version").json()["commit"] == commit
    shown = httpx.get(f"{service.url}/access").json()
    assert {node["node_name"]: node["outcome"] for node in shown["nodes"]} == {
        "a": "granted",
        "b": "granted",
    }
    assert shown["commit"] == commit
    text = httpx.get(f"{service.url}/status").json()["license"]
    assert (text["title"], text["commit"], len(text["sha256"])) == ("A LICENSE", commit, 64)


def panels_all_have_data_in_prometheus(service, tmp_path):
    """Under load each expression of the dashboard has data, and every alert can be judged.

    Some gauges of Ray Serve are exported once in 10 s, which Prometheus sees for one scrape.
    """
    with prometheus(service.url, tmp_path) as address:
        begun = time.time()
        with service.under_load(clients=2, tokens=16):
            while True:
                assert httpx.post(f"{service.url}/v1/completions", json={}).status_code == 400
                missing = without_data(address, begun)
                if not missing or time.time() > begun + 60:
                    break
                time.sleep(0.5)
    assert missing == {}


if shutil.which("prometheus"):  # one more test where there is one; it is not counted elsewhere
    test_panels_all_have_data_in_prometheus = panels_all_have_data_in_prometheus


def test_rollout_blocked_leaves_the_old_version_serving(service):
    """One red node: the table in the status, one build, no bytes, and every request answered."""
    service.hub.set_behaviour(service.tokens["b"], Behaviour.pending)
    service.hub.clear_log()
    before = service.builds()
    with service.under_load() as answered:
        began = time.monotonic()
        service.put(served_name="second")
        status = service.wait("DEPLOY_FAILED", timeout_s=30)
        took = time.monotonic() - began
        count = len(answered)
        time.sleep(1)
        shown = httpx.get(f"{service.url}/status", timeout=10).json()
    service.hub.set_behaviour(service.tokens["b"], Behaviour.granted)

    assert "Access BLOCKED: 1 of 2 nodes cannot read" in status.message
    assert re.search(r"^  b +request_pending +env:HF_TOKEN [0-9a-f]{8} +b$", status.message, re.M)
    assert "is awaiting a review from the repo authors" in " ".join(status.message.split())
    assert f"Link: {service.hub.url}/settings/gated-repos" in status.message
    assert "Traceback" not in status.message
    assert not any(line != line.rstrip() for line in status.message.splitlines())
    assert weights_sent(service.hub) == []
    assert service.builds() == before + 1
    assert len(answered) > count > 0
    assert set(answered) == {200}
    assert took < 30
    # Serve itself names no deployment now; the page does.
    found = sorted((each["node"], each["state"]) for each in shown["replicas"])
    assert found == [("a", "RUNNING"), ("b", "RUNNING")]
    assert shown["requests"]["finished"] >= len(answered)


def test_config_fault_is_reported_in_the_status_without_a_traceback(service):
    """A misspelt key ends the one build with its correction."""
    service.put(served_name="third", access={"tokenfile": "x"})
    status = service.wait("DEPLOY_FAILED", timeout_s=30)
    assert "args.access.tokenfile: unknown key; did you mean token_file?" in status.message
    assert "Traceback" not in status.message


def test_logs_are_json_with_facts_and_one_line_for_each_request(service):
    """The ingress writes `request.finished` with numbers and without prompts."""
    with service.client() as client:
        client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": "xyzzy plugh"}],
            max_tokens=3,
            extra_headers={"x-request-id": "log-test-1"},
        )
    deadline = time.monotonic() + 15
    while not (lines := logged(service, "log-test-1")) and time.monotonic() < deadline:
        time.sleep(0.2)
    (line,) = lines
    assert line["event"] == "request.finished"
    assert (line["status"], line["completion_tokens"]) == (200, 3)
    assert line["duration_s"] >= line["ttft_s"] > 0
    text = "".join(path.read_text(errors="replace") for path in (service.logs / "serve").iterdir())
    assert "xyzzy" not in text


def logged(service, request_id):
    return [
        json.loads(line)
        for path in (service.logs / "serve").glob("replica_llm_Ingress_*.log")
        for line in path.read_text().splitlines()
        if f'"{request_id}"' in line
    ]


async def test_replica_killed_costs_its_own_streams_alone(service):
    """Those end with an error that says to ask again; all others, old and new, are whole."""
    streaming = []

    async def stream(client):
        events = await client.completions.create(
            model="smol",
            prompt="Once",
            max_tokens=200,
            extra_body={"ignore_eos": True},
            stream=True,
        )
        streaming.append(events)
        try:
            return [event.choices[0].finish_reason async for event in events][-1]
        except openai.APIError as error:
            return error.code

    async with service.client(openai.AsyncOpenAI) as client:
        streams = [asyncio.create_task(stream(client)) for _ in range(8)]
        while len(streaming) < 8:  # each has its first token, so none can begin again elsewhere
            await asyncio.sleep(0.05)
        lost = await asyncio.to_thread(kill_one_replica)
        new = await asyncio.gather(*(stream(client) for _ in range(2)))
        ends = await asyncio.gather(*streams)
    assert 0 < lost < 8
    assert (ends.count("engine_dead"), ends.count("length")) == (lost, 8 - lost)
    assert new == ["length", "length"]


def kill_one_replica():
    """Let a replica die without a word; returns how many streams it had."""
    import ray
    from ray.serve._private.constants import SERVE_NAMESPACE

    names = ray.util.list_named_actors(all_namespaces=True)
    name = next(actor["name"] for actor in names if "#LLMServer#" in actor["name"])
    replica = ray.get_actor(name, namespace=SERVE_NAMESPACE)
    streams = ray.get(replica.get_num_ongoing_requests.remote(), timeout=10)
    ray.kill(replica)
    return streams
