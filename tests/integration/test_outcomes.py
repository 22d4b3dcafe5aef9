"""Each answer of the Hub through a real rollout: one build, its table in the status, no bytes."""

import re
import time

import pytest

from scripts.local_hub import Behaviour, LocalHub, Repo
from scripts.local_hub.exchange import Publisher, identity_token
from scripts.local_hub.mirrors import artifactory
from tests.conftest import TINY_REPO, tiny_files
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.test_check import CASES
from tests.ports import free_port
from tests.signing import Signer

pytestmark = pytest.mark.cluster

BLOCKED = {b: outcome for b, (outcome, code, _) in CASES.items() if code != 0}
# One answer of the Hub, and all in which a connection takes part; the others' words are the same.
OVER_TLS = (Behaviour.never_asked, Behaviour.cdn_denied, Behaviour.cdn_down, Behaviour.hang)


class Rollouts:
    """One Serve instance that is asked for one rollout after the other."""

    def __init__(self, hub, outcomes):
        from ray import serve

        self.hub, self.outcomes = hub, outcomes
        self.token = hub.issue_token(Behaviour.granted)
        self.number = 0
        port = free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})

    def blocked(self, token_file, model=None, access=None):
        """Roll out and return the status message and the seconds until it was there."""
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        self.number += 1
        args = {
            "model": {"repo_id": TINY_REPO, "served_name": f"try-{self.number}", **(model or {})},
            "access": {
                "endpoint": self.hub.url,
                **({} if token_file is None else {"token_file": str(token_file)}),
                "timeout_s": 1,
                "deadline_s": 6,
                **(access or {}),
            },
            "replica": {"num_gpus": 1},
        }
        app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
        began = time.monotonic()
        _get_global_client().deploy_apps(
            ServeDeploySchema.model_validate({"applications": [app]}), _blocking=False
        )
        while time.monotonic() - began < 30:
            status = serve.status().applications.get("llm")
            if status and status.status == "DEPLOY_FAILED" and self.hub.log:
                return status.message, time.monotonic() - began
            time.sleep(0.05)
        raise AssertionError(f"not blocked: {status}")


@pytest.fixture(scope="module", params=["http", "https"])
def rollouts(request, certificates):
    tls = certificates.server if request.param == "https" else None
    outcomes = {b: BLOCKED[b] for b in OVER_TLS} if tls else BLOCKED
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificates.authority))
        hub = LocalHub([Repo(TINY_REPO, tiny_files())], tls=tls)
        with hub, cluster_of(LogicalNode("worker")):
            yield Rollouts(hub, outcomes)


def test_build_blocked_by_each_refusal_shows_its_table(rollouts, tmp_path):
    """Every outcome stands in `serve status`, over http and https, and no weights are sent."""
    assert len(BLOCKED) >= 12
    file = tmp_path / "token"
    file.write_text(rollouts.token)
    seconds = {}
    for behaviour, outcome in rollouts.outcomes.items():
        rollouts.hub.set_behaviour(rollouts.token, behaviour)
        rollouts.hub.clear_log()
        message, seconds[outcome] = rollouts.blocked(file)
        assert re.search(rf"^  worker +{outcome} ", message, re.MULTILINE), (behaviour, message)
        assert re.search(r"Access (BLOCKED|NOT PROVEN): 1 of 1 node", message)
        assert "Fix: " in message
        assert "Traceback" not in message
        assert rollouts.token not in message
        assert sum(entry.bytes_sent for entry in rollouts.hub.log if entry.status == 206) <= 9
    assert len(seconds) == len(set(rollouts.outcomes.values()))
    assert max(seconds.values()) < 20, seconds


def test_build_blocked_by_each_refusal_of_our_own_shows_its_table(rollouts, tmp_path):
    """License, digest, identity and signature: one sentence each, and not a byte of the weights."""
    token, identity = tmp_path / "token", tmp_path / "identity"
    token.write_text(rollouts.token)
    rollouts.hub.set_behaviour(rollouts.token, Behaviour.granted)
    rollouts.hub.publishers.trust("alice", Publisher("https://oidc.example", "right"))
    identity.write_text(identity_token("https://oidc.example", "wrong"))
    named = {"token_file": str(identity), "resource": "user/alice"}
    cases = {
        "license_not_allowed": (token, None, {"license": {"allow": ["mit"]}}, "allowed are mit"),
        "digest_mismatch": (
            token,
            {"digest": f"sha256:{'0' * 64}"},
            None,
            "have the digest sha256",
        ),
        "identity_refused": (None, None, {"identity": named}, "sub wrong"),
        "signature_invalid": (
            token,
            None,
            {"signature": {"public_key": str(Signer(tmp_path).public)}},
            "there is no model.sig",
        ),
    }
    for outcome, (file, model, access, words) in cases.items():
        rollouts.hub.clear_log()
        message, _ = rollouts.blocked(file, model, access)
        assert re.search(rf"^  worker +{outcome} ", message, re.MULTILINE), message
        assert "Access BLOCKED: 1 of 1 node" in message
        assert words in " ".join(message.split())
        assert "Fix: " in message
        assert "Traceback" not in message
        assert not any(entry.origin != "hub" for entry in rollouts.hub.log)


def test_build_blocked_by_a_mirror_that_cannot_prove_the_commit(rollouts, tmp_path):
    """It says whose answer it was and what is missing, and sends no more than nine bytes."""
    token = tmp_path / "token"
    token.write_text("mine")
    other = {"config.json": b"{}"}
    rollouts.hub.answer_as(artifactory(rollouts.token, tokens=["mine"], others=other))
    rollouts.hub.clear_log()
    try:
        message, _ = rollouts.blocked(token)
    finally:
        rollouts.hub.answer_as(None)
    assert re.search(r"^  worker +unknown ", message, re.MULTILINE), message
    said = " ".join(message.split())
    assert "config.json came with other bytes than are listed" in said
    assert "Fix: Artifactory does not prove here what the Hub does" in said
    assert sum(entry.bytes_sent for entry in rollouts.hub.log if entry.status == 206) <= 9
