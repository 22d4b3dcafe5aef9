"""The Hub's routes: existence, revisions, listings, redirects, renames; the real clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hypothesis import given
from hypothesis import strategies as st

from scripts.local_hub import Behaviour, LocalHub, Repo, Route
from scripts.local_hub.hub import Hub
from scripts.local_hub.signing import Signer
from scripts.local_hub.state import State
from scripts.local_hub.storage import Cdn
from scripts.local_hub.wire import Request
from tests.conftest import TINY_REPO, tiny_files

ROOT = Path(__file__).parents[2]
SHARD = "model-00001-of-00002.safetensors"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_model_info_is_public(hub: LocalHub):
    """Metadata has commit, gate and files to anybody, and proves no grant."""
    token = hub.issue_token(Behaviour.never_asked)
    for caller in (token, False):
        reported = HfApi(endpoint=hub.url, token=caller).model_info(TINY_REPO, files_metadata=True)
        assert reported.gated == "auto"
        assert reported.sha == hub.commits()[TINY_REPO]["main"]
        assert {file.rfilename for file in reported.siblings} == set(tiny_files())
        assert {file.lfs.sha256 for file in reported.siblings if file.lfs} == {"*" * 64}


@pytest.mark.parametrize("query", ["?expand=sha&expand=gated", "?securityStatus=true", "?x=y"])
def test_model_info_with_a_query(hub: LocalHub, query: str):
    """What clients add to the query is tolerated; `expand` chooses the fields."""
    reported = httpx.get(f"{hub.url}/api/models/{TINY_REPO}{query}").json()
    assert reported["sha"] == hub.commits()[TINY_REPO]["main"]
    assert ("siblings" in reported) == ("expand" not in query)


def test_revisions(hub: LocalHub):
    """A branch, a tag with a slash and a commit name a commit; others are not found."""
    first = hub.commits()[TINY_REPO]["main"]
    repo = Repo("acme/revisions", tiny_files(), revisions={"main": "a" * 40, "refs/pr/1": "b" * 40})
    hub.add_repo(repo)
    api = HfApi(endpoint=hub.url, token=hub.issue_token())
    found = [
        api.model_info("acme/revisions", revision=revision).sha
        for revision in ("main", "refs/pr/1", "b" * 40)
    ]
    assert found == ["a" * 40, "b" * 40, "b" * 40]
    with pytest.raises(RevisionNotFoundError):
        api.model_info("acme/revisions", revision=first)
    with pytest.raises(RevisionNotFoundError):
        list(api.list_repo_tree("acme/revisions", revision="v9"))


def test_push_moves_the_branch_and_keeps_the_commit():
    """New content is a new commit; the old one can still be read."""
    repo = Repo("acme/moving", {"config.json": b"1"})
    old = repo.sha
    with LocalHub([repo]) as hub:
        headers = bearer(hub.issue_token())
        new = repo.push({"config.json": b"22"})
        assert old != new == hub.commits()["acme/moving"]["main"]
        for revision, content in (("main", "22"), (new, "22"), (old, "1")):
            url = f"{hub.url}/acme/moving/resolve/{revision}/config.json"
            answer = httpx.get(url, headers=headers)
            assert answer.text == content
            assert answer.headers["x-repo-commit"] == (old if revision == old else new)


def test_gate_answers_before_existence(hub: LocalHub):
    """A revision or file that does not exist is hidden behind the gate, and named behind it."""
    url = f"{hub.url}/{TINY_REPO}/resolve"
    denied, granted = (
        bearer(hub.issue_token(behaviour)) for behaviour in (Behaviour.pending, Behaviour.granted)
    )
    for path in ("nope/config.json", "main/nope.json"):
        answer = httpx.get(f"{url}/{path}", headers=denied)
        assert (answer.status_code, answer.headers["x-error-code"]) == (403, "GatedRepo")
    codes = []
    for path in ("nope/config.json", "main/nope.json"):
        answer = httpx.get(f"{url}/{path}", headers=granted)
        codes.append((answer.status_code, answer.headers["x-error-code"]))
    assert codes == [(404, "RevisionNotFound"), (404, "EntryNotFound")]
    assert answer.headers["x-repo-commit"] == hub.commits()[TINY_REPO]["main"]


def test_missing_files_as_the_client_sees_them(hub: LocalHub, tmp_path):
    """huggingface_hub distinguishes a missing revision from a missing file."""
    place = {"endpoint": hub.url, "token": hub.issue_token(), "cache_dir": tmp_path}
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(TINY_REPO, "config.json", revision="nope", **place)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(TINY_REPO, "nope.json", **place)


def test_missing_repository(hub: LocalHub):
    """It is a bare 401 for strangers and RepoNotFound for an account."""
    for headers in ({}, bearer("hf_" + "z" * 34)):
        answer = httpx.get(f"{hub.url}/api/models/acme/nothing", headers=headers)
        assert answer.status_code == 401
        assert answer.json() == {"error": "Invalid username or password."}
        assert "x-error-code" not in answer.headers
    with pytest.raises(RepositoryNotFoundError) as missing:
        HfApi(endpoint=hub.url, token=hub.issue_token()).auth_check("acme/nothing")
    assert not isinstance(missing.value, GatedRepoError)
    assert missing.value.response.status_code == 404


def test_private_repository_is_missing_for_others(hub: LocalHub):
    """Who may not see it cannot distinguish it from one that does not exist."""
    hub.add_repo(Repo("acme/secret", tiny_files(), gated=False, readers=frozenset({"bob"})))
    HfApi(endpoint=hub.url, token=hub.issue_token(account="bob")).auth_check("acme/secret")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=hub.issue_token(account="eve")).auth_check("acme/secret")


def test_names_of_one_part(tmp_path):
    """A repository without an owner works on every route, public small files by way of a cache."""
    with LocalHub([Repo("gpt2", {"config.json": b"{}", "model.bin": b"w"}, gated=False)]) as hub:
        api = HfApi(endpoint=hub.url, token=False)
        assert api.model_info("gpt2").gated is False
        api.auth_check("gpt2")
        place = snapshot_download("gpt2", endpoint=hub.url, token=False, cache_dir=tmp_path)
        assert (Path(place) / "model.bin").read_bytes() == b"w"
        cached = [entry for entry in hub.log if entry.path.startswith("/api/resolve-cache/")]
        assert cached
        assert not any(entry.authorization_leaked for entry in hub.log)


def test_tree_folders_and_pages():
    """Listings go into folders, recursively or not, and page by Link headers."""
    files = {"a.json": b"1", "x/b.json": b"2", "x/y/c.json": b"3", "z/d.json": b"4"}
    with LocalHub([Repo("acme/deep", files)], page_size=3) as hub:
        api = HfApi(endpoint=hub.url, token=hub.issue_token())

        def listed(folder: str | None = None, *, recursive: bool = False) -> list[str]:
            tree = api.list_repo_tree("acme/deep", folder, recursive=recursive)
            return sorted(entry.path for entry in tree)

        assert listed() == ["a.json", "x", "z"]
        assert listed("x") == ["x/b.json", "x/y"]
        with pytest.raises(RemoteEntryNotFoundError):
            listed("nope")
        hub.clear_log()
        everything = ["a.json", "x", "x/b.json", "x/y", "x/y/c.json", "z", "z/d.json"]
        assert listed(recursive=True) == everything
        assert [entry.route for entry in hub.log] == [Route.tree] * 3


def test_weights_redirect(hub: LocalHub):
    """Weights are a 302 to the CDN that states size, hash and commit."""
    url = f"{hub.url}/{TINY_REPO}/resolve/main/{SHARD}"
    answer = httpx.head(url, headers=bearer(hub.issue_token()))
    size = len(tiny_files()[SHARD])
    assert answer.status_code == 302
    assert answer.headers["x-linked-size"] == str(size)
    assert len(answer.headers["x-linked-etag"].strip('"')) == 64
    assert answer.headers["x-repo-commit"] == hub.commits()[TINY_REPO]["main"]
    assert answer.headers["location"].startswith(f"{hub.cdn_url}/xet-bridge-us/")
    assert urlsplit(hub.cdn_url).port != urlsplit(hub.url).port
    assert "x-xet-hash" not in answer.headers


def test_small_file_is_answered_directly(hub: LocalHub):
    """A small gated file comes from the Hub with its Git object id as ETag, also in ranges."""
    url = f"{hub.url}/{TINY_REPO}/resolve/main/config.json"
    headers = bearer(hub.issue_token())
    content = tiny_files()["config.json"]
    whole, head = httpx.get(url, headers=headers), httpx.head(url, headers=headers)
    assert whole.content == content
    assert head.headers["content-length"] == str(len(content))
    assert len(whole.headers["etag"].strip('"')) == 40
    part = httpx.get(url, headers={**headers, "Range": "bytes=0-7"})
    assert (part.status_code, part.content) == (206, content[:8])
    assert part.headers["content-range"] == f"bytes 0-7/{len(content)}"


def test_rename(hub: LocalHub):
    """An old name answers 307 with a relative Location, which keeps the token."""
    hub.rename(TINY_REPO, "acme/tiny-2")
    token = hub.issue_token()
    url = f"{hub.url}/api/models/{TINY_REPO}/revision/main?blobs=true"
    answer = httpx.get(url, headers=bearer(token))
    assert answer.status_code == 307
    assert answer.headers["location"] == "/api/models/acme/tiny-2/revision/main?blobs=true"
    api = HfApi(endpoint=hub.url, token=token)
    assert api.model_info(TINY_REPO).id == "acme/tiny-2"
    api.auth_check(TINY_REPO)


def test_rename_to_another_origin(hub: LocalHub):
    """The redirect of a hostile Hub can be played; a client that follows loses its token."""
    hub.rename(TINY_REPO, "acme/tiny-2", origin=hub.cdn_url)
    headers = bearer(hub.issue_token())
    url = f"{hub.url}/api/models/{TINY_REPO}/auth-check"
    with httpx.Client(follow_redirects=True) as client:
        assert client.get(url, headers=headers).status_code == 403
    assert [(entry.origin, entry.token is None) for entry in hub.log] == [
        ("hub", False),
        ("cdn", True),
    ]
    location = httpx.get(url, headers=headers).headers["location"]
    httpx.get(location, headers=headers)
    assert hub.log[-1].authorization_leaked


def test_unknown_pages(hub: LocalHub):
    """A path that is no route is a 404, and the list of agents is empty."""
    for path in ("/", "/api/unknown", "/api/models", f"/{TINY_REPO}", f"/{TINY_REPO}/resolve"):
        assert httpx.get(hub.url + path).status_code in {401, 404}
    assert httpx.get(f"{hub.url}/api/agent-harnesses").json()["harnesses"] == {}


def test_snapshot_download(hub: LocalHub, tmp_path):
    """The unmodified client downloads every file, and the token never reaches the CDN."""
    token = hub.issue_token()
    place = snapshot_download(TINY_REPO, endpoint=hub.url, token=token, cache_dir=tmp_path)
    got = {path.name: path.read_bytes() for path in Path(place).iterdir()}
    assert got == tiny_files()
    weights = [entry for entry in hub.log if entry.origin == "cdn"]
    assert len(weights) == 2
    assert all(entry.token is None and not entry.authorization_leaked for entry in weights)
    sent = sum(entry.bytes_sent for entry in weights)
    assert sent == sum(len(got[name]) for name in got if name.endswith(".safetensors"))


def test_snapshot_download_refused_moves_no_weights(hub: LocalHub, tmp_path):
    """A refusal comes before any byte of the weights."""
    token = hub.issue_token(Behaviour.rejected)
    with pytest.raises(GatedRepoError):
        snapshot_download(TINY_REPO, endpoint=hub.url, token=token, cache_dir=tmp_path)
    assert not [entry for entry in hub.log if entry.origin == "cdn"]


CLIENT = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from huggingface_hub import whoami
repo = sys.argv[1]
tokenizer, config = AutoTokenizer.from_pretrained(repo), AutoConfig.from_pretrained(repo)
print(json.dumps({
    "account": whoami()["name"],
    "ids": tokenizer("Hello, world! 42")["input_ids"],
    "window": tokenizer.model_max_length,
    "hidden": config.hidden_size,
    "dtype": str(AutoModelForCausalLM.from_pretrained(repo, dtype="auto").dtype),
}))
"""


def test_transformers_loads_from_the_hub(demo_model_dir: Path, tmp_path):
    """Tokenizer, config and weights come from a gated repository by HF_ENDPOINT alone."""
    with LocalHub([Repo.from_dir("acme/smol", demo_model_dir)]) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": hub.issue_token(account="carol"),
        }
        command = [sys.executable, "-c", CLIENT, "acme/smol"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        reported = json.loads(done.stdout.splitlines()[-1])
        assert reported["account"] == "carol"
        assert reported["window"] == 8192
        assert reported["hidden"] == 576
        assert reported["ids"][-2:] == [36, 34]  # one token a digit
        assert reported["dtype"] == "torch.bfloat16"
        (weights,) = [entry for entry in hub.log if entry.origin == "cdn"]
        assert weights.bytes_sent == (demo_model_dir / "model.safetensors").stat().st_size
        assert not weights.authorization_leaked


STARTS = st.sampled_from(
    ["/", "/api/models/", f"/api/models/{TINY_REPO}/", f"/{TINY_REPO}/resolve/", "/xet-bridge-us/"]
)
WORDS = st.sampled_from(
    [
        "models",
        "acme",
        "tiny-llama",
        "resolve",
        "tree",
        "revision",
        "auth-check",
        "main",
        "whoami-v2",
        "resolve-cache",
        "xet-read-token",
        "README.md",
        "config.json",
        "..",
        "%2F",
        "%zz",
        "é",
    ]
)
QUERIES = st.sampled_from(["", "?", "?cursor=x&limit=-1", "?expand=", "?cursor=99", "?blobs"])
TOKENS = st.sampled_from(["", "Bearer", "Bearer ", "Basic x", "bearer hf_no", "\xff"])


@given(STARTS, st.lists(WORDS, max_size=5), QUERIES, TOKENS)
def test_any_path_is_answered(start: str, parts: list[str], query: str, authorization: str):
    """Whatever path, query and header come, there is one answer and no exception."""
    state = State(Signer(900), {TINY_REPO: Repo(TINY_REPO, tiny_files())})
    state.urls = {"hub": "http://127.0.0.1:1", "cdn": "http://127.0.0.1:2"}
    headers = {"authorization": authorization} if authorization else {}
    request = Request("GET", start + "/".join(parts) + query, headers)
    assert Hub(state).answer(request).status in ({401, 404} if authorization else {200, 401, 404})
    assert Cdn(state).answer(request).status == 403


def test_errors_carry_no_token(hub: LocalHub):
    """A refusal's text never repeats what was sent."""
    token = hub.issue_token(Behaviour.invalid)
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(endpoint=hub.url, token=token).auth_check(TINY_REPO)
    assert token not in refused.value.response.text
    assert token not in str(refused.value.response.headers)
