"""A file that changes is one entry of the history, with whose it is; grants go on as they were."""

from dataclasses import replace
from unittest.mock import Mock

import pytest

from scripts.local_hub.exchange import identity_token
from serve_app.access.file_watch import Change
from serve_app.access.verdict import Outcome, Verdict
from serve_app.cluster.placement import Placement
from serve_app.config import AccessConfig, AppConfig, EngineConfig, ModelConfig
from serve_app.deployments import files
from serve_app.telemetry import rollout_history
from tests.access.cases import COMMIT, granted, verdict

CHANGE = Change("token", "/run/token", "1-2-3", "alice")
ACCESS = AccessConfig(token_file="/run/token")
CONFIG = AppConfig(model=ModelConfig(repo_id="acme/tiny"))


def whole(*nodes):
    return Verdict("acme/tiny", COMMIT, COMMIT, "https://hub", 0.5, nodes)


@pytest.mark.parametrize(("adapters", "watched"), [((), set()), (("x",), {"token"})])
def test_watch_files_watches_the_token_of_an_adapter(monkeypatch, adapters, watched):
    """Of a model in a directory too: its adapters are asked for at the Hub."""
    seen = []
    monkeypatch.setattr(files, "FileWatch", lambda paths, _on_change: seen.append(paths) or Mock())
    monkeypatch.setattr(files.ray, "get_runtime_context", Mock())
    named = [{"name": name, "repo_id": f"acme/{name}"} for name in adapters]
    model = ModelConfig.model_validate({"path": "/models/tiny", "adapters": named})
    config = AppConfig(model=model, access=ACCESS, engine=EngineConfig(backend="vllm"))
    files.watch_files("llm", config)
    assert seen[0].keys() == watched


def test_on_change_of_records_a_change_once_with_its_owner(kv_store):
    """However many processes of the node see it."""
    for _ in range(2):
        files.on_change_of("llm", "n1", ACCESS)(CHANGE)
    files.on_change_of("llm", "n1", ACCESS)(
        replace(CHANGE, kind="keys", path="/run/keys", stamp="gone")
    )
    token, keys = rollout_history.entries("llm")
    assert (token.what, token.why) == ("token_changed", "the token's file, /run/token, changed")
    assert token.who.startswith("alice on ")
    assert (keys.what, keys.why) == ("keys_changed", "the file of API keys, /run/keys, is gone")


def test_on_change_of_does_not_hide_who_was_refused(kv_store):
    """The grant that comes back after it is still news."""
    rollout_history.record_grants("llm", whole(verdict("a", Outcome.INVALID_TOKEN)))
    files.on_change_of("llm", "id-a", ACCESS)(CHANGE)
    rollout_history.record_grants("llm", whole(granted("a")))
    kinds = [entry.what for entry in rollout_history.entries("llm")]
    assert kinds == ["access_lost", "token_changed", "access_regained"]


def test_on_change_of_ignores_a_fresh_token_of_the_same_identity(kv_store, tmp_path):
    """The kubelet renews it every hour; another subject, or none, is recorded."""
    file = tmp_path / "identity"
    file.write_text(identity_token("https://oidc.example", "right"))
    named = {"token_file": str(file), "resource": "user/alice"}
    on_change = files.on_change_of("llm", "n1", AccessConfig(identity=named))
    for stamp, subject in enumerate(["right", "wrong", "wrong", None]):
        file.write_text("" if subject is None else identity_token("https://oidc.example", subject))
        on_change(replace(CHANGE, kind="identity", stamp=str(stamp)))
    assert [entry.what for entry in rollout_history.entries("llm")] == ["token_changed"] * 2


def test_record_grants_of_adapters_by_their_names(kv_store):
    """A node may lose one and keep the other."""
    base = whole(granted("a"))
    lost = whole(verdict("a", Outcome.REQUEST_RESET))
    rollout_history.record_grants("llm", replace(base, adapters={"legal": lost}))
    rollout_history.record_grants("llm", replace(base, adapters={"legal": base}))
    first, second = rollout_history.entries("llm")
    assert (first.what, first.why) == ("access_lost", "request_reset on a (legal)")
    assert (second.what, second.why) == ("access_regained", "granted on a (legal)")


def test_recheck_nodes_of_adapters(kv_store, monkeypatch):
    """A node's new answers replace its old ones, of each repository by itself."""
    before = replace(whole(granted("a"), granted("b")), adapters={"x": whole(granted("a"))})
    now = whole(verdict("a", Outcome.INVALID_TOKEN))
    found = replace(now, adapters={"x": now})
    monkeypatch.setattr(files, "preflight", lambda *_, **__: found)
    monkeypatch.setattr(files, "placements_of", lambda _: ())
    after = files.recheck_nodes("llm", CONFIG, COMMIT, before, frozenset({"id-a"}))
    assert [node.outcome for node in after.nodes] == ["invalid_token", "granted"]
    assert [node.outcome for node in after.adapters["x"].nodes] == ["invalid_token"]


def test_recheck_nodes_asks_only_those_that_changed(kv_store, monkeypatch):
    """The others keep their answers; a node that no replica may run on changes nothing."""
    asked = []

    def preflight(config, *, placements, only):
        asked.append((config.model.revision, only))
        return whole(*(verdict("b", Outcome.INVALID_TOKEN) for node in only if node == "id-b"))

    monkeypatch.setattr(files, "preflight", preflight)
    monkeypatch.setattr(files, "placements_of", lambda _: [Placement({}, {})])
    before = whole(granted("a"), granted("b"))
    after = files.recheck_nodes("llm", CONFIG, COMMIT, before, frozenset({"id-b"}))
    assert [node.outcome for node in after.nodes] == ["granted", "invalid_token"]
    assert asked == [(COMMIT, {"id-b"})]
    assert [entry.why for entry in rollout_history.entries("llm")] == ["invalid_token on b"]
    assert (
        files.recheck_nodes("llm", CONFIG, COMMIT, after, frozenset({"head"})).nodes == after.nodes
    )
