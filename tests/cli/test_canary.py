"""A release in steps over a scripted Serve: what it does to the cluster, and what it leaves."""

from contextlib import contextmanager

import pytest

from serve_app.access.verdict import NodeVerdict, Outcome, Verdict
from serve_app.cli import canary, deploy, main, release
from serve_app.cli.deploy import Options
from serve_app.cli.options import parser_of
from serve_app.cli.release import release_of
from serve_app.deployments import canary as store
from serve_app.deployments.canary import Canary
from serve_app.errors import ConfigError
from serve_app.rollout.canary import Judged, Step
from serve_app.rollout.deploy import Result
from serve_app.rollout.serve_client import AppState
from serve_app.serve_config import CANARY_IMPORT_PATH, IMPORT_PATH, served
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import What

OPTIONS = Options(60.0)


def app(version, **more):
    args = {"model": {"repo_id": "acme/tiny"}, "api": {"max_queued_requests": version}}
    return {"name": "llm", "import_path": IMPORT_PATH, "args": args, **more}


OTHER = {"name": "other", "import_path": "x:y", "route_prefix": "/other"}


class Serving:
    """A Serve that runs what is applied."""

    def __init__(self):
        self.applications = [app(1), OTHER]
        self.applied = []
        self.verdicts, self.steps, self.locks = [], [], []
        self.starts = Result("done", "", 1.0)

    def goal(self):
        return {"applications": list(self.applications)}

    def apply(self, goal):
        self.applied.append(sorted(each["name"] for each in goal["applications"]))
        self.applications = goal["applications"]

    def states(self):
        return {each["name"]: AppState("RUNNING", "", 1.0) for each in self.applications}


@pytest.fixture
def cluster(kv_store, monkeypatch):
    """A cluster whose canaries start, and whose steps end as the test says."""
    serving = Serving()

    def rolled_out(_serving, goal, **_):
        serving.apply(goal)
        return serving.starts

    def step(trial, step, *_):
        trial.begin(step)
        now = store.read("llm")
        serving.steps.append((step.words, now.share, now.shadow))
        verdict = serving.verdicts.pop(0)
        if isinstance(verdict, BaseException):
            raise verdict
        return Judged(verdict, "numbers", 2.0)

    @contextmanager
    def lock(name="rollout", **_):
        serving.locks.append(name)
        yield

    for module in (canary, deploy):
        monkeypatch.setattr(module, "Instance", lambda _goal: serving)
        monkeypatch.setattr(module, "rollout_lock", lock)
        monkeypatch.setattr(module, "deploy", rolled_out)
    monkeypatch.setattr(canary, "run_step", step)
    monkeypatch.setattr(canary, "LOOK_S", 0.0)
    for module in (release, deploy):
        monkeypatch.setattr(module, "needs", lambda *_: ())
    return serving


def verdict(commit="c" * 40):
    node = NodeVerdict("id", "n1", Outcome.GRANTED, "", commit=commit)
    return {"llm": Verdict("acme/tiny", "main", commit, "http://hub", 0.5, (node,))}


def options(*given):
    return parser_of(main.RUNS).parse_args(["deploy", "app.yaml", *given])


def run(*given, file=None, how=OPTIONS):
    file = file or {"applications": [app(2)]}
    return canary.run(file, served(file), verdict(), how, release_of(options(*given)))


def history():
    return [(entry.what, entry.why) for entry in rollout_history.entries("llm")]


def test_run_brings_a_good_canary_to_all(cluster):
    """Step by step, beside what serves; the commits that were tried are to be rolled out."""
    cluster.verdicts = ["good", "good"]
    tried = run("--canary", "5,25,100", "--canary-replicas", "2")
    assert tried.commits == {"": "c" * 40}
    assert cluster.steps == [("5 %", 0.05, 0.0), ("25 %", 0.25, 0.0)]
    assert cluster.applied == [["llm", "llm-canary", "other"]]
    (new,) = [each for each in cluster.applications if each["name"] == "llm-canary"]
    assert (new["import_path"], new["route_prefix"]) == (CANARY_IMPORT_PATH, None)
    assert new["args"]["replica"] == {"min_replicas": 2, "max_replicas": 2}
    assert cluster.locks == ["canary of llm", "rollout"]
    assert [why for _, why in history()] == [
        "5 %: begun",
        "good: 5 %: numbers",
        "25 %: begun",
        "good: 25 %: numbers",
    ]
    assert {what for what, _ in history()} == {What.CANARY}
    assert store.read("llm").share == 0.25

    file = {"applications": [app(2)]}
    assert canary.finish(file, served(file), verdict(), OPTIONS, tried) == 0
    assert cluster.applied[-1] == ["llm", "other"]
    assert app(2) in cluster.applications
    assert history()[-1] == (What.DONE, "it runs and answered")
    assert store.under_way() == []


@pytest.mark.parametrize("now", [None, Canary("llm-canary", "another trial")])
def test_finish_of_a_canary_that_was_taken_back(cluster, now, capsys):
    """By somebody else, while the gate was asked again: the word that came last counts."""
    cluster.verdicts = ["good"]
    tried = run("--canary", "5,100")
    assert canary.take_back("llm", OPTIONS) == 0
    if now is not None:
        store.write("llm", now)
    applied = list(cluster.applied)
    file = {"applications": [app(2)]}
    assert canary.finish(file, served(file), verdict(), OPTIONS, tried) == 5
    assert "somebody else has taken the canary back" in "".join(capsys.readouterr())
    assert cluster.applied == applied
    assert store.read("llm") == now


def test_run_takes_a_bad_canary_away(cluster, capsys):
    """Its share is 0 before anything else; what served goes on, and the reason is the end."""
    cluster.verdicts = ["good", "bad"]
    assert run("--canary", "5,25,100") == 5
    assert cluster.applied == [["llm", "llm-canary", "other"], ["llm", "other"]]
    assert app(1) in cluster.applications
    assert history()[-1] == (What.ROLLED_BACK, "bad: 25 %: numbers")
    assert store.under_way() == []
    assert "25 %: numbers" in capsys.readouterr().out


def test_run_takes_a_canary_away_that_does_not_start(cluster):
    """Nothing was asked of it."""
    cluster.starts = Result("rolled_back", "no such file", 1.0)
    assert run("--canary", "5,100") == 5
    assert cluster.steps == []
    assert history() == [(What.ROLLED_BACK, "no such file")]
    assert store.under_way() == []


def test_run_leaves_a_canary_that_is_not_decided(cluster, capsys):
    """Exit 4, with both ways; going on begins with the step that was not decided."""
    cluster.verdicts = ["good", "few"]
    assert run("--shadow", "10", "--canary", "5,25,100") == 4
    output = capsys.readouterr().out
    assert "go on with `serve-app deploy app.yaml --canary 5,25,100`" in output
    assert "go back with `serve-app rollback llm`" in output
    assert store.read("llm").share == 0.05
    assert cluster.steps == [("copies of 10 %", 0.0, 0.1), ("5 %", 0.05, 0.0)]
    trial = store.read("llm").trial

    cluster.verdicts = ["good", "good"]
    assert run("--canary", "5,25,100").commits == {"": "c" * 40}
    assert len(cluster.applied) == 1, "the canary was there"
    assert store.read("llm").trial == trial
    assert store.read("llm").step == 4


def test_run_leaves_the_canary_at_ctrl_c(cluster, capsys):
    """And says how to go on and how to go back."""
    cluster.verdicts = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        run("--canary", "5,25,100")
    assert store.read("llm").share == 0.05
    assert (
        "llm-canary stays as it is; go on with `serve-app deploy app.yaml --canary 5,25,100`, "
        "go back with `serve-app rollback llm`"
    ) in capsys.readouterr().err


def test_run_stays_at_a_last_step_below_all(cluster, capsys):
    """Somebody wants to decide about the last one; that needs the same canary."""
    cluster.verdicts = ["good"]
    assert run("--canary", "5") == 0
    assert "llm-canary stays at 5 %; go on with" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"tries another config .* serve-app rollback llm"):
        run("--canary", "100", file={"applications": [app(3)]})
    assert run("--canary", "100").commits == {"": "c" * 40}


def test_run_leaves_a_canary_that_somebody_else_ends(cluster):
    """Nothing is taken away a second time."""
    cluster.verdicts = ["gone"]
    assert run("--canary", "5,100") == 5
    assert cluster.applied == [["llm", "llm-canary", "other"]]


def test_take_back_removes_a_canary(cluster):
    """By the name of its application or all there are; without one the former version counts."""
    assert canary.take_back(None, OPTIONS) is None
    cluster.verdicts = ["good"]
    run("--canary", "5")
    assert canary.take_back("other", OPTIONS) is None
    assert canary.take_back("llm", OPTIONS) == 0
    assert cluster.applied[-1] == ["llm", "other"]
    assert history()[-1] == (What.CANARY, "the canary was taken back at 5 %")
    assert store.under_way() == []


def test_deploy_run_refuses_what_has_a_canary(cluster):
    """Neither the application nor the canary; others are."""
    store.write("llm", Canary("llm-canary", "t"))
    file = {"applications": [app(2)]}
    with pytest.raises(ConfigError, match=r"llm has a canary: go on with .* rollback llm"):
        deploy.run(file, served(file), verdict(), OPTIONS)
    tried = {"name": "llm-canary", "import_path": CANARY_IMPORT_PATH, "route_prefix": None}
    cluster.applications.append(tried)
    file = {"applications": [OTHER]}
    with pytest.raises(ConfigError, match="llm has a canary"):
        deploy.run(file, (), {}, Options(60.0, remove=("llm-canary",)))
    assert deploy.run(file, (), {}, OPTIONS) == 0


def test_run_dry_shows_the_steps(cluster, capsys):
    """And does none of them."""
    how = Options(60.0, dry_run=True)
    given = ("--shadow", "10", "--canary", "5,100", "--hold", "1m", "--slo", "ttft_p95=1s")
    assert run(*given, how=how) == 0
    shown = capsys.readouterr().err
    assert "llm-canary: new, 1 replica beside llm" in shown
    assert "llm: copies of 10 % for 60 s, with ttft_p95=1s, ttft_p95=1.5x, tpot_p95=1.5x" in shown
    assert "llm: then the new version is rolled out, and llm-canary goes" in shown
    assert (cluster.applied, store.under_way()) == ([], [])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"applications": [app(1)]}, "llm serves this very config"),
        ({"applications": [app(2, name="new")]}, "new does not serve yet"),
        ({"applications": [app(2), OTHER]}, "one application"),
    ],
)
def test_run_refuses_what_cannot_be_tried(cluster, file, message):
    """Said before anything is touched."""
    with pytest.raises(ConfigError, match=message):
        run("--canary", "5,100", file=file)
    assert cluster.applied == []


def test_run_refuses_a_name_that_is_taken(cluster):
    """By an application that is no canary."""
    cluster.applications.append({"name": "llm-canary", "import_path": "x:y"})
    with pytest.raises(ConfigError, match="llm-canary is an application that is no canary"):
        run("--canary", "5,100")


def test_at_commits_pins_a_branch_that_has_moved():
    """What was tried is rolled out, pinned; else the file as it is."""
    file = {"applications": [app(2)]}
    assert canary.at_commits(file, verdict(), {"": "c" * 40}) is file
    (moved,) = canary.at_commits(file, verdict("d" * 40), {"": "c" * 40})["applications"]
    assert moved["args"]["model"]["revision"] == "c" * 40


def test_release_of_options():
    """Their defaults, and those that go with a canary alone."""
    assert release_of(options()) is None
    found = release_of(options("--canary", "5,100", "--sticky", "client"))
    assert (found.steps, found.tried) == ((Step(0.05), Step(1.0)), (Step(0.05),))
    assert (found.rules.hold_s, found.rules.least, found.rules.patience_s) == (600.0, 50, 1800.0)
    assert (found.replicas, found.sticky, found.command) == (
        1,
        "client",
        "serve-app deploy app.yaml",
    )
    for wrong, message in (
        (("--hold", "1m"), "--hold goes with --canary"),
        (("--canary", "5", "--remove", "x"), "--remove"),
        (("--canary", "5", "--canary-replicas", "0"), "at least 1"),
        (("--canary", "5", "--hold", "soon"), "--hold: 'soon' is not a duration"),
        (("--shadow", "0"), "--shadow 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            release_of(options(*wrong))
