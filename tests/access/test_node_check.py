"""The probe with its memory: what a receipt opens while no Hub answers, and what it never does."""

import re
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access import receipt as receipts
from serve_app.access.hub import probe as hub_probe
from serve_app.access.node_check import keep_receipt, prove_here, prove_later
from serve_app.access.token import ResolvedToken
from serve_app.access.verdict import Outcome, TokenReport
from serve_app.config import AccessConfig, ModelConfig
from serve_app.weights.fetch import fetch
from tests.access.cases import MODEL, fake_token, granted, sharded_files
from tests.conftest import TINY_REPO

pytestmark = pytest.mark.slow

FILES = sharded_files() | {"LICENSE.txt": b"be kind\n", "chat_template.jinja": b"{{ messages }}"}


@pytest.fixture
def hub():
    with LocalHub([Repo(TINY_REPO, FILES)]) as running:
        yield running


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache and no login of the test's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    return tmp_path / "cache"


def node(hub, tmp_path, token, **facts):
    """Return the config of a node that goes on while the Hub is down."""
    file = tmp_path / "token"
    file.write_text(token)
    limits = {"timeout_s": 0.5, "deadline_s": 2.0, "on_unreachable": "allow_cached"}
    return AccessConfig(endpoint=hub.url, token_file=str(file), **limits | facts)


def serve_once(hub, tmp_path, token, **facts):
    """Prove and download as a replica does; returns its config and the commit."""
    access = node(hub, tmp_path, token, **facts)
    patient = access.model_copy(update={"timeout_s": 10.0, "deadline_s": 60.0})
    verdict = prove_here(MODEL, patient)
    assert verdict.outcome is Outcome.GRANTED
    fetch(MODEL, access, verdict.commit)
    keep_receipt(verdict, MODEL, access)
    return access, verdict.commit


def snapshot(cache, commit):
    return cache / f"models--{TINY_REPO.replace('/', '--')}" / "snapshots" / commit


def test_prove_here_leaves_a_receipt_for_a_grant_and_none_for_a_refusal(hub, tmp_path):
    """Of the commit, with the token's fingerprint, on the node that proved it."""
    refused = prove_here(MODEL, node(hub, tmp_path, hub.issue_token(Behaviour.pending)))
    assert refused.outcome is Outcome.REQUEST_PENDING
    assert list(receipts.stored(TINY_REPO)) == []
    proven = prove_later(MODEL, node(hub, tmp_path, hub.issue_token()), None, None, 0.0)
    (kept,) = receipts.stored(TINY_REPO)
    assert (kept.commit, kept.fingerprint) == (proven.commit, proven.token.fingerprint)
    assert kept.license_sha256 is None


def test_prove_later_names_the_license_in_the_receipt_after_the_download(hub, tmp_path):
    """Its text is part of the copy that is served."""
    serve_once(hub, tmp_path, hub.issue_token())
    (kept,) = receipts.stored(TINY_REPO)
    assert len(kept.license_sha256) == 64


@pytest.mark.parametrize("pinned", [False, True])
def test_prove_here_by_a_fresh_receipt_and_a_complete_copy_while_the_hub_is_down(
    hub, tmp_path, pinned
):
    """For the gate, which pins the receipt's commit, and for a replica, which is given one."""
    token = hub.issue_token()
    access, commit = serve_once(hub, tmp_path, token)
    hub.stop()
    verdict = prove_here(MODEL, access, commit=commit if pinned else None)
    assert verdict.outcome is Outcome.GRANTED
    assert verdict.commit == commit
    assert 0 <= verdict.receipt_age_s < 60
    assert re.search(r"; granted by a receipt \d+ s old and the complete", verdict.hub_message)
    assert token not in verdict.hub_message
    assert prove_here(MODEL, node(hub, tmp_path, token, on_unreachable="block")).outcome is (
        Outcome.HUB_UNREACHABLE
    )


def test_fetch_takes_the_copy_without_the_hub(hub, tmp_path):
    """A replica that starts during the outage has its files at once."""
    access, commit = serve_once(hub, tmp_path, hub.issue_token())
    hub.stop()
    began = time.monotonic()
    directory = fetch(MODEL, access, commit, offline=True).directory
    assert time.monotonic() - began < 1
    assert {path.name for path in directory.iterdir()} == set(FILES)


def test_prove_here_does_not_renew_the_receipt_that_it_leans_on(hub, tmp_path):
    """The Hub's last yes keeps its date, however often it is leant on."""
    access, _ = serve_once(hub, tmp_path, hub.issue_token())
    before = list(receipts.stored(TINY_REPO))
    hub.stop()
    verdict = prove_here(MODEL, access)
    assert keep_receipt(verdict, MODEL, access) == verdict
    assert list(receipts.stored(TINY_REPO)) == before


def test_prove_here_in_offline_mode_is_as_without_an_answer(hub, tmp_path, monkeypatch):
    """HF_HUB_OFFLINE with a receipt passes, without one it blocks; nothing is asked."""
    access, commit = serve_once(hub, tmp_path, hub.issue_token())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear_log()
    assert prove_here(MODEL, access).commit == commit
    assert fetch(MODEL, access, commit, offline=True).directory.name == commit
    other = prove_here(MODEL, node(hub, tmp_path, fake_token()))
    assert other.outcome is Outcome.HUB_UNREACHABLE
    assert "HF_HUB_OFFLINE" in other.hub_message
    assert hub.log == []


@pytest.mark.parametrize(
    "behaviour",
    [Behaviour.pending, Behaviour.never_asked, Behaviour.invalid, Behaviour.expired],
)
def test_prove_here_counts_a_refusal_more_than_any_receipt(hub, tmp_path, behaviour):
    """A grant that was withdrawn blocks the next start, fresh receipt or not."""
    token = hub.issue_token()
    access, _ = serve_once(hub, tmp_path, token)
    hub.set_behaviour(token, behaviour)
    verdict = prove_here(MODEL, access)
    assert verdict.outcome not in (Outcome.GRANTED, Outcome.HUB_UNREACHABLE)
    assert verdict.receipt_age_s is None


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(
    ("behaviour", "outcome"),
    [
        (Behaviour.rate_limited, Outcome.RATE_LIMITED),
        (Behaviour.server_error, Outcome.HUB_UNREACHABLE),
        (Behaviour.hang, Outcome.HUB_UNREACHABLE),
        (Behaviour.garbage, Outcome.HUB_UNREACHABLE),
        (Behaviour.not_http, Outcome.HUB_UNREACHABLE),
        (Behaviour.cdn_down, Outcome.WEIGHTS_UNREACHABLE),
        (Behaviour.cdn_denied, Outcome.WEIGHTS_UNREACHABLE),
        (Behaviour.cdn_cut, Outcome.WEIGHTS_UNREACHABLE),
    ],
)
def test_prove_here_counts_a_receipt_where_nobody_said_no(
    hub, tmp_path, behaviour, outcome, pinned
):
    """A counted or overloaded Hub, bytes that do not come: all that is needed is here."""
    token = hub.issue_token()
    access, commit = serve_once(hub, tmp_path, token)
    hub.set_behaviour(token, behaviour)
    asked = commit if pinned else None
    blocked = prove_here(MODEL, node(hub, tmp_path, token, on_unreachable="block"), commit=asked)
    assert blocked.outcome is outcome
    verdict = prove_here(MODEL, access, commit=asked)
    assert (verdict.outcome, verdict.commit) == (Outcome.GRANTED, commit)
    assert "granted by a receipt" in verdict.hub_message
    hub.clear_log()
    fetched = fetch(MODEL, access, commit, offline=verdict.receipt_age_s is not None)
    assert fetched.cache_bytes > 0
    assert hub.log == []


def refused_while_down(hub, access, *, model=MODEL, commit=None):
    """Stop the Hub, ask, and return the words of the block."""
    hub.stop()
    verdict = prove_here(model, access, commit=commit)
    assert verdict.outcome is Outcome.HUB_UNREACHABLE
    assert verdict.receipt_age_s is None
    assert "allow_cached, but" in verdict.hub_message
    return verdict.hub_message.partition("allow_cached, but ")[2]


def test_prove_here_stays_unknown_without_a_receipt(hub, tmp_path):
    """A first start during an outage is blocked."""
    access = node(hub, tmp_path, hub.issue_token())
    assert refused_while_down(hub, access) == (
        "this node has no receipt for this token, this Hub and revision main"
    )


def test_prove_here_does_not_count_another_tokens_receipt(hub, tmp_path):
    """Whoever exchanges the token proves anew."""
    serve_once(hub, tmp_path, hub.issue_token())
    access = node(hub, tmp_path, hub.issue_token())
    assert "no receipt for this token" in refused_while_down(hub, access)


def test_prove_here_does_not_treat_an_endless_token_search_as_none_needed(
    hub, tmp_path, monkeypatch
):
    """The receipt of a public repository does not stand in for a token nobody has seen."""
    access = node(hub, tmp_path, hub.issue_token(), deadline_s=1.5)
    public = granted(token=TokenReport("none"))
    assert receipts.keep(public, MODEL, hub.url).fingerprint is None
    released = threading.Event()

    def hang(_access):
        released.wait(30)
        return ResolvedToken(None, TokenReport())

    monkeypatch.setattr(hub_probe, "resolve_token", hang)
    verdict = prove_here(MODEL, access)
    released.set()
    assert verdict.outcome is Outcome.HUB_UNREACHABLE
    assert "without a token no receipt fits" in verdict.hub_message


def test_prove_here_has_no_receipt_for_another_commit_or_revision(hub, tmp_path):
    """Only what was proven counts, by its commit or by the name it was proven under."""
    access, commit = serve_once(hub, tmp_path, hub.issue_token())
    assert "and commit 000000000000" in refused_while_down(hub, access, commit="0" * 40)
    tagged = ModelConfig(repo_id=TINY_REPO, revision="v1")
    assert "and revision v1" in refused_while_down(hub, access, model=tagged)
    assert prove_here(tagged, access, commit=commit).outcome is Outcome.GRANTED


def test_prove_here_reports_a_stale_receipt_with_its_age_and_limit(hub, tmp_path, monkeypatch):
    """Its limit is `access.receipt_max_age_s`."""
    access, _ = serve_once(hub, tmp_path, hub.issue_token(), receipt_max_age_s=3600)
    clock = time.time
    monkeypatch.setattr(receipts.time, "time", lambda: clock() + 2 * 86_400)
    assert refused_while_down(hub, access) == (
        "the receipt is 2.0 d old (access.receipt_max_age_s is 3600)"
    )


def test_prove_here_reports_a_receipt_of_a_clock_that_was_ahead(hub, tmp_path, monkeypatch):
    """It counts only when its date has come."""
    clock = time.time
    monkeypatch.setattr(receipts.time, "time", lambda: clock() + 7200)
    access, _ = serve_once(hub, tmp_path, hub.issue_token())
    monkeypatch.setattr(receipts.time, "time", clock)
    assert refused_while_down(hub, access) == (
        "the receipt is dated 2.0 h ahead: this node's clock is or was wrong"
    )


def test_prove_here_finds_a_right_receipt_behind_one_of_a_wrong_clock(hub, tmp_path, monkeypatch):
    """The watch proves the commit after the clock was set right; the branch's receipt is older."""
    clock = time.time
    monkeypatch.setattr(receipts.time, "time", lambda: clock() + 7200)
    access, commit = serve_once(hub, tmp_path, hub.issue_token())
    monkeypatch.setattr(receipts.time, "time", clock)
    prove_here(ModelConfig(repo_id=TINY_REPO, revision=commit), access)
    hub.stop()
    assert prove_here(MODEL, access).outcome is Outcome.GRANTED


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-00002-of-00002.safetensors", "no complete copy"),
        ("chat_template.jinja", "no complete copy"),
        ("tokenizer.json", "no complete copy"),
    ],
)
def test_prove_here_does_not_count_a_copy_that_lacks_a_file(hub, tmp_path, cache, name, words):
    """Whatever the replica would have had to download."""
    access, commit = serve_once(hub, tmp_path, hub.issue_token())
    (snapshot(cache, commit) / name).unlink()
    assert words in refused_while_down(hub, access)


def test_prove_here_does_not_count_a_copy_whose_weights_are_cut_off(hub, tmp_path, cache):
    """A full disk may have left half a file under the right name."""
    access, commit = serve_once(hub, tmp_path, hub.issue_token())
    file = (snapshot(cache, commit) / "model-00001-of-00002.safetensors").resolve()
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-8])
    assert "is cut off" in refused_while_down(hub, access)


def test_prove_here_does_not_count_a_receipt_without_a_copy(hub, tmp_path):
    """A node that proved its access and never downloaded cannot serve."""
    access = node(hub, tmp_path, hub.issue_token())
    prove_here(MODEL, access)
    assert "no complete copy" in refused_while_down(hub, access)


def test_prove_here_warns_of_a_cache_that_cannot_be_written(hub, tmp_path, cache):
    """The grant stands."""
    cache.write_text("a file where the cache should be")
    verdict = prove_here(MODEL, node(hub, tmp_path, hub.issue_token()))
    assert verdict.outcome is Outcome.GRANTED
    assert any("no receipt can be kept in" in warning for warning in verdict.token.warnings)


def test_prove_here_of_the_commit_keeps_the_branchs_receipt_fresh(hub, tmp_path, monkeypatch):
    """The watch asks for the commit; the next gate asks for the branch."""
    access, commit = serve_once(hub, tmp_path, hub.issue_token(), receipt_max_age_s=3600)
    clock = time.time
    monkeypatch.setattr(receipts.time, "time", lambda: clock() + 7200)
    prove_here(ModelConfig(repo_id=TINY_REPO, revision=commit), access)
    hub.stop()
    assert prove_here(MODEL, access).outcome is Outcome.GRANTED


def test_prove_here_needs_no_receipt_for_a_local_directory(tmp_path):
    """Nothing of the Hub is involved."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else Path(content))
    verdict = prove_here(ModelConfig(path=str(tmp_path)), AccessConfig())
    assert verdict.outcome is Outcome.GRANTED
    assert verdict.token.warnings == ()
