"""Break things one after the other, time starts, and write `results.md` of all that is known."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from functools import partial
from typing import Any

from scripts.chaos_table import report, starts
from scripts.chaos_table.attacks import attacks
from scripts.chaos_table.faults import FAULTS
from scripts.chaos_table.growth import growth
from scripts.chaos_table.rollouts import rollouts
from scripts.chaos_table.stage import stage_for

MEASURED = {
    **{f"{nodes} nodes": partial(starts.hub_bytes, nodes) for nodes in (1, 2, 4)},
    "second replica": starts.second_replica,
    "rollouts": rollouts,
    "growth": growth,
    "attacks": attacks,
}


def main() -> int:
    """Run what was asked for; each writes its own result as soon as it has one."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the clusters are ended
    for name in args.what:
        print(f"{name}: starting", flush=True)
        result = MEASURED[name]() if name in MEASURED else strike(name)
        report.keep(name, result)
        print(json.dumps(result, indent=1), flush=True)
    report.write(FAULTS)
    return 0


def strike(name: str) -> dict[str, Any]:
    """Build a service, let one fault strike it under load, and return what came of it."""
    fault, setup = FAULTS[name]
    with stage_for(setup) as stage:
        print(f"  ready after {stage.deploy():.1f} s", flush=True)
        with stage.load:
            note = fault(stage)
    return report.summarise(stage, name, " ".join((fault.__doc__ or "").split()), note)


def _arguments() -> argparse.Namespace:
    known = [*FAULTS, *MEASURED]
    words = f"{'; '.join(known)}; nothing writes results.md again"
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=words)
    args = parser.parse_args()
    if unknown := [name for name in args.what if name not in known]:
        parser.error(f"{unknown[0]!r} is none of: {'; '.join(known)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
