"""Break things one after the other and time starts; `results.md` is made of what comes of it."""

import json
import signal
from functools import partial

import pytest

from tests.chaos import lines, report, starts
from tests.chaos.attacks import attacks
from tests.chaos.faults import FAULTS
from tests.chaos.growth import growth
from tests.chaos.rollouts import rollouts
from tests.chaos.stage import stage_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]


def strike(name):
    """Build a service, let one fault strike it under load, and return what came of it."""
    fault, setup = FAULTS[name]
    if setup.engine.get("backend") == "vllm":
        pytest.importorskip("vllm", reason="vllm is not installed")
    with stage_for(setup) as stage:
        print(f"ready after {stage.deploy():.1f} s", flush=True)
        with stage.load:
            note = fault(stage)
    return report.summarise(stage, name, " ".join(fault.__doc__.split()), note)


MEASUREMENTS = {
    **{name: partial(strike, name) for name in FAULTS},
    **{f"{nodes} nodes": partial(starts.hub_bytes, nodes) for nodes in (1, 2, 4)},
    "eight nodes": lines.eight_nodes,
    "rollouts": rollouts,
    "growth": growth,
    "attacks": attacks,
}


@pytest.fixture(autouse=True)
def ends_clusters_at_sigterm():
    """Let SIGTERM end the run as Ctrl-C does, so that no cluster is left behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=143))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_chaos(name):
    """What a fault took away runs again, and everything else is measured to its end."""
    result = MEASUREMENTS[name]()
    report.keep(name, result)
    report.write(FAULTS)
    print(json.dumps(result, indent=1), flush=True)
    if name in FAULTS:
        assert result["before_fault_failed"] == 0
        assert result["answers_again_s"] is not None
        assert result["whole_again_s"] is not None
