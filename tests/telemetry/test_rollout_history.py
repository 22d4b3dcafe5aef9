"""The rollout history: what is recorded, in which order, and how much of it stays."""

import json
import time
from dataclasses import replace

import pytest
from ray.exceptions import RayError
from ray.serve.metrics import Counter, Gauge
from structlog.testing import capture_logs

from serve_app.access.verdict import NodeVerdict, Outcome, Verdict
from serve_app.cluster import kv
from serve_app.config import config_hash
from serve_app.telemetry import rollout_history
from serve_app.telemetry.metrics import RolloutMetrics
from serve_app.telemetry.rollout_history import Entry, What, whoami


@pytest.fixture(autouse=True)
def kept(kv_store):
    """What the cluster keeps."""
    return kv_store.held


def record(what, application="llm", **facts):
    rollout_history.record(Entry(application=application, what=what, why="so", who="me", **facts))


def counts(application="llm"):
    return {what: total.count for what, total in rollout_history.totals(application).items()}


def test_totals_count_each_kind_of_each_application():
    """With the time and the length of the last one."""
    for seconds in (1.0, 2.0, 3.0):
        record(What.BLOCKED, duration_s=seconds)
    record(What.DONE, duration_s=30.0)
    record(What.FAILED, "other", duration_s=5.0)
    assert counts() == {"blocked": 3, "done": 1}
    assert rollout_history.totals("llm")["blocked"].duration_s == 3.0
    assert abs(rollout_history.totals("llm")["blocked"].at - time.time()) < 60
    assert counts("nobody") == {}
    assert rollout_history.applications() == ["llm", "other"]


@pytest.mark.parametrize("name", ["a/b", "a", "ä b", "%2F", "a/b/00000001"])
def test_applications_may_have_any_name(name):
    """One whose name begins with another's and a slash is not mistaken for it."""
    record(What.DONE, "a")
    record(What.BLOCKED, name)
    record(What.BLOCKED, "a/b/c")
    assert counts(name)["blocked"] == 1
    assert name in rollout_history.applications()
    assert [e.application for e in rollout_history.entries(name)] == (
        ["a", "a"] if name == "a" else [name]
    )


@pytest.mark.parametrize("behind_s", [0.0, 300.0, 1e8])
def test_record_gives_the_later_entry_the_later_date_whatever_a_clock_says(monkeypatch, behind_s):
    """A build and a command record on machines of their own; an alert compares the dates."""
    monkeypatch.setattr(time, "time", lambda: 1e9)
    record(What.BLOCKED)
    monkeypatch.setattr(time, "time", lambda: 1e9 - behind_s)
    record(What.DONE)
    record(What.BLOCKED)
    record(What.DONE, "other")
    total = rollout_history.totals("llm")
    assert total["blocked"].at > total["done"].at > 1e9
    assert total["blocked"].at < 1e9 + 1
    assert rollout_history.totals("other")["done"].at == 1e9 - behind_s
    dates = [entry.at for entry in rollout_history.entries("llm")]
    assert dates == sorted(set(dates))


def test_record_of_two_at_once_keeps_both(monkeypatch):
    """The number that somebody else took in between is not taken again, and both count."""
    record(What.DONE)
    put, raced = kv.put, []

    def put_late(key, value, **options):
        if not raced:
            raced.append(key)
            record(What.BLOCKED)
        return put(key, value, **options)

    monkeypatch.setattr(kv, "put", put_late)
    record(What.DONE)
    assert [(e.number, e.what) for e in rollout_history.entries("llm")] == [
        (1, "done"),
        (2, "blocked"),
        (3, "done"),
    ]
    assert counts() == {"done": 2, "blocked": 1}


def test_totals_count_what_is_dropped(monkeypatch):
    """The newest entries stay, and those of the versions to go back to; no count shrinks."""
    monkeypatch.setattr(rollout_history, "KEPT", 5)
    record(What.DONE, config={"v": 1})
    record(What.DONE, config={"v": 2})
    for _ in range(20):
        record(What.BLOCKED)
    found = rollout_history.entries("llm")
    assert [entry.number for entry in found] == [1, 2, 18, 19, 20, 21, 22]
    assert counts() == {"done": 2, "blocked": 20}
    assert [e.config for e in rollout_history.versions(found)] == [{"v": 1}, {"v": 2}]
    assert len(found) == len({e.at for e in found})


def test_record_of_one_application_takes_no_other_ones_place(monkeypatch):
    """A busy one drops its own entries alone."""
    monkeypatch.setattr(rollout_history, "KEPT", 3)
    record(What.DONE, "quiet")
    for _ in range(10):
        record(What.BLOCKED, "busy")
    assert len(rollout_history.entries("quiet")) == 1
    assert len(rollout_history.entries("busy")) == 3


def test_record_logs_each_entry_once():
    """Whether the cluster took it or not; a config, whose variables may hold anything, is none."""
    config = {"runtime_env": {"env_vars": {"KEY": "secret"}}}
    with capture_logs() as logs:
        record(What.DONE, commit="c" * 40, config=config, config_hash="0123456789ab")
    (line,) = logs
    assert (line["event"], line["kept"], line["log_level"]) == ("history.recorded", True, "info")
    assert {name: line[name] for name in ("application", "what", "why", "who", "number")} == {
        "application": "llm",
        "what": "done",
        "why": "so",
        "who": "me",
        "number": 1,
    }
    assert "secret" not in json.dumps(logs)


def test_record_loses_only_the_entry_when_the_cluster_does_not_answer(kv_store):
    """A rollout does not fail by being recorded; the log says that the entry is lost."""
    kv_store.is_lost = True
    with capture_logs() as logs:
        record(What.DONE)
    assert [(line["kept"], line["log_level"]) for line in logs] == [(False, "warning")]
    with pytest.raises(RayError):
        rollout_history.totals("llm")


def test_record_makes_the_reason_one_clean_line():
    """A traceback's lines become one; a token is none."""
    token, key = "hf_" + "a" * 34, "Bearer " + "k" * 20
    entry = Entry(
        application="llm",
        what=What.FAILED,
        why=f"a\n  b {token} {key}\x1b[31m" + "x" * 900,
        who="me",
    )
    with capture_logs() as logs:
        rollout_history.record(entry)
    (kept,) = rollout_history.entries("llm")
    assert kept.why.startswith("a b [secret] Bearer [secret]")
    assert len(kept.why) <= 400
    assert kept.why.isprintable()
    assert token not in json.dumps(logs)


def test_entries_of_a_newer_version_of_the_package_are_read(kept):
    """A cluster outlives an upgrade, and while it lasts both versions read and write."""
    record(What.DONE)
    (key,) = kept
    newer = json.loads(kept[key]) | {"what": "canary_failed", "region": "eu"}
    kept[key] = json.dumps(newer).encode()
    record(What.BLOCKED)
    assert [entry.what for entry in rollout_history.entries("llm")] == ["canary_failed", "blocked"]
    assert counts() == {"done": 1, "blocked": 1}


def verdict(**outcomes):
    nodes = [
        NodeVerdict(f"id-{name}", name, outcome, "fix", commit="c" * 40)
        for name, outcome in outcomes.items()
    ]
    return Verdict("acme/tiny", "main", "c" * 40, "https://hub", 0.1, tuple(nodes))


def grants(**outcomes):
    """Let a watch see these outcomes; returns what is recorded from then on."""
    before = len(rollout_history.entries("llm"))
    rollout_history.record_grants("llm", verdict(**outcomes))
    return [(e.what.value, e.why) for e in rollout_history.entries("llm")[before:]]


YES, NO, MAYBE = Outcome.GRANTED, Outcome.EXPIRED_TOKEN, Outcome.HUB_UNREACHABLE


def test_record_grants_records_a_lost_grant_once_whichever_ingress_saw_it():
    """Each ingress watches, with rounds of its own, that may see a part of what changed."""
    assert grants(a=YES, b=YES) == []
    assert grants(a=NO, b=YES) == [("access_lost", "expired_token on a")]
    assert grants(a=NO, b=YES) == []
    assert grants(a=NO, b=Outcome.NO_TOKEN) == [("access_lost", "no_token on b")]
    assert grants(a=YES, b=YES) == [("access_regained", "granted on a, b")]
    assert grants(a=YES, b=YES) == []
    last = rollout_history.entries("llm")[-1]
    assert (last.who, last.commit) == ("watch", "c" * 40)


def test_record_grants_ignores_an_outcome_between_yes_and_no():
    """A Hub that is down for an hour is no lost grant, and no regained one."""
    assert grants(a=MAYBE, b=NO) == [("access_lost", "expired_token on b")]
    assert grants(a=YES, b=MAYBE) == []
    assert grants(a=YES, b=YES) == [("access_regained", "granted on b")]


def test_record_grants_in_one_round_may_lose_and_regain():
    """Two entries; a node that left is in neither."""
    grants(a=NO, b=YES, gone=NO)
    assert grants(a=YES, b=NO) == [
        ("access_lost", "expired_token on b"),
        ("access_regained", "granted on a"),
    ]
    assert rollout_history.entries("llm")[-1].refused == {"b": "expired_token"}


def test_record_grants_forgets_no_loss_for_rollouts_between_two_rounds():
    """But an approval, for which every node proved its access."""
    grants(a=NO)
    record(What.BLOCKED)
    assert grants(a=NO) == []
    record(What.APPROVED)
    assert grants(a=NO) == [("access_lost", "expired_token on a")]


def test_record_grants_of_no_node_or_a_deferred_one_are_no_loss():
    """Where no node is there yet, nothing was granted."""
    nodes = (
        NodeVerdict("", "(no node)", Outcome.PROBE_FAILED, "fix"),
        NodeVerdict("id", "later", Outcome.NO_TOKEN, "fix", deferred=True),
    )
    rollout_history.record_grants("llm", replace(verdict(), nodes=nodes))
    assert rollout_history.entries("llm") == []


def test_record_grants_counts_many_nodes_in_the_sentence():
    """Their outcomes are kept all the same."""
    ((_, why),) = grants(**{f"n{number:02}": NO for number in range(20)})
    assert why == "expired_token on n00, n01, n02, n03, n04, n05, n06, n07 and 12 more"
    assert len(rollout_history.entries("llm")[-1].refused) == 20


def test_record_grants_without_a_cluster_says_nothing(kv_store):
    """It does not know what is new; the next round does."""
    kv_store.is_lost = True
    with capture_logs() as logs:
        rollout_history.record_grants("llm", verdict(a=NO))
    assert logs == []
    kv_store.is_lost = False
    assert grants(a=NO) == [("access_lost", "expired_token on a")]


def test_whoami_names_the_ci_identity_before_the_user(monkeypatch):
    """A runner's user is the same for everybody; with the host in any case."""
    for name in rollout_history.CI_IDENTITIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rollout_history.socket, "gethostname", lambda: "host-1")
    monkeypatch.setattr(rollout_history.getpass, "getuser", lambda: "alice")
    assert whoami() == "alice on host-1"
    monkeypatch.setenv("GITHUB_ACTOR", "")
    assert whoami() == "alice on host-1"
    monkeypatch.setenv("GITHUB_ACTOR", "octocat\n")
    assert whoami() == "octocat (GITHUB_ACTOR) on host-1"


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("no user")])
def test_whoami_without_a_user_name_is_the_number(monkeypatch, error):
    """A container's arbitrary user; Python 3.11 and 3.13 raise different errors."""
    for name in rollout_history.CI_IDENTITIES:
        monkeypatch.delenv(name, raising=False)

    def fail():
        raise error

    monkeypatch.setattr(rollout_history.getpass, "getuser", fail)
    monkeypatch.setattr(rollout_history.os, "getuid", lambda: 1234)
    assert whoami().startswith("uid 1234 on ")


def test_config_hash_is_of_the_content():
    """Not of the order of its keys."""
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert len(config_hash({})) == 12


def test_rollout_metrics_counter_grows_by_what_is_new(monkeypatch):
    """A new ingress begins with all that was counted before; the gauges are set each time."""
    added, was_set = [], []
    monkeypatch.setattr(Counter, "inc", lambda _self, value, tags: added.append((value, tags)))
    monkeypatch.setattr(Gauge, "set", lambda _self, value, tags: was_set.append((value, tags)))
    shown = RolloutMetrics()
    for count in (3, 3, 5):
        shown.show("blocked", count=count, at=100.0, duration_s=2.0)
    assert added == [(3, {"result": "blocked"}), (2, {"result": "blocked"})]
    assert was_set == [(100.0, {"result": "blocked"}), (2.0, {"result": "blocked"})] * 3
