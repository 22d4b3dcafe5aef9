"""Tokens by exchange: what is asked, what is kept, what is said, and what fits after a renewal."""

import json
import time

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _auth

from scripts.local_hub import Behaviour, LocalHub, Repo
from scripts.local_hub.exchange import Publisher, identity_token
from serve_app.access import identity as identities
from serve_app.access import receipt as receipts
from serve_app.access.hub.download import HubDownload
from serve_app.access.hub.probe import check_here
from serve_app.access.node_check import prove_here
from serve_app.access.token import resolve_token
from serve_app.access.verdict import Outcome, Verdict
from serve_app.checkpoint.runnable import Loader
from serve_app.config import AccessConfig, parse_args
from serve_app.errors import ConfigError
from serve_app.redaction import sanitise
from serve_app.weights.fetch import fetch
from tests.access.cases import MODEL, sharded_files
from tests.conftest import TINY_REPO

ISSUER, SUBJECT = "https://oidc.example/cluster-1", "system:serviceaccount:llm:serve-app"
LOADER = Loader(dtype="bfloat16", num_gpus=0)


@pytest.fixture(autouse=True)
def bare_process(monkeypatch, tmp_path):
    """No cache, no login, nothing exchanged yet."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    identities._HELD.clear()
    yield
    identities._HELD.clear()


@pytest.fixture
def hub():
    with LocalHub([Repo(TINY_REPO, sharded_files())]) as running:
        running.publishers.trust("alice", Publisher(ISSUER, SUBJECT))
        yield running


class Node:
    """One node: its identity token's file, and its config."""

    def __init__(self, hub, path, **options):
        self.file = path / "identity"
        self.write()
        identity = {"token_file": str(self.file), "resource": "user/alice"}
        identity |= options.pop("identity", {})
        self.access = AccessConfig(endpoint=hub.url, identity=identity, **options)

    def write(self, issuer=ISSUER, subject=SUBJECT, **claims):
        self.jwt = identity_token(issuer, subject, **claims)
        self.file.write_text(self.jwt + "\n")

    def check(self, **options):
        verdict = check_here(MODEL, self.access, **options)
        assert self.jwt not in repr(verdict)
        assert self.jwt.split(".")[2] not in repr(verdict)
        return verdict


@pytest.fixture
def node(hub, tmp_path):
    return Node(hub, tmp_path)


def exchanges(hub):
    return [entry for entry in hub.log if entry.route == "exchange"]


def test_identity_grants_a_node_without_any_stored_secret(hub, node):
    """The exchange is one of five requests; whose token it is stands in the verdict."""
    hub.add_repo(Repo(TINY_REPO, sharded_files(), xet=True))
    verdict = node.check(loader=LOADER)
    assert verdict.outcome is Outcome.GRANTED
    assert verdict.hub_requests == sum(entry.origin == "hub" for entry in hub.log) == 5
    assert verdict.token.source == f"identity:{node.file}"
    assert verdict.token.account == "alice"
    assert verdict.token.identity == f"{SUBJECT} of {ISSUER} as user/alice"
    assert len(verdict.token.fingerprint) == 8
    assert not any(entry.authorization_leaked for entry in hub.log)


def test_exchange_sends_huggingface_hubs_own_form(hub, node, monkeypatch):
    """A JSON body with four fields; the token's value stands in it alone."""
    asked = []
    answer = hub.publishers.answer

    def spy(_self, method, body):
        asked.append((method, json.loads(body)))
        return answer(method, body)

    monkeypatch.setattr(type(hub.publishers), "answer", spy)
    assert node.check().outcome is Outcome.GRANTED
    ((method, body),) = asked
    assert method == "POST"
    assert body == {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
        "subject_token": node.jwt,
        "resource": "alice",
    }


def test_exchange_for_a_repository_as_resource(hub, tmp_path):
    """Of its owner and name; the account is not known by it."""
    hub.publishers.trust("acme/tiny-llama", Publisher(ISSUER, SUBJECT, account="bot"))
    node = Node(hub, tmp_path, identity={"resource": "model/acme/tiny-llama"})
    verdict = node.check()
    assert (verdict.outcome, verdict.token.account) == (Outcome.GRANTED, None)


def test_exchange_keeps_a_token_until_shortly_before_its_end(hub, tmp_path):
    """In memory: the second check asks for none, the one near the end for a new one."""
    hub.publishers.by_resource["alice"] = [Publisher(ISSUER, SUBJECT, lifetime_s=2.0)]
    node = Node(hub, tmp_path)
    first = resolve_token(node.access)
    second = resolve_token(node.access)
    assert (first.requests, second.requests) == (1, 0)
    assert first.token.reveal() == second.token.reveal()
    time.sleep(1.7)
    third = resolve_token(node.access)
    assert third.requests == 1
    assert third.token.reveal() != first.token.reveal()
    assert third.report.fingerprint == first.report.fingerprint
    assert check_here(MODEL, node.access).outcome is Outcome.GRANTED


def test_exchange_again_at_once_for_a_new_identity_token(hub, node):
    """Also a dead one: what is in memory does not hide it."""
    assert node.check().outcome is Outcome.GRANTED
    node.write()
    assert node.check().outcome is Outcome.GRANTED
    assert len(exchanges(hub)) == 2
    node.write(subject="system:serviceaccount:llm:default")
    assert node.check().outcome is Outcome.IDENTITY_REFUSED


def test_exchange_again_for_a_token_revoked_before_its_end(hub, node):
    """The check that finds it dead blocks, the next one asks for another."""
    held = resolve_token(node.access).token.reveal()
    hub.set_behaviour(held, Behaviour.invalid)
    assert node.check().outcome is Outcome.INVALID_TOKEN
    assert node.check().outcome is Outcome.GRANTED
    assert len(exchanges(hub)) == 2


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"subject": "system:serviceaccount:llm:default"}, ("No trusted publisher", ":default")),
        ({"issuer": "https://other.example"}, ("No trusted publisher", "https://other.example")),
        ({"exp": 1000}, ("The token is expired", "ago by this node's clock")),
        ({"nbf": 9_999_999_999}, ("not valid yet", "begins in")),
    ],
)
def test_exchange_refused_is_a_no_with_its_claims(hub, node, claims, words):
    """Not an outage: the Hub's error, its words, and what it judged by; never the token."""
    node.write(**claims)
    verdict = node.check()
    assert (verdict.outcome, verdict.http_status) == (Outcome.IDENTITY_REFUSED, 400)
    for text in ("user/alice", "400: invalid_grant", "iss ", "sub ", "aud https://hug", *words):
        assert text in verdict.hub_message
    assert "Trusted Publisher" in verdict.remedy
    assert verdict.hub_requests == 1
    decision = Verdict("x", "main", None, hub.url, 1.0, (verdict,))
    assert decision.exit_code == 3
    assert "Found: the exchange for user/alice was refused" in decision.table()


def test_exchange_sends_nothing_for_another_audience(hub, node):
    """The config says which one is wanted; a Hub that wants another one says so itself."""
    node.write(aud="https://kubernetes.default.svc")
    verdict = node.check()
    assert verdict.outcome is Outcome.IDENTITY_REFUSED
    assert "is not for https://huggingface.co" in verdict.hub_message
    assert "aud https://kubernetes.default.svc" in verdict.hub_message
    assert hub.log == []
    node.write()
    hub.publishers.audience = "https://hub.example"
    assert "audience of the token is not the Hub" in node.check().hub_message


def test_exchange_for_a_resource_without_a_publisher(hub, tmp_path):
    """`invalid_target` is a no as well."""
    verdict = Node(hub, tmp_path, identity={"resource": "user/bob"}).check()
    assert verdict.outcome is Outcome.IDENTITY_REFUSED
    assert "invalid_target" in verdict.hub_message


def test_exchange_allows_the_issuers_clock_to_be_ahead_a_little(hub, node):
    """Up to a minute passes; the Hub's clock behind it by an hour does not."""
    node.write(nbf=time.time() + 30, iat=time.time() + 30)
    assert node.check().outcome is Outcome.GRANTED
    hub.publishers.clock_ahead_s = -3600
    node.write()
    assert "not valid yet" in node.check().hub_message


def test_exchange_outage_is_not_a_refusal(hub, node, monkeypatch):
    """A Hub that fails, and one that is away, have said nothing about the identity."""
    monkeypatch.setattr("serve_app.access.hub.exchange.time.sleep", lambda _s: None)
    for fault, outcome in [
        (Behaviour.server_error, Outcome.HUB_UNREACHABLE),
        (Behaviour.rate_limited, Outcome.RATE_LIMITED),
        (Behaviour.garbage, Outcome.HUB_UNREACHABLE),
    ]:
        hub.set_outage(fault)
        assert node.check().outcome is outcome
    hub.set_outage(None)
    hub.stop()
    verdict = node.check()
    assert verdict.outcome is Outcome.HUB_UNREACHABLE
    assert "the exchange for user/alice failed" in verdict.hub_message
    hub.start()


@pytest.mark.parametrize(
    ("content", "outcome", "words"),
    [
        (None, Outcome.NO_TOKEN, "does not exist on this node"),
        ("", Outcome.MALFORMED_TOKEN, "holds no identity token"),
        ("hf_" + "x" * 34, Outcome.MALFORMED_TOKEN, "holds no identity token"),
        ("a.b.c", Outcome.MALFORMED_TOKEN, "holds no identity token"),
        ("a.W10.c", Outcome.MALFORMED_TOKEN, "holds no identity token"),
        ("x" * 100_000, Outcome.MALFORMED_TOKEN, "holds no identity token"),
    ],
)
def test_identity_file_without_an_identity_token(hub, node, content, outcome, words):
    """It is reported without a request, and without its content."""
    node.file.unlink()
    if content is not None:
        node.file.write_text(content)
    verdict = check_here(MODEL, node.access)
    assert (verdict.outcome, words in verdict.hub_message) == (outcome, True)
    assert hub.log == []


def test_identity_claims_that_are_no_words_are_shown_as_none(hub, node):
    """Whatever an issuer puts there, the sentence stays one."""
    node.write(issuer=7, subject={"a": 1})
    assert "iss (none), sub (none)" in node.check().hub_message


def test_receipt_fits_after_a_renewal_of_the_token(hub, tmp_path):
    """The identity is the fingerprint: a grant is remembered over any number of tokens."""
    node = Node(hub, tmp_path, on_unreachable="allow_cached", timeout_s=0.5, deadline_s=2.0)
    first = prove_here(MODEL, node.access)
    fetch(MODEL, node.access, first.commit)
    before = receipts.find(MODEL, hub.url, fingerprint=first.token.fingerprint)
    assert before.identity == first.token.identity
    node.write()
    again = prove_here(MODEL, node.access)
    after = receipts.find(MODEL, hub.url, fingerprint=again.token.fingerprint)
    assert after.first_granted_at == before.first_granted_at < after.granted_at
    hub.stop()
    assert prove_here(MODEL, node.access).outcome is Outcome.GRANTED
    hub.start()


def test_verdict_does_not_say_that_one_identity_has_different_tokens(hub, tmp_path):
    """Each exchanged its own token."""
    verdicts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        verdicts.append(Node(hub, tmp_path / name).check())
    assert len(exchanges(hub)) == 2
    table = Verdict("x", "main", verdicts[0].commit, hub.url, 1.0, tuple(verdicts)).table()
    assert "different tokens" not in table


def test_download_goes_on_with_a_renewed_token(hub, tmp_path):
    """The token ends while the weights come; the next request carries another one."""
    hub.publishers.by_resource["alice"] = [Publisher(ISSUER, SUBJECT, lifetime_s=1.0)]
    node = Node(hub, tmp_path)
    commit = node.check().commit
    download = HubDownload(TINY_REPO, node.access, commit)
    files = download.files()
    time.sleep(1.2)
    hub.clear_log()
    held = fetch(MODEL, node.access, commit)
    assert held.hub_bytes
    assert download._fetch_small(next(f for f in files if f.path == "tokenizer.json")) == b"{}"
    assert not any(entry.status in (401, 403) for entry in hub.log)


def test_exchange_leaves_no_token_on_a_disk(hub, tmp_path):
    """Neither in the cache nor in a receipt."""
    node = Node(hub, tmp_path)
    proven = prove_here(MODEL, node.access)
    fetch(MODEL, node.access, proven.commit)
    secret = resolve_token(node.access).token.reveal()
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes()
            assert node.jwt.encode() not in path.read_bytes()


def test_sanitise_knows_the_secrets_of_an_exchange():
    """Identity tokens and both kinds that the Hub gives for them."""
    jwt = identity_token(ISSUER, SUBJECT)
    for secret in (jwt, f"hf_jwt_{jwt}", "hf_oauth_" + "aB-9." * 8):
        assert sanitise(f"sent {secret} there") == "sent [secret] there"


@pytest.mark.parametrize(
    ("access", "words"),
    [
        ({"identity": {"resource": "user/alice"}}, "token_file"),
        ({"identity": {"token_file": "/x", "resource": "alice"}}, "resource"),
        ({"identity": {"token_file": "/x", "resource": "user/a"}, "token_file": "/y"}, "one of"),
        (
            {"identity": {"token_file": "/x", "resource": "user/a"}, "endpoint": "http://hub"},
            "plain http",
        ),
    ],
)
def test_identity_config_that_is_wrong(access, words):
    """Two sources, no resource, or a way on which anybody listens."""
    with pytest.raises(ConfigError, match=words):
        parse_args({"model": {"repo_id": TINY_REPO}, "access": access})


class TestHuggingfaceHubsOwn:
    """HF_OIDC_RESOURCE and HF_OIDC_ID_TOKEN, which huggingface_hub exchanges by itself."""

    @pytest.fixture(autouse=True)
    def variables(self, hub, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)
        monkeypatch.setenv("HF_OIDC_RESOURCE", "alice")
        monkeypatch.setenv("HF_OIDC_ID_TOKEN", identity_token(ISSUER, SUBJECT))

    def test_identity_is_its_own_fingerprint(self, hub, monkeypatch):
        """Two exchanges, one identity."""
        first = resolve_token(AccessConfig())
        monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)
        second = resolve_token(AccessConfig())
        assert first.report.source == "oidc"
        assert first.token.reveal() != second.token.reveal()
        assert first.report.fingerprint == second.report.fingerprint
        assert check_here(MODEL, AccessConfig()).outcome is Outcome.GRANTED

    def test_identity_of_huggingface_hub_refused_is_a_no(self, hub, monkeypatch):
        """With the claims; a Hub that fails is still an outage."""
        monkeypatch.setenv("HF_OIDC_ID_TOKEN", identity_token(ISSUER, "somebody"))
        verdict = check_here(MODEL, AccessConfig())
        assert verdict.outcome is Outcome.IDENTITY_REFUSED
        assert "invalid_grant" in verdict.hub_message
        assert "sub somebody" in verdict.hub_message
        hub.set_outage(Behaviour.server_error)
        assert check_here(MODEL, AccessConfig()).outcome is Outcome.HUB_UNREACHABLE
