"""The probe against the loopback Hub: every outcome, its requests, and where the token goes."""

import pickle
import socket
import subprocess
import sys
import threading
import time

import pytest
from huggingface_hub import constants

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access.hub import probe as probing
from serve_app.access.hub.probe import check_here
from serve_app.access.token import Fault, ResolvedToken
from serve_app.access.verdict import Outcome, TokenReport
from serve_app.config import AccessConfig, ModelConfig
from tests.access.cases import MODEL, access, fake_token, sharded_files, single_files
from tests.conftest import TINY_REPO

IMPATIENT = {"timeout_s": 0.5, "deadline_s": 3}
# behaviour of the Hub -> outcome, requests to the Hub, the account is reported
REFUSALS = {
    Behaviour.never_asked: (Outcome.LICENSE_NOT_ACCEPTED, 3, True),
    Behaviour.pending: (Outcome.REQUEST_PENDING, 3, True),
    Behaviour.rejected: (Outcome.REQUEST_REJECTED, 3, True),
    Behaviour.reset: (Outcome.REQUEST_RESET, 3, True),
    Behaviour.invalid: (Outcome.INVALID_TOKEN, 2, False),
    Behaviour.expired: (Outcome.EXPIRED_TOKEN, 1, False),
    Behaviour.fine_grained: (Outcome.TOKEN_SCOPE, 3, True),
    Behaviour.fine_grained_elsewhere: (Outcome.TOKEN_SCOPE, 3, True),
    Behaviour.org_policy_pending: (Outcome.ORG_POLICY, 3, True),
    Behaviour.org_policy_denied: (Outcome.ORG_POLICY, 3, True),
    Behaviour.org_revoked: (Outcome.ORG_POLICY, 3, True),
    Behaviour.disabled: (Outcome.REPO_DISABLED, 2, False),
    Behaviour.country_blocked: (Outcome.CONTENT_BLOCKED, 3, True),
    Behaviour.auth_ok_files_denied: (Outcome.CONTENT_BLOCKED, 3, True),
    Behaviour.cdn_denied: (Outcome.WEIGHTS_UNREACHABLE, 3, False),
    Behaviour.cdn_cut: (Outcome.WEIGHTS_UNREACHABLE, 3, False),
    Behaviour.cdn_down: (Outcome.WEIGHTS_UNREACHABLE, 3, False),
    Behaviour.rate_limited: (Outcome.RATE_LIMITED, None, False),
    Behaviour.server_error: (Outcome.HUB_UNREACHABLE, None, False),
    Behaviour.hang: (Outcome.HUB_UNREACHABLE, None, False),
    Behaviour.garbage: (Outcome.HUB_UNREACHABLE, 1, False),
    Behaviour.not_http: (Outcome.HUB_UNREACHABLE, None, False),
}


@pytest.fixture
def xet_hub():
    with LocalHub([Repo(TINY_REPO, sharded_files(), xet=True)]) as running:
        yield running


@pytest.fixture(autouse=True)
def no_token_of_this_process(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))


def hub_requests(hub):
    return [entry for entry in hub.log if entry.origin == "hub"]


def assert_clean(hub, verdict, token):
    """Check what holds for every probe: nothing leaks, nothing is downloaded, all is counted."""
    assert not any(entry.authorization_leaked for entry in hub.log)
    assert verdict.hub_requests == len(hub_requests(hub))
    for entry in hub.log:
        if entry.origin == "cdn":
            assert entry.range.startswith("bytes=0-")
    assert token not in str(verdict).replace(" ", "")
    assert token.encode() not in pickle.dumps(verdict)


def test_behaviours_of_the_hub_are_all_tested_here():
    """A behaviour that is added to the loopback Hub is added here."""
    assert set(REFUSALS) | {Behaviour.granted, Behaviour.flaky} == set(Behaviour)


@pytest.mark.parametrize("behaviour", list(REFUSALS))
def test_probe_refusals(hub, tmp_path, behaviour):
    """Each is distinguished, in the Hub's words, with a fix; at most whoami is asked on top."""
    token = hub.issue_token(behaviour, account="alice")
    verdict = check_here(MODEL, access(hub, tmp_path, token, **IMPATIENT))
    outcome, requests, names_account = REFUSALS[behaviour]
    assert verdict.outcome is outcome
    assert requests is None or verdict.hub_requests == requests
    assert verdict.token.account == ("alice" if names_account else None)
    assert verdict.hub_message
    assert verdict.remedy
    assert_clean(hub, verdict, token)


@pytest.mark.parametrize("xet", [False, True], ids=["plain", "xet"])
@pytest.mark.parametrize("gated", ["manual", False], ids=["gated", "public"])
@pytest.mark.parametrize("files", [single_files(), sharded_files()], ids=["single", "sharded"])
def test_probe_granted(tmp_path, files, gated, xet):
    """Nine bytes prove it, or one of the chunks, in at most five requests to the Hub."""
    repo = Repo(TINY_REPO, files, gated=gated, xet=xet)
    with LocalHub([repo]) as hub:
        token = hub.issue_token()
        verdict = check_here(MODEL, access(hub, tmp_path, token))
        assert verdict.outcome is Outcome.GRANTED
        assert verdict.commit == repo.sha
        assert verdict.hub_requests <= 5
        (bytes_of_it,) = (entry for entry in hub.log if entry.origin == "cdn")
        assert xet or bytes_of_it.bytes_sent == 9
        assert_clean(hub, verdict, token)


def test_probe_needs_three_requests_with_a_pinned_commit_and_fewer_with_a_hint(xet_hub, tmp_path):
    """The index counts as proven; with another node's hint the description does too."""
    config = access(xet_hub, tmp_path, xet_hub.issue_token())
    first = check_here(MODEL, config)
    pinned = check_here(MODEL, config, commit=first.commit)
    hinted = check_here(MODEL, config, commit=first.commit, hint=first)
    assert (first.outcome, pinned.outcome, hinted.outcome) == (Outcome.GRANTED,) * 3
    assert (first.hub_requests, pinned.hub_requests, hinted.hub_requests) == (4, 3, 2)


def test_probe_decides_nothing_by_a_hint(hub, tmp_path):
    """A node without a grant is refused although another one was granted with another token."""
    first = check_here(MODEL, access(hub, tmp_path, hub.issue_token()))
    config = access(hub, tmp_path, hub.issue_token(Behaviour.pending, account="bob"))
    verdict = check_here(MODEL, config, commit=first.commit, hint=first)
    assert (verdict.outcome, verdict.token.account) == (Outcome.REQUEST_PENDING, "bob")


@pytest.mark.parametrize("behaviour", [Behaviour.never_asked, Behaviour.invalid])
def test_probe_asks_for_the_account_of_the_same_refused_token_once(hub, tmp_path, behaviour):
    """That route is strictly limited; the other nodes take what the first one learned."""
    config = access(hub, tmp_path, hub.issue_token(behaviour, account="alice"))
    first = check_here(MODEL, config)
    second = check_here(MODEL, config, commit=first.commit, hint=first)
    assert (second.outcome, second.token) == (first.outcome, first.token)
    assert [entry.path for entry in hub.log].count("/api/whoami-v2") == 1


def test_probe_without_a_token_at_a_gated_repository(hub, tmp_path):
    """The Hub asks to log in; we say how to hand a token over."""
    verdict = check_here(MODEL, access(hub, tmp_path, None))
    assert (verdict.outcome, verdict.http_status) == (Outcome.NO_TOKEN, 401)
    assert "access.token_file" in verdict.remedy
    assert verdict.token.source == "none"


def test_probe_without_a_token_at_a_public_repository(tmp_path):
    """Nobody has to be known there."""
    with LocalHub([Repo(TINY_REPO, sharded_files(), gated=False)]) as hub:
        assert check_here(MODEL, access(hub, tmp_path, None)).outcome is Outcome.GRANTED


@pytest.mark.parametrize("behaviour", [Behaviour.invalid, Behaviour.expired])
def test_probe_refuses_a_dead_token_at_a_public_repository(tmp_path, behaviour):
    """As it would for the download, so it must not pass here."""
    with LocalHub([Repo(TINY_REPO, sharded_files(), gated=False)]) as hub:
        verdict = check_here(MODEL, access(hub, tmp_path, hub.issue_token(behaviour)))
        assert verdict.outcome is REFUSALS[behaviour][0]


def test_probe_sends_nothing_for_a_broken_token(hub, tmp_path):
    """Its shape is reported before anything is sent."""
    verdict = check_here(MODEL, access(hub, tmp_path, f'"{fake_token()}"'))
    assert (verdict.outcome, verdict.hub_requests) == (Outcome.MALFORMED_TOKEN, 0)
    assert hub.log == []


def test_probe_missing_repository(hub, tmp_path):
    """With a token and without one, and a private one of somebody else."""
    hub.add_repo(Repo("acme/private", single_files(), readers=frozenset({"carol"})))
    config = access(hub, tmp_path, hub.issue_token())
    nobody = AccessConfig(endpoint=hub.url)
    for name in ("acme/none", "acme/private"):
        for who in (config, nobody):
            verdict = check_here(ModelConfig(repo_id=name), who)
            assert verdict.outcome is Outcome.REPO_NOT_FOUND
            assert "model.repo_id" in verdict.remedy


def test_probe_reports_a_missing_revision_even_without_a_grant(hub, tmp_path):
    """The gate answers before existence, so the public description is asked first."""
    model = ModelConfig(repo_id=TINY_REPO, revision="v9/no such")
    for behaviour in (Behaviour.granted, Behaviour.never_asked):
        verdict = check_here(model, access(hub, tmp_path, hub.issue_token(behaviour)))
        assert verdict.outcome is Outcome.REVISION_NOT_FOUND


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}"},
        {"config.json": b"{}", "pytorch_model.bin": b"x" * 64},
        {**single_files(), "model.safetensors.index.json": b"{}"},
        sharded_files(missing="model-00002-of-00002.safetensors"),
        {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {}}'},
        {"config.json": b"{}", "model.safetensors.index.json": b"[]"},
    ],
    ids=["none", "pickles only", "single wins", "absent shard", "empty index", "no index"],
)
def test_probe_wants_complete_weights(tmp_path, files):
    """No safetensors, or a shard of the index that is absent: weights_missing."""
    with LocalHub([Repo(TINY_REPO, files)]) as hub:
        verdict = check_here(MODEL, access(hub, tmp_path, hub.issue_token()))
    whole = "model.safetensors" in files
    assert verdict.outcome is (Outcome.GRANTED if whole else Outcome.WEIGHTS_MISSING)


def test_probe_takes_no_file_that_is_no_safetensors(tmp_path):
    """A login page under the right name is not the weights."""
    with LocalHub([Repo(TINY_REPO, {"model.safetensors": b"<html>" * 9})]) as hub:
        verdict = check_here(MODEL, access(hub, tmp_path, hub.issue_token()))
    assert verdict.outcome is Outcome.WEIGHTS_UNREACHABLE


@pytest.mark.parametrize("behaviour", [Behaviour.cdn_denied, Behaviour.cdn_down])
def test_probe_wants_the_xet_store_to_be_reachable(xet_hub, tmp_path, behaviour):
    """The Hub's yes is not enough where the bytes come from a store that does not answer."""
    config = access(xet_hub, tmp_path, xet_hub.issue_token(behaviour), **IMPATIENT)
    verdict = check_here(MODEL, config)
    assert verdict.outcome is Outcome.WEIGHTS_UNREACHABLE
    assert not any(entry.authorization_leaked for entry in xet_hub.log)


def test_probe_reads_from_the_bridge_without_the_xet_client(xet_hub, tmp_path, monkeypatch):
    """The proof takes the way that the download will take."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    verdict = check_here(MODEL, access(xet_hub, tmp_path, xet_hub.issue_token()))
    assert verdict.outcome is Outcome.GRANTED
    assert {entry.origin for entry in xet_hub.log} == {"hub", "cdn"}


def test_probe_follows_a_renamed_repository_on_the_same_origin(hub, tmp_path):
    """The token stays with the Hub, and the new name is used from then on."""
    hub.rename(TINY_REPO, "acme/renamed")
    token = hub.issue_token()
    verdict = check_here(MODEL, access(hub, tmp_path, token))
    assert (verdict.outcome, verdict.hub_requests) == (Outcome.GRANTED, 4)
    assert_clean(hub, verdict, token)


def test_probe_sends_no_token_to_another_origin(hub, tmp_path):
    """It is not followed for the description, whoever sends us there."""
    with LocalHub([Repo("acme/moved", sharded_files())]) as other:
        hub.rename(TINY_REPO, "acme/moved", origin=other.url)
        verdict = check_here(MODEL, access(hub, tmp_path, hub.issue_token()))
        assert verdict.outcome is Outcome.UNKNOWN
        assert other.log == []


def test_probe_takes_no_other_commit_than_the_pinned_one(hub, tmp_path):
    """A commit the repository does not have is refused, whatever main is."""
    config = access(hub, tmp_path, hub.issue_token())
    assert check_here(MODEL, config, commit="0" * 40).outcome is Outcome.REVISION_NOT_FOUND


def test_probe_asks_a_flaky_hub_again(hub, tmp_path):
    """Two bad gateways do not block a rollout; nor does a short rate limit."""
    for status in (502, 429):
        token = hub.issue_token(Behaviour.flaky, failure_status=status, retry_after_s=1)
        verdict = check_here(MODEL, access(hub, tmp_path, token, deadline_s=20))
        assert verdict.outcome is Outcome.GRANTED


def test_probe_reports_a_long_rate_limit_at_once(hub, tmp_path):
    """Waiting five minutes does not fit into the deadline, so nobody waits at all."""
    token = hub.issue_token(Behaviour.rate_limited, retry_after_s=300)
    began = time.monotonic()
    verdict = check_here(MODEL, access(hub, tmp_path, token))
    assert (verdict.outcome, verdict.http_status) == (Outcome.RATE_LIMITED, 429)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("route", ["info", "resolve", "cdn"])
def test_probe_bounds_a_hang(hub, tmp_path, route):
    """Wherever the silence is, the node has its answer within two thirds of the deadline."""
    token = hub.issue_token(Behaviour.hang, on=[route])
    began = time.monotonic()
    verdict = check_here(MODEL, access(hub, tmp_path, token, **IMPATIENT))
    assert time.monotonic() - began < 3
    storage = route == "cdn"
    assert verdict.outcome is (Outcome.WEIGHTS_UNREACHABLE if storage else Outcome.HUB_UNREACHABLE)
    assert "did not answer" in verdict.hub_message


def test_probe_bounds_silence_below_the_client(monkeypatch, hub, tmp_path):
    """Name resolution has no limit of its own; the probe is left behind then."""
    ends = threading.Event()
    fault = Fault(Outcome.NO_TOKEN, "too late")

    def silent(_access):
        ends.wait(30)
        return ResolvedToken(None, TokenReport(), fault)

    monkeypatch.setattr(probing, "resolve_token", silent)
    began = time.monotonic()
    verdict = check_here(MODEL, access(hub, tmp_path, fake_token(), deadline_s=1.5))
    ends.set()
    assert time.monotonic() - began < 3
    assert verdict.outcome is Outcome.HUB_UNREACHABLE


def test_probe_reports_a_closed_port_as_a_hub_out_of_reach(tmp_path):
    """Exit 4, never `denied`; the fix names the Hub."""
    with LocalHub() as gone:
        url = gone.url
    config = AccessConfig(endpoint=url, **IMPATIENT)
    verdict = check_here(MODEL, config)
    assert verdict.outcome is Outcome.HUB_UNREACHABLE
    assert url in verdict.remedy


def test_probe_proves_nothing_in_offline_mode(hub, tmp_path, monkeypatch):
    """huggingface_hub would read the cache; the cache does not know of a lost grant."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    verdict = check_here(MODEL, access(hub, tmp_path, hub.issue_token()))
    assert verdict.outcome is Outcome.HUB_UNREACHABLE
    assert "HF_HUB_OFFLINE" in verdict.hub_message
    assert hub.log == []


def test_probe_refuses_plain_http_to_another_machine_with_a_token(monkeypatch):
    """HF_ENDPOINT must not send the token in clear text; the remedy speaks of https."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    monkeypatch.setenv("HF_TOKEN", fake_token())
    verdict = check_here(MODEL, AccessConfig())
    assert (verdict.outcome, verdict.hub_requests) == (Outcome.HUB_UNREACHABLE, 0)
    assert "plain http" in verdict.hub_message
    assert "https://" in verdict.remedy
    assert "access.allow_http" in verdict.remedy


@pytest.mark.parametrize(("token", "allowed"), [(None, False), ("some", True)])
def test_probe_asks_a_plain_http_mirror_without_a_token_or_if_allowed(
    monkeypatch, tmp_path, token, allowed
):
    """Inside a cluster nobody has certificates; what is sent in clear text is asked for."""
    with LocalHub([Repo(TINY_REPO, single_files(), gated=False)]) as hub:
        # Another name of this machine, which counts as another machine.
        url = hub.url.replace("127.0.0.1", "mirror.svc")
        resolve = socket.getaddrinfo
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *rest, **more: resolve(
                "127.0.0.1" if host in ("mirror.svc", b"mirror.svc") else host, *rest, **more
            ),
        )
        if token:
            monkeypatch.setenv("HF_TOKEN", hub.issue_token())
        verdict = check_here(MODEL, AccessConfig(endpoint=url, allow_http=allowed))
        assert verdict.outcome is Outcome.GRANTED


def test_probe_over_https_with_an_own_authority(certificates, tmp_path, monkeypatch):
    """Trusted by SSL_CERT_FILE as huggingface_hub trusts it; otherwise reported as TLS."""
    with LocalHub([Repo(TINY_REPO, single_files())], tls=certificates.server) as hub:
        config = access(hub, tmp_path, hub.issue_token())
        untrusted = check_here(MODEL, config)
        assert untrusted.outcome is Outcome.HUB_UNREACHABLE
        assert "TLS certificate" in untrusted.hub_message
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
        assert check_here(MODEL, config).outcome is Outcome.GRANTED


def test_remedy_leads_to_the_license_on_this_hub(hub, tmp_path):
    """One link to click, on the endpoint that was asked."""
    token = hub.issue_token(Behaviour.never_asked, account="alice")
    verdict = check_here(MODEL, access(hub, tmp_path, token))
    assert verdict.url == f"{hub.url}/{TINY_REPO}"
    assert "alice" in verdict.remedy


def test_probe_imports_neither_torch_nor_serve():
    """The probe starts fast, and before a GPU is assigned to anybody."""
    code = "import sys, serve_app.access.hub.probe; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"


def test_check_here_needs_no_hub_for_a_local_directory(tmp_path, hub):
    """`model.path` is checked on this node alone."""
    for name, content in single_files().items():
        (tmp_path / name).write_bytes(content)
    model = ModelConfig(path=str(tmp_path))
    verdict = check_here(model, access(hub, tmp_path, None))
    assert (verdict.outcome, verdict.hub_requests) == (Outcome.GRANTED, 0)
    assert verdict.node_name
    assert hub.log == []
