"""Four nodes with an identity each and no stored secret: blocked, renewed, and noticed at once."""

import re
import time

import httpx
import pytest

from scripts.local_hub import LocalHub, Repo
from scripts.local_hub.exchange import Publisher, identity_token
from serve_app.telemetry import rollout_history
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import QUESTION, REPO, SERVING, Service, until
from tests.stores import READ, URL, local_s3

pytestmark = pytest.mark.cluster

ISSUER = "https://oidc.example/cluster-1"
SUBJECT = "system:serviceaccount:llm:serve-app"
WRONG = "system:serviceaccount:llm:default"
NAMES = ("a", "b", "c", "d")
LIFETIME_S = 20
AT_ONCE_S = 10
ACCESS = {"identity": {"token_file": "~/identity", "resource": "user/alice"}}


class Identities:
    """The identity tokens of the nodes, as something outside keeps them in their files."""

    def __init__(self, folder):
        self.folder = folder
        self.written = []
        for name in NAMES:
            (folder / name).mkdir()
            self.write(name)

    def write(self, name, subject=SUBJECT, **claims):
        token = identity_token(ISSUER, subject, **claims)
        self.written.append(token)
        new = self.folder / name / "new"
        new.write_text(token)
        new.replace(self.folder / name / "identity")


@pytest.fixture(scope="module")
def identities(tmp_path_factory):
    return Identities(tmp_path_factory.mktemp("homes"))


@pytest.fixture(scope="module")
def service(tiny_model_dir, identities):
    """The first version runs on node a."""
    with LocalHub([Repo.from_dir(REPO, tiny_model_dir, gated="manual")]) as hub:
        hub.publishers.trust("alice", Publisher(ISSUER, SUBJECT, lifetime_s=LIFETIME_S))
        nodes = [
            LogicalNode(
                name,
                labels={**SERVING, "is": name},
                num_gpus=0,
                env={"HOME": str(identities.folder / name)},
            )
            for name in NAMES
        ]
        with cluster_of(*nodes) as running:
            service = Service(hub, running, {})
            service.deploy(replicas=1, selector={"is": "a"}, access=ACCESS)
            yield service


def shown(service):
    return {node["node_name"]: node for node in httpx.get(f"{service.url}/access").json()["nodes"]}


def test_identity_of_one_wrong_subject_blocks_with_its_claims(service, identities):
    """Three nodes are granted, the old version answers throughout."""
    identities.write("d", WRONG)
    before = service.builds()
    with service.under_load() as answered:
        service.put(served_name="second", replicas=1, selector=SERVING, access=ACCESS)
        message = service.wait_for_build(before, "DEPLOY_FAILED", timeout_s=60).message
    rows = dict(re.findall(r"^  ([\w-]+) +([a-z_]+) +\S+", message, re.MULTILINE))
    assert rows == {"a": "granted", "b": "granted", "c": "granted", "d": "identity_refused"}
    words = " ".join(message.split())
    assert "was refused (400: invalid_grant" in words
    assert f"sub {WRONG}" in words
    assert "different tokens" not in words
    assert answered
    assert set(answered) == {200}
    assert service.builds() - before == 1


def test_identity_that_is_dead_is_noticed_at_once_and_nothing_running_is_touched(
    service, identities, record_testsuite_property
):
    """And its return likewise, with a renewed token; another subject is news of its own."""
    earlier = len(rollout_history.entries("llm"))  # of node d as well, if an ingress runs there
    with service.under_load() as answered:
        time.sleep(2)  # the ingress has looked at what was announced before
        for dead, words in (({"exp": 1000}, "is expired"), ({"subject": WRONG}, f"sub {WRONG}")):
            identities.write("a", **dead)
            lost_s = until(lambda: shown(service)["a"]["outcome"] == "identity_refused", AT_ONCE_S)
            assert words in shown(service)["a"]["hub_message"]
            identities.write("a")
            until(lambda: shown(service)["a"]["outcome"] == "granted", AT_ONCE_S)
    record_testsuite_property("seconds_until_a_dead_identity_is_shown", round(lost_s, 1))
    assert answered
    assert set(answered) == {200}
    recorded = rollout_history.entries("llm")[earlier:]
    kinds = [entry.what for entry in recorded]
    assert kinds[:2] == ["access_lost", "access_regained"]
    assert sorted(kinds[2:]) == [
        "access_lost",
        "access_regained",
        "token_changed",
        "token_changed",
    ]
    changed = next(entry for entry in recorded if entry.what == "token_changed")
    assert changed.why.startswith("the identity token's file, ")
    assert " on " in changed.who
    assert service.logged("access.file_changed")


def test_identity_leaves_no_secret_of_an_exchange_anywhere(service, identities):
    """Not in Ray's session: logs, configs, the store's snapshot."""
    session = service.logs.parent
    secrets = [token.encode() for token in identities.written]
    for path in session.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"hf_oauth_" not in content, path
            assert not any(secret in content for secret in secrets), path


@pytest.fixture
def s3(identities, tiny_model_dir):
    """A store with the model, and what each node has of it: `~/.aws/credentials`, or nothing."""
    rights = {"a": READ, "b": READ, "c": READ[:1]}
    with local_s3() as running:
        running.put({path.name: path for path in tiny_model_dir.iterdir()})
        for name, actions in rights.items():
            lines = [f"{key.lower()} = {value}" for key, value in running.user(*actions).items()]
            (identities.folder / name / ".aws").mkdir()
            (identities.folder / name / ".aws/credentials").write_text(
                "\n".join(["[default]", *lines])
            )
        yield running


def test_model_in_a_store_is_proven_by_each_node_and_served(service, s3):
    """Two nodes may read it, one may only list it, one has no credentials: then the first alone."""
    app = service.config(served_name="stored", replicas=1, selector=SERVING)
    app["args"] |= {"model": {"url": URL, "served_name": ["smol", "stored"]}}
    app["args"]["access"] = {"endpoint": s3.url, "watch_interval_s": 3600}
    before = service.builds()
    with service.under_load() as answered:
        service.put_app(app)
        message = service.wait_for_build(before, "DEPLOY_FAILED", timeout_s=60).message
        rows = dict(re.findall(r"^  ([\w-]+) +([a-z_]+) +\S+", message, re.MULTILINE))
        assert rows == {"a": "granted", "b": "granted", "c": "token_scope", "d": "no_token"}
        assert "403 AccessDenied to GetObject" in message
        app["args"]["replica"]["label_selector"] = {"is": "in(a,b)"}
        service.put_app(app)
        status = service.wait("RUNNING", timeout_s=120)
        until(lambda: [state for state, _ in service.replicas()] == ["RUNNING"], 60)
    assert status.status == "RUNNING", status.message
    assert set(answered) == {200}
    found = httpx.get(f"{service.url}/access").json()
    assert found["repo_id"] == URL
    assert len(found["commit"]) == 64
    assert {node["token"]["source"] for node in found["nodes"]} == {"s3:shared-credentials-file"}
    with service.client() as client:
        answer = client.chat.completions.create(model="stored", messages=QUESTION, max_tokens=4)
    assert answer.usage.completion_tokens > 0
