"""Receipts: what they say, when they count, and that they hold no secret."""

import json
import stat
from pathlib import Path

import pytest

from serve_app.access import receipt as receipts
from serve_app.access.license import license_in
from serve_app.access.verdict import NodeVerdict, Outcome, TokenReport
from serve_app.config import ModelConfig

COMMIT, OTHER = "a" * 40, "b" * 40
HUB = "https://hub.example"
MODEL = ModelConfig(repo_id="acme/tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(receipts.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def granted(fingerprint="12345678", account="alice", commit=COMMIT, outcome=Outcome.GRANTED):
    token = TokenReport("env:HF_TOKEN", fingerprint, account)
    return NodeVerdict("id", "node", outcome, "", token=token, commit=commit)


def files(cache):
    return sorted((cache / ".serve-app" / "receipts").glob("*"))


def test_keep_a_granted_verdict_and_find_it(cache):
    """Everything an auditor asks for comes back."""
    kept = receipts.keep(granted(), MODEL, HUB)
    found = receipts.find(MODEL, HUB, fingerprint="12345678")
    assert found == kept
    assert (found.commit, found.account, found.token_source) == (COMMIT, "alice", "env:HF_TOKEN")
    assert found.is_fresh(60)


def test_keep_lets_only_the_owner_read(cache):
    """Mode 0600, and no half-written file is left."""
    receipts.keep(granted(), MODEL, HUB)
    (path,) = files(cache)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "outcome", [outcome for outcome in Outcome if outcome is not Outcome.GRANTED]
)
def test_keep_nothing_but_a_grant(cache, outcome):
    """A refusal, or a don't know, leaves no receipt."""
    assert receipts.keep(granted(outcome=outcome), MODEL, HUB) is None
    assert receipts.find(MODEL, HUB, fingerprint="12345678") is None


def test_find_only_by_token_hub_and_revision(cache):
    """Another token, Hub, revision, commit or repository finds nothing."""
    receipts.keep(granted(), MODEL, HUB)
    assert receipts.find(MODEL, HUB, fingerprint="87654321") is None
    assert receipts.find(MODEL, HUB, fingerprint=None) is None
    assert receipts.find(MODEL, "https://other", fingerprint="12345678") is None
    assert (
        receipts.find(ModelConfig(repo_id="acme/tiny", revision="v2"), HUB, fingerprint="12345678")
        is None
    )
    assert receipts.find(ModelConfig(repo_id="acme/tin"), HUB, fingerprint="12345678") is None
    assert receipts.find(MODEL, HUB, fingerprint="12345678", commit=OTHER) is None
    pinned = ModelConfig(repo_id="acme/tiny", revision="other-branch")
    assert receipts.find(pinned, HUB, fingerprint="12345678", commit=COMMIT) is not None


def test_keep_of_a_later_proof_keeps_the_first_date_and_the_account(cache, monkeypatch):
    """The "since when" does not move when the watch proves it again without asking whose it is."""
    monkeypatch.setattr(receipts.time, "time", lambda: 1000.0)
    receipts.keep(granted(), MODEL, HUB)
    monkeypatch.setattr(receipts.time, "time", lambda: 5000.0)
    again = receipts.keep(granted(account=None), MODEL, HUB)
    assert (again.first_granted_at, again.granted_at, again.account) == (1000.0, 5000.0, "alice")


def test_keep_sets_right_a_first_date_from_a_clock_that_was_ahead(cache, monkeypatch):
    """Nothing is granted before it is proven, whatever a clock said that was set since."""
    monkeypatch.setattr(receipts.time, "time", lambda: 9000.0)
    receipts.keep(granted(), MODEL, HUB)
    monkeypatch.setattr(receipts.time, "time", lambda: 1000.0)
    again = receipts.keep(granted(), MODEL, HUB)
    assert (again.first_granted_at, again.granted_at) == (1000.0, 1000.0)
    assert again.is_fresh(60)


def test_find_the_latest_commit_of_a_revision(cache, monkeypatch):
    """When the branch moved, the newer proof is the one that counts."""
    for at, commit in ((1000.0, COMMIT), (2000.0, OTHER)):
        monkeypatch.setattr(receipts.time, "time", lambda at=at: at)
        receipts.keep(granted(commit=commit), MODEL, HUB)
    assert receipts.find(MODEL, HUB, fingerprint="12345678").commit == OTHER


@pytest.mark.parametrize(
    ("age", "fresh"), [(0, True), (59, True), (61, False), (-200, True), (-400, False)]
)
def test_freshness_has_a_limit_in_both_directions(cache, monkeypatch, age, fresh):
    """Too old is stale; from the future beyond a clock's skew is not trusted."""
    monkeypatch.setattr(receipts.time, "time", lambda: 10_000.0 - age)
    kept = receipts.keep(granted(), MODEL, HUB)
    monkeypatch.setattr(receipts.time, "time", lambda: 10_000.0)
    assert kept.is_fresh(60) is fresh


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"repo_id": 1}', "\xff"])
def test_find_treats_a_damaged_receipt_as_missing(cache, damage):
    """A truncated or foreign file blocks nothing and grants nothing."""
    receipts.keep(granted(), MODEL, HUB)
    files(cache)[0].write_bytes(damage.encode("latin-1"))
    assert receipts.find(MODEL, HUB, fingerprint="12345678") is None


def test_license_in_hashes_the_text_of_the_copy(cache):
    """Before the download there is no hash; after it there is."""
    assert receipts.keep(granted(), MODEL, HUB).license_sha256 is None
    copy = cache / "models--acme--tiny" / "snapshots" / COMMIT
    copy.mkdir(parents=True)
    (copy / "LICENSE.txt").write_text("\n   BE KIND LICENSE 3.2\x1b[31m  \n\nbe kind")
    kept = receipts.keep(granted(), MODEL, HUB)
    assert len(kept.license_sha256) == 64
    text = license_in(copy)
    assert (text.title, text.sha256) == ("BE KIND LICENSE 3.2[31m", kept.license_sha256)
    assert json.loads(Path(files(cache)[0]).read_text())["license_sha256"] == kept.license_sha256
