"""Let the named faults strike, one cluster after the other."""

from __future__ import annotations

import argparse
import json
import signal
import sys

from scripts.chaos_table import report
from scripts.chaos_table.faults import FAULTS
from scripts.chaos_table.stage import stage_for


def main() -> int:
    """Run the faults that were asked for; every one writes its own result."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the clusters are ended
    for name in args.faults:
        strike(name)
    return 0


def strike(name: str) -> None:
    """Build a service, let one fault strike it under load, and keep what came of it."""
    fault, setup = FAULTS[name]
    print(f"{name}: starting", flush=True)
    with stage_for(setup) as stage:
        print(f"  ready after {stage.deploy():.1f} s", flush=True)
        with stage.load:
            note = fault(stage)
    row = report.summarise(stage, name, (fault.__doc__ or "").strip(), note)
    report.keep(row)
    print(json.dumps(row, indent=1), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument(
        "faults", nargs="+", choices=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS)
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
