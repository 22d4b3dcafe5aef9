"""The demo model by `backend: vllm`: official client, rollouts between the engines, a lost core."""

import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from scripts.local_hub import Behaviour, LocalHub, Repo
from tests.access.cases import ADAPTER_CONFIG
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import QUESTION, REPO, SERVING, Service, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]
VLLM = {"backend": "vllm", "vllm": {"enforce_eager": True}}
START_S = 240
ADAPTER = "acme/shout"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def service(demo_model_dir, tmp_path_factory):
    """A gated demo model, served by the builtin engine at first."""
    files = {path.name: path for path in demo_model_dir.iterdir()}
    adapter = Repo(ADAPTER, demo_adapter(demo_model_dir), gated="manual")
    with LocalHub([Repo(REPO, files, gated="manual"), adapter]) as hub:
        tokens = {name: hub.issue_token(Behaviour.granted, account=name) for name in ("a", "b")}
        nodes = [LogicalNode(name, token, SERVING, num_gpus=0) for name, token in tokens.items()]
        cache = {"HF_HOME": str(tmp_path_factory.mktemp("cache"))}
        with cluster_of(*nodes, env=cache) as running:
            service = Service(hub, running, tokens)
            service.deploy(replicas=1)
            yield service


def demo_adapter(model_dir):
    """Return the files of a LoRA adapter for the demo model that changes what it says."""
    import torch
    from safetensors.torch import save

    config = json.loads((model_dir / "config.json").read_text())
    size, tensors = config["hidden_size"], {}
    torch.manual_seed(1)
    for layer in range(config["num_hidden_layers"]):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = torch.randn(8, size) * 0.1
        tensors[f"{module}.lora_B.weight"] = torch.randn(size, 8) * 0.1
    return {
        "adapter_config.json": json.dumps(ADAPTER_CONFIG).encode(),
        "adapter_model.safetensors": save(tensors),
    }


def deploy(service, adapters=(), **engine):
    """Roll over to another engine and wait until it alone is left."""
    before = len(service.logged("replica.started"))
    service.put(replicas=1, engine=engine, adapters=adapters)
    deadline = time.monotonic() + START_S
    while len(service.logged("replica.started")) == before:
        assert time.monotonic() < deadline, service.replicas()
        time.sleep(0.5)
    service.wait("RUNNING", timeout_s=60)
    while len(replicas := service.replicas()) > 1:
        assert time.monotonic() < deadline, replicas
        time.sleep(0.5)


def cores():
    """Return vLLM's core processes on this machine that belong to this user's session."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if "VLLM::Engine" in path.read_text():
                found.add(int(path.parent.name))
        except OSError:  # gone meanwhile
            continue
    return found


def test_rollout_to_vllm_fails_no_request(service):
    """The builtin engine answers until vLLM does."""
    with service.under_load() as answered:
        deploy(service, **VLLM)
        count = len(answered)
        while len(answered) < count + 5:
            time.sleep(0.1)
    assert set(answered) == {200}
    (loaded, *_) = [e for e in service.logged("model.loaded") if e.get("attention") == "vllm"]
    assert loaded["dtype"] == "bfloat16"
    assert loaded["kv_tokens"] > 512
    assert not any(entry.authorization_leaked for entry in service.hub.log)


def test_official_client_gets_from_vllm_what_it_asks_for(service):
    """Chat, stream, logprobs, a schema, a tool, several answers; and a refusal."""
    with service.client() as client:
        chat = client.chat.completions
        ask = {"model": "smol", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
        answer = chat.create(**ask, logprobs=True, top_logprobs=3)
        assert "Paris" in answer.choices[0].message.content
        assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
        assert all(len(each.top_logprobs) == 3 for each in answer.choices[0].logprobs.content)
        streamed = list(chat.create(**ask, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in streamed if c.choices)
        assert text == answer.choices[0].message.content
        assert streamed[-1].usage.completion_tokens == answer.usage.completion_tokens
        form = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
        }
        shaped = chat.create(**ask | {"max_tokens": 60}, response_format=form)
        assert json.loads(shaped.choices[0].message.content).keys() == {"city", "big"}
        called = chat.create(**ask | {"max_tokens": 80}, tools=[TOOL], tool_choice="required")
        (call,) = called.choices[0].message.tool_calls
        assert json.loads(call.function.arguments).keys() == {"city"}
        assert len(chat.create(**ask | {"temperature": 1, "seed": 4}, n=3).choices) == 3
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
        import openai

        with pytest.raises(openai.BadRequestError):
            chat.create(**ask, response_format=bad)


def test_adapter_is_gated_fetched_and_served(service):
    """Refused, it blocks and the model answers on; granted, it is a model beside its base."""
    adapters = [{"name": "shout", "repo_id": ADAPTER}]
    before = service.builds()
    service.hub.set_behaviour(service.tokens["b"], Behaviour.never_asked, repo_id=ADAPTER)
    with service.under_load() as answered:
        service.put(replicas=1, engine=VLLM, adapters=adapters)
        message = service.wait_for_build(before, "DEPLOY_FAILED", timeout_s=60).message
        assert message.count("license_not_accepted") == 2  # the row, and why
        assert ADAPTER in message.partition("Access granted")[0]
        assert REPO in message.partition("Access granted")[2]
        service.hub.set_behaviour(service.tokens["b"], Behaviour.granted, repo_id=ADAPTER)
        deploy(service, adapters=[adapters[0] | {"revision": "main"}], **VLLM)
    assert set(answered) == {200}
    (shown,) = httpx.get(f"{service.url}/access").json()["adapters"].values()
    assert (shown["repo_id"], shown["approved"]) == (ADAPTER, True)
    with service.client() as client:
        cards = {card.id: card for card in client.models.list().data}
        assert cards["shout"].parent == "smol"
        ask = {"messages": QUESTION, "temperature": 0, "max_tokens": 16}
        said = {
            name: client.chat.completions.create(model=name, **ask).choices[0].message.content
            for name in ("smol", "shout")
        }
    assert "Paris" in said["smol"]
    assert said["shout"] != said["smol"]


def test_core_lost_costs_one_replica(service):
    """The health check fails, Serve replaces the replica, the next one answers."""
    until(lambda: len(cores()) == 1, 60)  # that of the version before ends with its replica
    (core,) = cores()
    os.kill(core, signal.SIGKILL)
    deadline = time.monotonic() + START_S
    while not (new := cores() - {core}) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(new) == 1
    assert service.logged("engine.died")
    with service.client() as client:
        ask = {"model": "smol", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
        answer = client.chat.completions.create(**ask)
        assert "Paris" in answer.choices[0].message.content


def test_rollback_from_vllm_fails_no_request_and_leaves_no_process(service):
    """The builtin engine again; vLLM's processes end with their replica."""
    with service.under_load() as answered:
        deploy(service)
    assert set(answered) == {200}
    deadline = time.monotonic() + 60
    while cores() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not cores()
