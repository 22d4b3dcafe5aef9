"""The gate against a Hub that means ill: blocked, in time, in one sentence, without the token."""

import json
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from serve_app.access.hub import bounded_client, client
from serve_app.access.hub.probe import check_here
from serve_app.access.verdict import Outcome
from serve_app.checkpoint.runnable import Loader
from serve_app.config import AccessConfig, ModelConfig
from tests.access.cases import fake_token
from tests.conftest import safetensors
from tests.hostile import COMMIT, REPO, HostileHub, Page, entry

MODEL = ModelConfig(repo_id=REPO)
LOADER = Loader()
DEADLINE_S = 6.0
INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": safetensors({"weight": [64, 8]}),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(client, "_backoff", lambda _: 0.01)
    with HostileHub(dict(FILES)) as running:
        yield running


@pytest.fixture
def config(hub, tmp_path):
    (tmp_path / "token").write_text(fake_token())
    limits = {"timeout_s": 0.4, "deadline_s": DEADLINE_S}
    return AccessConfig(endpoint=hub.url, token_file=str(tmp_path / "token"), **limits)


def blocked(hub, config):
    began = time.monotonic()
    verdict = check_here(MODEL, config, loader=LOADER)
    assert time.monotonic() - began < DEADLINE_S
    assert verdict.outcome is not Outcome.GRANTED
    assert verdict.hub_message
    assert verdict.hub_message.isprintable()
    assert len(verdict.hub_message) <= 600
    assert Path(config.token_file).read_text() not in str(verdict)
    assert hub.tokens_elsewhere() == []
    return verdict


def test_probe_grants_honest_answers(hub, config):
    """The baseline."""
    assert check_here(MODEL, config, loader=LOADER).outcome is Outcome.GRANTED


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a//b", "x\0", "\ud800", "", ".", "a/"])
def test_probe_blocks_a_description_with_names_that_lead_out(hub, config, name):
    """Not one that a Hub gives."""
    hub.listing.append(entry(name))
    assert blocked(hub, config).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("part", ["/revision/", "config.json", INDEX])
@pytest.mark.parametrize(
    "page",
    [
        Page(b'{"a":' * 60_000),
        Page(b"[" * 200_000),
        Page(b"9" * 20_000),
        Page(b"\0" * 100),
        Page(b"null"),
        Page(b"[]"),
        Page(b""),
        Page(b"{" + b" " * 65_535, is_endless=True),
        Page(b" " * 200, drip_s=0.1),
        Page(b" " * 200, headers_drip_s=0.1),
        Page(b"\x1f\x8b", headers={"content-encoding": "gzip"}),
    ],
    ids=["deep", "deeper", "long number", "binary", "null", "list", "empty", "endless", "drip",
         "drip of headers", "packed"],
)  # fmt: skip
def test_probe_bounds_what_it_reads_whole(hub, config, part, page):
    """In bytes, in time, in depth."""
    if part == INDEX:
        hub.files[INDEX] = b"{}"
        hub.listing = [entry(name) for name in ("config.json", "tokenizer.json", INDEX)]
    hub.pages[part] = page
    blocked(hub, config)
    assert hub.sent_bytes < 200 << 20  # four tries of an index at the most


@pytest.mark.parametrize("named", ["../../x.safetensors", "/x.safetensors", "x\0.safetensors", 7])
def test_probe_asks_nothing_of_an_index_that_leads_out(hub, config, named):
    """Nothing is asked for under such a name."""
    index = {"metadata": {}, "weight_map": {"a": named}}
    hub.files[INDEX] = json.dumps(index).encode()
    hub.listing = [entry(name) for name in ("config.json", "tokenizer.json", INDEX)]
    assert blocked(hub, config).outcome is Outcome.WEIGHTS_MISSING
    assert not any("x.safetensors" in seen.path for seen in hub.seen)


@pytest.mark.parametrize("part", ["/revision/", "config.json", "model.safetensors", "whoami"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_probe_takes_the_token_along_no_redirect(hub, config, part, status):
    """Wherever in the chain of questions."""
    answer = hub.answer

    def sent_away(path):
        if part in path and str(hub.seen[-1].port) in hub.url:
            return Page(b"", status, {"location": hub.elsewhere + path, "x-repo-commit": COMMIT})
        return answer(path)

    hub.answer = sent_away
    if part == "whoami":
        hub.pages["config.json"] = Page(b"no", 401)
    check_here(MODEL, config, loader=LOADER)
    assert hub.tokens_elsewhere() == []


@pytest.mark.parametrize(
    "headers",
    [
        {"x-xet-cas-url": "http://mirror.example", "x-xet-access-token": "k"},
        {"x-xet-cas-url": "file:///etc", "x-xet-access-token": "k"},
        {"x-xet-cas-url": "https://u:p@h", "x-xet-access-token": "k"},
        {"x-xet-cas-url": "", "x-xet-access-token": "k"},
        {"x-xet-cas-url": "http://[", "x-xet-access-token": "k"},
        {"x-xet-cas-url": "{elsewhere}", "x-xet-access-token": ""},
        {"x-xet-cas-url": "{elsewhere}"},
    ],
    ids=str,
)
def test_probe_does_not_ask_a_store_that_is_none(hub, config, headers):
    """Nor over plain http, which the key would travel on."""
    key = {name: value.format(elsewhere=hub.elsewhere) for name, value in headers.items()}
    hub.pages["xet-read-token"] = Page(b"{}", headers=key)
    weights = {"x-repo-commit": COMMIT, "x-xet-hash": "a" * 64, "link": '<x>; rel="xet-auth"'}
    hub.pages["model.safetensors"] = Page(b"", 302, {**weights, "location": hub.elsewhere})
    blocked(hub, config)


def test_probe_gives_the_store_its_own_key_and_not_the_token(hub, config):
    """Whatever origin the Hub names."""
    key = {"x-xet-cas-url": hub.elsewhere, "x-xet-access-token": "key-of-the-store"}
    hub.pages["xet-read-token"] = Page(b"{}", headers=key)
    weights = {"x-repo-commit": COMMIT, "x-xet-hash": "a" * 64, "link": '<x>; rel="xet-auth"'}
    hub.pages["model.safetensors"] = Page(b"", 302, {**weights, "location": hub.elsewhere})
    plan = {
        "terms": [{"hash": "h"}],
        "xorbs": {"h": [{"url": f"{hub.elsewhere}/chunks",
                         "ranges": [{"bytes": {"start": 0, "end": 9}}]}]},
    }  # fmt: skip
    hub.pages["/v2/reconstructions/"] = Page(json.dumps(plan).encode())
    hub.pages["/chunks"] = Page(b"0123456789")
    assert check_here(MODEL, config, loader=LOADER).outcome is Outcome.GRANTED
    assert set(hub.tokens_elsewhere()) == {"Bearer key-of-the-store"}
    assert [seen.path for seen in hub.seen if "chunks" in seen.path and seen.authorization] == []


def test_bounded_client_cuts_headers_that_drip(hub):
    """Each byte comes within the client's own limit of a read."""
    hub.pages["/x"] = Page(b"", headers_drip_s=0.1)
    began = time.monotonic()
    asking = bounded_client.BoundedClient(lambda _: {})
    with (
        pytest.raises(bounded_client.ERRORS, match="too slowly"),
        asking.stream("GET", f"{hub.url}/x", timeout_s=0.6),
    ):
        pass
    assert 0.5 < time.monotonic() - began < 3
