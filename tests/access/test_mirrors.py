"""Mirrors: Hubs that lose headers, speak plain http, or pass on what they do not serve."""

import pytest
from huggingface_hub import constants

from scripts.local_hub import LocalHub, Repo
from scripts.local_hub.hub import Hub
from serve_app.access.hub.bounded_client import may_lead
from serve_app.access.hub.probe import check_here
from serve_app.access.verdict import Outcome
from serve_app.weights.fetch import fetch
from tests.access.cases import MODEL, access, sharded_files, single_files
from tests.conftest import TINY_REPO

LOST = [
    ("X-Repo-Commit",),
    ("X-Repo-Commit", "X-Linked-Size", "X-Linked-Etag"),
    ("Link",),
    ("X-Xet-Hash",),
    ("ETag", "Accept-Ranges"),
    ("X-Request-Id", "RateLimit", "RateLimit-Policy"),
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("lost", LOST, ids="+".join)
@pytest.mark.parametrize("files", [single_files(), sharded_files()], ids=["single", "sharded"])
def test_mirror_that_loses_headers_serves(tmp_path, monkeypatch, lost, files):
    """The URL names the commit and every byte is hashed, so nothing depends on them."""
    with LocalHub([Repo(TINY_REPO, files, xet="Link" in lost)]) as hub:
        hub.drop_headers(*lost)
        config = access(hub, tmp_path, hub.issue_token())
        commit = hub.commits()[TINY_REPO]["main"]
        for pinned in (None, commit):
            assert check_here(MODEL, config, commit=pinned).outcome is Outcome.GRANTED
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        assert fetch(MODEL, config, commit).hub_bytes > 0


def test_check_here_treats_another_commit_in_the_header_as_a_contradiction(
    hub, tmp_path, monkeypatch
):
    """A mirror that is behind gives other files under the same name."""
    right = Hub._to_cdn

    def wrong(self, call, file, headers):
        answer = right(self, call, file, headers)
        answer.headers["X-Repo-Commit"] = "f" * 40
        return answer

    monkeypatch.setattr(Hub, "_to_cdn", wrong)
    verdict = check_here(MODEL, access(hub, tmp_path, hub.issue_token()))
    assert verdict.outcome is Outcome.UNKNOWN
    assert "f" * 40 in verdict.hub_message


def test_probe_names_the_host_that_it_is_sent_on_to(hub, tmp_path):
    """A mirror that sends everybody to the Hub: no token goes there, so nothing is proven."""
    hub.rename(TINY_REPO, "acme/other", origin="https://hub.example")
    verdict = check_here(MODEL, access(hub, tmp_path, hub.issue_token()))
    assert verdict.outcome is Outcome.UNKNOWN
    assert "sent on to hub.example, which gets no token" in verdict.hub_message


@pytest.mark.parametrize(
    ("url", "target", "may"),
    [
        ("https://a/x", "https://b/y", True),
        ("http://a/x", "https://b/y", True),
        ("http://a/x", "http://b/y", True),
        ("https://a/x", "http://a/x", False),
        ("https://a/x", "http://127.0.0.1/x", False),
        ("https://a/x", "ftp://a/x", False),
        ("https://a/x", "file:///etc/passwd", False),
        ("https://a/x", "https://", False),
        ("https://a/x", "https://[", False),
        ("https://a/x", "https://b:port/", False),
        ("https://a/x", "javascript:x", False),
    ],
)
def test_may_lead_where_an_answer_may(url, target, may):
    """Never from https to plain http, and to web servers only."""
    assert may_lead(url, target) is may
