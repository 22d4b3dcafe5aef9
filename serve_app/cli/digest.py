"""The `digest` command: what to write into `model.digest`, wherever the model lies."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from serve_app import serve_config
from serve_app.access.digest import UNASKED
from serve_app.access.hub.probe import check_here
from serve_app.access.verdict import EXIT_BLOCKED, EXIT_GRANTED, EXIT_UNDETERMINED, UNDETERMINED
from serve_app.config import AccessConfig, ModelConfig, parse_args
from serve_app.errors import ConfigError

_REPO = re.compile(r"(?P<repo_id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>.+))?")


def run(what: str) -> int:
    """Print a line for each model: its digest, and what has it.

    Args:
        what: a Serve config, a directory, a URL of `model.url`, or `owner/name@revision` (`main`).

    Returns:
        The exit code: 0, 3 if this machine may not read a model's files, 4 if nobody knows.

    Raises:
        ConfigError: it is none of these.
    """
    code = EXIT_GRANTED
    for model, access in _models(what):
        asked = model.model_copy(update={"digest": UNASKED})
        # What the config allows must not hide what the digest is; a missing grant still does.
        verdict = check_here(asked, access.model_copy(update={"license": None}))
        if verdict.facts.digest is None:
            print(verdict.line(), file=sys.stderr)
            unknown = verdict.outcome in UNDETERMINED
            code = max(code, EXIT_UNDETERMINED if unknown else EXIT_BLOCKED)
        else:
            commit = f"@{verdict.commit}" if verdict.commit else ""
            print(f"{verdict.facts.digest}  {model.source}{commit}")
    return code


def _models(what: str) -> Iterator[tuple[ModelConfig, AccessConfig]]:
    place = Path(what).expanduser()
    if place.is_file():
        for app in serve_config.read(place):
            yield app.config.model, app.config.access
    elif place.is_dir():
        yield ModelConfig(path=str(place)), AccessConfig()
    elif "://" in what:
        yield parse_args({"model": {"url": what}}).model, AccessConfig()
    elif match := _REPO.fullmatch(what):
        yield (
            ModelConfig(repo_id=match["repo_id"], revision=match["revision"] or "main"),
            AccessConfig(),
        )
    else:
        raise ConfigError(f"{what} is no file, no directory, no URL and no owner/name@revision")
