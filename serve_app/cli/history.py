"""The `history` command: what gates, deploys and rollbacks decided, when, why, by whom."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from ray.exceptions import RayError

from serve_app.access.report import aligned
from serve_app.cluster.connection import joined
from serve_app.errors import ConfigError
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import Entry

HEAD = ("WHEN", "APPLICATION", "WHAT", "SECONDS", "COMMIT", "CONFIG", "WHO", "WHY")


def run(application: str | None, address: str | None, *, as_json: bool = False) -> int:
    """Show the entries that the cluster keeps, oldest first.

    Args:
        application: its name in Serve; None shows all.
        address: of the Ray cluster; None takes RAY_ADDRESS, or what `ray start` recorded.
        as_json: print one JSON object for each entry instead of a table.

    Returns:
        The exit code, 0 also where nothing is recorded: that is an answer.

    Raises:
        ConfigError: no cluster runs there, or it does not answer.
    """
    with joined(address):
        try:
            names = [application] if application else rollout_history.applications()
            found = [entry for name in names for entry in rollout_history.entries(name)]
        except RayError as error:
            kind = type(error).__name__
            raise ConfigError(f"the cluster does not give its history ({kind})") from None
    # Each application's are in order already; those of several are put together.
    found.sort(key=lambda entry: entry.at)
    if not found:
        of = f" of {application}" if application else ""
        print(f"Nothing{of} is recorded on this cluster.", file=sys.stderr)
    elif as_json:
        for entry in found:
            print(json.dumps(entry.facts()))
    else:
        print("\n".join(table(found)))
    return 0


def table(found: Sequence[Entry]) -> Iterator[str]:
    """Yield a row for each entry, below a head."""
    rows = [
        (
            datetime.fromtimestamp(entry.at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            entry.application,
            entry.what,
            f"{entry.duration_s:.1f}",
            (entry.commit or "-")[:12],
            entry.config_hash or "-",
            entry.who,
            entry.why,
        )
        for entry in found
    ]
    yield from aligned([HEAD, *rows])
