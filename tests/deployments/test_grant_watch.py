"""The re-check beside an application of somebody else."""

from types import SimpleNamespace

from serve_app.deployments import grant_watch
from serve_app.deployments.grant_watch import GrantWatch
from serve_app.errors import ConfigError


def test_recheck_keeps_the_last_verdict_of_an_application_that_is_gone(monkeypatch):
    """The last one, not the first: what was lost since stays lost."""

    def gone(application):
        raise ConfigError(f"no application {application} serves")

    monkeypatch.setattr(grant_watch, "asked", gone)
    watch = object.__new__(GrantWatch)
    watch._application = "llm"
    watch._watch = SimpleNamespace(verdict="last")
    assert watch._recheck() == "last"
