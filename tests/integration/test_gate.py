"""The gate in front of other people's applications."""

import importlib.util

import httpx
import pytest

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access.preflight import RolloutBlocked
from serve_app.errors import ConfigError
from serve_app.gate import check, require_repo_access
from tests.conftest import TINY_REPO, tiny_files
from tests.integration.conftest import LogicalNode, cluster_of
from tests.integration.service import Service

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def service():
    with LocalHub([Repo(TINY_REPO, tiny_files())]) as hub:
        token = hub.issue_token(Behaviour.granted)
        with cluster_of(LogicalNode("worker", token)) as running:
            yield Service(hub, running, {"worker": token})


def roll_out(service, builder, **args):
    """Hand an application of `foreign_apps` to Serve and return its final status."""
    before = service.builds()
    access = {"endpoint": service.hub.url}
    service.put_app(
        {
            "name": "llm",
            "import_path": f"tests.integration.foreign_apps:{builder}",
            "args": {"repo_id": TINY_REPO, "access": access, **args},
        }
    )
    return service.wait_for_build(before, "RUNNING", "DEPLOY_FAILED", timeout_s=60)


def test_gate_of_a_plain_application_lets_it_roll_out_or_not(service):
    """Granted: it serves the proven commit; refused: the table, and the old one serves on."""
    assert roll_out(service, "plain", round=1).status == "RUNNING"
    commit = service.hub.commits()[TINY_REPO]["main"]
    assert httpx.get(service.url).text == commit
    service.hub.set_behaviour(service.tokens["worker"], Behaviour.never_asked)
    status = roll_out(service, "plain", round=2)
    service.hub.set_behaviour(service.tokens["worker"], Behaviour.granted)
    assert status.status == "DEPLOY_FAILED"
    assert "Access BLOCKED: 1 of 1 node cannot read acme/tiny-llama" in status.message
    assert "Traceback" not in status.message
    assert httpx.get(service.url).text == commit


def test_gate_comes_before_the_builder_of_ray_serve_llm(service):
    """Refused, its builder is never reached; granted, it is (here it lacks its own packages)."""
    service.hub.set_behaviour(service.tokens["worker"], Behaviour.pending)
    refused = roll_out(service, "llm", round=3)
    service.hub.set_behaviour(service.tokens["worker"], Behaviour.granted)
    assert "request_pending" in refused.message
    assert "Traceback" not in refused.message
    if importlib.util.find_spec("pyarrow") is None:
        reached = roll_out(service, "llm", round=4)
        assert "ModuleNotFoundError" in reached.message
        assert "ray/llm" in reached.message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"replica": {"gpus": 1}}, "args.replica.gpus: unknown key"),
        ({"access": {"endpoint": "hub.corp"}}, "is not a URL"),
    ],
)
def test_gate_blocks_a_wrong_argument_with_its_correction(arguments, words):
    """A typo in a builder must not let anything through."""
    with pytest.raises(RolloutBlocked, match=words):
        require_repo_access(TINY_REPO, **arguments)


def test_check_returns_the_clusters_verdict_and_blocks_nothing(service):
    """For a script or a notebook: the rows, and the fix; a wrong argument is an error."""
    access = {"endpoint": service.hub.url}
    service.hub.set_behaviour(service.tokens["worker"], Behaviour.never_asked)
    verdict = check(TINY_REPO, access=access)
    service.hub.set_behaviour(service.tokens["worker"], Behaviour.granted)
    assert (verdict.approved, verdict.exit_code) == (False, 3)
    assert "license_not_accepted" in verdict._repr_html_()
    assert check(TINY_REPO, access=access).approved
    with pytest.raises(ConfigError, match="not a Hub repository"):
        check("a/b/c")
