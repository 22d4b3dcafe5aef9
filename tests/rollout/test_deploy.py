"""The course of a rollout over a scripted Serve."""

import copy

from serve_app.errors import ConfigError
from serve_app.rollout.deploy import deploy, nudged
from serve_app.rollout.serve_client import AppState
from serve_app.serve_config import IMPORT_PATH
from serve_app.telemetry.cold_start import Phase


def config(name="llm", *, least=1, most=1, **extra):
    args = {
        "model": {"repo_id": "acme/tiny"},
        "replica": {"min_replicas": least, "max_replicas": most},
    }
    return {"applications": [{"name": name, "import_path": IMPORT_PATH, "args": args, **extra}]}


class Scripted:
    """A Serve that shows one status after the other, a list for each goal that is applied."""

    def __init__(self, *courses, goal=None, answers=None):
        self.courses = [list(course) for course in courses]
        self.applied = []
        self.answers = answers or {}
        self._goal = goal
        self._shown = ("RUNNING", "") if goal else None

    def goal(self):
        return self._goal

    def apply(self, goal):
        self.applied.append(copy.deepcopy(goal))
        self._course = self.courses.pop(0)

    def states(self):
        if self.applied:
            self._shown = self._course.pop(0) if self._course else self._shown
        if self._shown is None:
            return {}
        status, message = self._shown
        return {"llm": AppState(status, message, float(len(self.applied)))}

    def phases(self, name):
        old = {"killed": Phase("load", 1e12)}  # in its start, before; on a clock that was ahead
        return old | ({"replica-1": Phase("download", 1.0)} if self.applied else {})

    def ask(self, name):
        return self.answers.get(len(self.applied))


def run(serving, goal, timeout_s=20):
    return deploy(serving, goal, timeout_s=timeout_s, former=serving.goal())


def test_deploy_is_done_when_it_answered(capsys):
    """Running is not enough; nobody is rolled back; each phase of a replica is reported once."""
    serving = Scripted([("DEPLOYING", ""), ("RUNNING", "")])
    assert (run(serving, config()).status, len(serving.applied)) == ("done", 1)
    reported = capsys.readouterr().err
    assert reported.count("llm: replica-1: download") == 1
    assert "killed" not in reported


def test_deploy_does_not_take_the_old_state_for_the_new_one():
    """An old DEPLOY_FAILED, seen before Serve took the new goal, fails nothing."""
    serving = Scripted([("DEPLOYING", ""), ("RUNNING", "")], goal=config())
    serving._shown = ("DEPLOY_FAILED", "of the goal before")
    assert run(serving, config(least=2, most=2)).status == "done"


def upscale_delay_s(goal):
    return goal["applications"][0]["deployments"][0]["autoscaling_config"]["upscale_delay_s"]


def test_deploy_goes_back_from_a_failed_build_and_says_why():
    """Exit 5, the former config with its autoscaler registered anew."""
    before = config(least=1, most=4)
    serving = Scripted([("DEPLOY_FAILED", "no such file")], [("RUNNING", "")], goal=before)
    result = run(serving, config(most=2))
    assert (result.status, result.exit_code) == ("rolled_back", 5)
    assert "no such file" in result.reason
    assert 30 < upscale_delay_s(serving.applied[1]) < 30.1


def test_deploy_fails_when_it_runs_without_an_answer():
    """The canary decides."""
    serving = Scripted([("RUNNING", "")], [("RUNNING", "")], goal=config(), answers={1: "nothing"})
    result = run(serving, config(least=2, most=2))
    assert result.status == "rolled_back"
    assert "does not answer: nothing" in result.reason


def test_deploy_asks_a_controller_that_restarts_meanwhile_again(capsys):
    """Its silence is reported and is no failure of the rollout."""
    serving = Scripted([("DEPLOYING", ""), ("RUNNING", "")])
    answers, silent = serving.states, [False, True, False, True]

    def states():
        if serving.applied and silent and silent.pop(0):
            raise ConfigError("Serve's controller does not answer (ActorUnavailableError)")
        return answers()

    serving.states = states
    assert run(serving, config()).status == "done"
    assert "controller does not answer" in capsys.readouterr().err


def test_deploy_has_nothing_to_go_back_to_the_first_time():
    """Its message stays for whoever looks."""
    serving = Scripted([("DEPLOY_FAILED", "why")])
    assert (run(serving, config()).status, len(serving.applied)) == ("failed", 1)


def test_deploy_gives_up_a_build_that_never_ends():
    """Ray has no limit; the names of what is missing are reported."""
    serving = Scripted([("DEPLOYING", "")], [("RUNNING", "")], goal=config())
    result = run(serving, config(least=2, most=2), timeout_s=0)
    assert result.status == "rolled_back"
    assert "not running within 0 s: llm" in result.reason


class Shared(Scripted):
    """A Serve where somebody else's application has failed, and fails again."""

    def states(self):
        failed = AppState("DEPLOY_FAILED", "theirs", float(len(self.applied)))
        return {**super().states(), "theirs": failed}


def together(ours):
    return {
        "applications": [*config("theirs", least=1, most=4)["applications"]] + ours["applications"]
    }


def test_deploy_leaves_somebody_elses_application_alone(capsys):
    """Neither waited for nor asked nor shown, and going back does not touch it."""
    before = together(config(least=1, most=4))
    serving = Shared([("DEPLOYING", ""), ("RUNNING", "")], goal=before)
    goal = together(config(most=2))
    done = deploy(serving, goal, timeout_s=20, former=before, names={"llm"})
    assert (done.status, len(serving.applied)) == ("done", 1)
    assert "theirs" not in capsys.readouterr().err

    serving = Shared([("DEPLOY_FAILED", "why")], [("RUNNING", "")], goal=before)
    back = deploy(serving, goal, timeout_s=20, former=before, names={"llm"})
    assert back.status == "rolled_back"
    theirs, ours = serving.applied[1]["applications"]
    assert theirs == before["applications"][0]
    assert ours != before["applications"][1]


def test_deploy_removes_a_new_application_that_fails_and_does_not_wait_for_it():
    """What served beside it is what serves again."""
    before = config("theirs")
    serving = Shared([("DEPLOY_FAILED", "why")], [], goal=before)
    result = deploy(serving, together(config()), timeout_s=1, former=before, names={"llm"})
    assert (result.status, serving.applied[1]) == ("rolled_back", before)


def test_nudged_changes_one_delay_and_each_time_again():
    """Never twice alike from the same config, never more; fixed sizes and others' stay."""
    once = nudged(config(most=3))
    goal, delays = once, {upscale_delay_s(once)}
    for again in (nudged(config(most=3)) for _ in range(50)):
        delays.add(upscale_delay_s(again))
        goal = nudged(goal)
        assert 30 < upscale_delay_s(goal) < 30.11
    assert len(delays) > 45
    scaling = once["applications"][0]["deployments"][0]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 3)
    assert nudged(config()) == config()
    foreign = {"applications": [{"name": "x", "import_path": "other:app"}]}
    assert nudged(foreign) == foreign
