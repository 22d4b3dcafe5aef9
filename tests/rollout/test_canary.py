"""One step of a release over a scripted cluster, and what the command line says of steps."""

from dataclasses import dataclass, field

import pytest

from serve_app.config import parse_args
from serve_app.deployments.canary import Report, Seen
from serve_app.errors import ConfigError
from serve_app.rollout.canary import (
    POLL_S,
    SHOW_S,
    TAKEN_S,
    Rules,
    Step,
    canary_of,
    parse_shadow,
    parse_steps,
    run_step,
    without,
)
from serve_app.rollout.judge import parse_slo
from serve_app.serve_config import CANARY_IMPORT_PATH, IMPORT_PATH

RULES = Rules(parse_slo("ttft_p95=1s,error_rate=2%"), hold_s=60.0, least=20, patience_s=100.0)


@dataclass
class Scripted:
    """A cluster whose canary answers so many requests a second, so fast, so many of them badly."""

    rate: float = 10.0
    seconds: float = 0.1
    failing: float = 0.0
    stable_rate: float = 10.0
    ingresses: int = 2
    unready: int = 0
    faults: dict[float, str] = field(default_factory=dict)
    gone_at: float = 1e9
    now: float = 1000.0
    began: list[Step] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def begin(self, step):
        self.began.append(step)

    def report(self):
        if self.now >= self.gone_at:
            return None
        stable, tried = Seen(), Seen()
        for seen, rate in ((stable, self.stable_rate), (tried, self.rate)):
            for _ in range(int(rate * (self.now - 1000))):
                seen.first.add(self.seconds if seen is tried else 0.1)
        tried.failed = tried.unanswered = int(self.failing * tried.first.count)
        return Report(self.ingresses, self.unready, stable, tried)

    def fault(self):
        return next((why for at, why in self.faults.items() if self.now >= at), None)

    def sleep(self, seconds):
        self.now += seconds

    def run(self, rules=RULES):
        return run_step(
            self, Step(0.25), rules, self.said.append, clock=lambda: self.now, sleep=self.sleep
        )


def test_run_step_holds_a_good_canary():
    """For all of the time; meanwhile there are lines with both versions' numbers."""
    cluster = Scripted()
    judged = cluster.run()
    assert (judged.verdict, cluster.began) == ("good", [Step(0.25)])
    assert judged.duration_s == pytest.approx(RULES.hold_s + POLL_S)
    assert "canary 605 requests, ttft p50 0.101 s" in judged.words
    assert len(cluster.said) == RULES.hold_s // SHOW_S
    assert cluster.said[0].startswith("25 %, 14 s of 60 s: canary 150 requests")


def test_run_step_ends_a_slow_canary_at_once():
    """As soon as chance does not explain it, and the serving version has enough to compare."""
    judged = Scripted(seconds=0.3).run()
    assert (judged.verdict, judged.duration_s) == ("bad", 2.0)
    assert judged.words.startswith("ttft_p95=1.5x: 20 of 20 took more than 0.151 s")
    judged = Scripted(seconds=3.0).run()
    assert (judged.verdict, judged.duration_s) == ("bad", POLL_S), "needs no comparison"


def test_run_step_ends_a_canary_that_errs_at_once():
    """A third of its requests."""
    judged = Scripted(failing=0.5).run()
    assert judged.verdict == "bad"
    assert judged.duration_s <= 2
    assert "error_rate=2%" in judged.words


def test_run_step_holds_a_canary_a_little_over_its_limit():
    """It is held first, because so few errors may be chance."""
    rules = Rules(parse_slo("error_rate=2%,error_rate=+9%"), 60.0, 20, 100.0)
    judged = Scripted(failing=0.024).run(rules)
    assert (judged.verdict, judged.duration_s) == ("bad", 60.5)


def test_run_step_of_a_canary_that_answers_no_more():
    """However good its answers were: it is waited for, and goes if that lasts."""
    cluster = Scripted()
    sleep = cluster.sleep

    def falls_silent(seconds):
        sleep(seconds)
        cluster.unready = 2 if 1055 < cluster.now < 1065 else 0

    cluster.sleep = falls_silent
    judged = cluster.run()
    assert (judged.verdict, judged.duration_s) == ("good", 65.0)
    judged = Scripted(unready=2).run()
    assert judged.verdict == "bad"
    assert "the canary does not answer any ingress" in judged.words


def test_run_step_waits_for_enough_requests():
    """As many as a judgement needs; those of the serving version, too."""
    for scarce in ({"rate": 0.25}, {"stable_rate": 0.25}):
        judged = Scripted(**scarce).run()
        assert (judged.verdict, judged.duration_s) == ("good", 80.0)


def test_run_step_decides_nothing_by_too_few_requests():
    """After the longest time that is waited, with the reason."""
    judged = Scripted(rate=0.1).run()
    assert judged.verdict == "few"
    assert judged.duration_s == pytest.approx(RULES.hold_s + RULES.patience_s + POLL_S)
    assert judged.words.startswith("too few requests: a judgement needs 20 of each version; canary")
    assert Scripted(rate=0, unready=1).run().verdict == "few"


def test_run_step_ends_a_canary_that_answers_no_ingress():
    """It gets no requests, however many there are; after the longest time it goes."""
    judged = Scripted(rate=0, unready=2).run()
    assert judged.verdict == "bad"
    assert judged.words.startswith("the canary does not answer any ingress; canary 0 requests")


def test_run_step_ends_a_canary_that_does_not_run():
    """Whatever was seen of it."""
    judged = Scripted(faults={1010.0: "llm-canary is UNHEALTHY: lost"}).run()
    assert (judged.verdict, judged.words) == ("bad", "llm-canary is UNHEALTHY: lost")
    assert judged.duration_s == 10


def test_run_step_ends_with_a_step_of_somebody_else():
    """Nothing is judged, and nothing is taken back a second time."""
    assert Scripted(gone_at=1005.0).run().verdict == "gone"


def test_run_step_names_ingresses_that_know_no_canaries():
    """Of an older version of this package: nobody would get to the canary, and nobody would say."""
    judged = Scripted(ingresses=0).run()
    assert judged.verdict == "bad"
    assert "deploy once without --canary" in judged.words
    assert judged.duration_s == pytest.approx(TAKEN_S + POLL_S)


def test_parse_steps():
    """With or without the sign; below one, too."""
    assert parse_steps("5, 25%,100") == (Step(0.05), Step(0.25), Step(1.0))
    assert parse_steps("0.5") == (Step(0.005),)
    assert [step.words for step in parse_steps("0.5,25")] == ["0.5 %", "25 %"]
    assert (parse_shadow("10%").words, Step(0.1, 0.5).words) == (
        "copies of 10 %",
        "10 % and copies of 50 %",
    )


@pytest.mark.parametrize("text", ["", "0,5", "5,5", "25,5", "5,101", "5,x", "nan", "-1", "inf"])
def test_parse_steps_refuses(text):
    """And shown how they are written."""
    with pytest.raises(ConfigError, match="5,25,100"):
        parse_steps(text)


@pytest.mark.parametrize("text", ["", "0", "101", "5,10", "nan"])
def test_parse_shadow_refuses(text):
    """Above 0."""
    with pytest.raises(ConfigError, match="--shadow"):
        parse_shadow(text)


def test_canary_of_an_application():
    """Without a route or an ingress, with replicas of its own count; the file's stays as it is."""
    scaling = {"name": "LLMServer", "num_replicas": 4, "ray_actor_options": {"num_gpus": 2}}
    app = {
        "name": "llm",
        "import_path": IMPORT_PATH,
        "route_prefix": "/llm",
        "args": {"model": {"repo_id": "acme/tiny"}, "replica": {"max_replicas": 8, "num_gpus": 2}},
        "deployments": [scaling, {"name": "Ingress", "num_replicas": 2}],
        "runtime_env": {"env_vars": {"A": "1"}},
    }
    canary = canary_of(app, 2)
    assert canary == {
        "name": "llm-canary",
        "import_path": CANARY_IMPORT_PATH,
        "route_prefix": None,
        "args": {
            "model": {"repo_id": "acme/tiny"},
            "replica": {"min_replicas": 2, "max_replicas": 2, "num_gpus": 2},
        },
        "deployments": [{"name": "LLMServer", "ray_actor_options": {"num_gpus": 2}}],
        "runtime_env": {"env_vars": {"A": "1"}},
    }
    assert parse_args(canary["args"]).replica.min_replicas == 2
    assert app["args"]["replica"] == {"max_replicas": 8, "num_gpus": 2}
    plain = {**app, "deployments": [{"name": "LLMServer", "num_replicas": 4}]}
    assert "deployments" not in canary_of(plain, 1)


def test_without_one_application():
    """The others stay."""
    goal = {"applications": [{"name": "a"}, {"name": "b"}, {}]}
    assert without(goal, "b") == {"applications": [{"name": "a"}, {}]}
    assert without(goal, None) is goal
    assert without(None, "b") is None
