"""Adapters are gated like their model: proven on every node, and one refusal blocks the rollout."""

import threading
import time

import pytest
from huggingface_hub import constants

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access import preflight
from serve_app.access.node_check import ADAPTER_LOADER, prove_here
from serve_app.access.preflight import check_this_machine
from serve_app.access.verdict import Outcome, Verdict
from serve_app.checkpoint.runnable import Loader
from serve_app.config import AppConfig, ModelConfig
from serve_app.weights.fetch import fetch
from tests.access.cases import (
    ADAPTER_REPO,
    COMMIT,
    access,
    adapter_files,
    granted,
    single_files,
)
from tests.conftest import TINY_REPO

ADAPTER = ModelConfig(repo_id=ADAPTER_REPO)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A cache of the test's own, and no token of this process."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub():
    with LocalHub([Repo(TINY_REPO, single_files()), Repo(ADAPTER_REPO, adapter_files())]) as hub:
        yield hub


def whole(hub, tmp_path, token):
    adapters = [{"name": "legal", "repo_id": ADAPTER_REPO}]
    return AppConfig.model_validate(
        {
            "model": {"repo_id": TINY_REPO, "adapters": adapters},
            "access": access(hub, tmp_path, token).model_dump(),
            "engine": {"backend": "vllm"},
            "replica": {"num_gpus": 0},
        }
    )


def test_check_grants_base_and_adapter(hub, tmp_path):
    """Each with a commit of its own, in five requests at the most."""
    verdict = check_this_machine(whole(hub, tmp_path, hub.issue_token()))
    assert verdict.approved
    assert verdict.commits == {
        "": hub.commits()[TINY_REPO]["main"],
        "legal": hub.commits()[ADAPTER_REPO]["main"],
    }
    assert all(part.hub_requests <= 5 for part in verdict.parts)
    assert set(verdict.to_json()["adapters"]) == {"legal"}


def test_check_blocks_for_a_refused_adapter_and_names_both(hub, tmp_path):
    """What blocks comes first; the base, which is granted, is there too."""
    token = hub.issue_token()
    hub.set_behaviour(token, Behaviour.never_asked, repo_id=ADAPTER_REPO)
    verdict = check_this_machine(whole(hub, tmp_path, token))
    assert (verdict.approved, verdict.exit_code) == (False, 3)
    blocked, granted = verdict.table().split("\n\nAccess granted")
    assert blocked.startswith(f"Access BLOCKED: 1 of 1 node cannot read {ADAPTER_REPO} (main")
    assert f"/{ADAPTER_REPO}" in blocked
    assert TINY_REPO in granted
    assert ADAPTER_REPO not in granted
    html = verdict._repr_html_()
    assert html.index(ADAPTER_REPO) < html.index(TINY_REPO)


def test_check_blocks_for_a_refused_base_although_the_adapter_is_granted(hub, tmp_path):
    """And does not know whether it may, where nobody refused."""
    token = hub.issue_token()
    hub.set_behaviour(token, Behaviour.pending, repo_id=TINY_REPO)
    assert check_this_machine(whole(hub, tmp_path, token)).exit_code == 3
    hub.set_behaviour(token, Behaviour.granted, repo_id=TINY_REPO)
    hub.set_behaviour(token, Behaviour.server_error, repo_id=ADAPTER_REPO)
    assert check_this_machine(whole(hub, tmp_path, token)).exit_code == 4


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (single_files(), "no adapter_config.json"),
        (adapter_files(use_dora=True), "use_dora"),
        (adapter_files(peft_type="PROMPT_TUNING"), "no LoRA adapter"),
        (adapter_files() | {"model.safetensors": b"x" * 64}, "holds a whole model"),
        (
            {k: v for k, v in adapter_files().items() if "safetensors" not in k}
            | {"adapter_model.bin": b"pickle"},
            "can run code",
        ),
    ],
)
def test_probe_refuses_what_is_no_adapter_that_can_be_served(tmp_path, files, words):
    """Before a byte of weights, in one sentence."""
    with LocalHub([Repo(ADAPTER_REPO, files)]) as hub:
        config = access(hub, tmp_path, hub.issue_token())
        verdict = prove_here(ADAPTER, config, loader=ADAPTER_LOADER)
        assert verdict.outcome is Outcome.WEIGHTS_MISSING
        assert words in verdict.hub_message
        assert not any(entry.origin == "cdn" for entry in hub.log)


def test_probe_refuses_an_adapter_as_a_model(tmp_path):
    """Even one with a config.json, as some trainers leave it."""
    files = adapter_files() | {"config.json": single_files()["config.json"]}
    with LocalHub([Repo(ADAPTER_REPO, files)]) as hub:
        config = access(hub, tmp_path, hub.issue_token())
        verdict = prove_here(ADAPTER, config, loader=Loader())
        assert verdict.outcome is Outcome.WEIGHTS_MISSING
        assert "no model.safetensors and no index" in verdict.hub_message


def test_preflight_proves_some_adapters_at_once(monkeypatch):
    """On each node that is a process each; the deadline is one for all of them."""
    now, most, deadlines = 0, 0, set()
    lock = threading.Lock()

    def probe(model, _access, _places, _loader, _only, began):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            deadlines.add(began)
        time.sleep(0.01)
        with lock:
            now -= 1
        return Verdict(model.source, "main", COMMIT, "https://hub", 0.1, (granted(),))

    monkeypatch.setattr(preflight, "_probe", probe)
    adapters = [{"name": f"a{n}", "repo_id": f"acme/a{n}"} for n in range(40)]
    model = {"repo_id": TINY_REPO, "adapters": adapters}
    config = AppConfig.model_validate({"model": model, "engine": {"backend": "vllm"}})
    verdict = preflight.preflight(config, placements=[object()])
    assert verdict.approved
    assert len(verdict.parts) == 41
    assert most <= preflight.AT_ONCE + 1
    assert len(deadlines) == 1


def test_fetch_takes_an_adapter_like_a_model(hub, tmp_path):
    """Its config and its weights, verified; and by a receipt when the Hub is away."""
    token = hub.issue_token()
    config = access(hub, tmp_path, token, on_unreachable="allow_cached", timeout_s=1, deadline_s=3)
    proven = prove_here(ADAPTER, config, loader=ADAPTER_LOADER)
    directory = fetch(ADAPTER, config, proven.commit).directory
    names = {path.name for path in directory.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert fetch(ADAPTER, config, proven.commit).hub_bytes == 0
    hub.set_behaviour(token, Behaviour.server_error)
    again = prove_here(ADAPTER, config, commit=proven.commit, loader=ADAPTER_LOADER)
    assert again.outcome is Outcome.GRANTED
    assert again.receipt_age_s is not None
