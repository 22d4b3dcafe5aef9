"""Control over HTTP, for a Hub that runs as its own process.

    GET    /_local/log      the requests so far, oldest first; no secrets
    DELETE /_local/log      forget them
    GET    /_local/repos    repository ids with their commits
    PUT    /_local/tokens   {"token_file": path | "token": value, "behaviour": …, "account": …,
                            "repo_id": …, "on": [routes], "failures": …, "failure_status": …,
                            "retry_after_s": …} -> {"fingerprint": …, "behaviour": …}

A token that is known already is switched; an unknown one is granted first, so `repo_id` limits
the behaviour to one repository. A token file that does not exist is written (0600) with a new
token. Values go in and never come out.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.local_hub.answers import json_answer
from scripts.local_hub.behaviours import Behaviour, Route, fingerprint
from scripts.local_hub.wire import Answer, Request

if TYPE_CHECKING:
    from scripts.local_hub.server import LocalHub

_SETTINGS = ("failures", "failure_status", "retry_after_s")


class Control:
    """Answers `/_local/…`."""

    def __init__(self, hub: LocalHub) -> None:
        self._hub = hub

    def answer(self, request: Request) -> Answer:
        """Answer one request; what is wrong with it is said in `error`."""
        try:
            match request.method, request.segments[1:]:
                case "GET", ["log"]:
                    return json_answer([asdict(entry) for entry in self._hub.log])
                case "DELETE", ["log"]:
                    self._hub.clear_log()
                    return json_answer({})
                case "GET", ["repos"]:
                    return json_answer(self._hub.commits())
                case "PUT", ["tokens"]:
                    return self._put_token(json.loads(request.body))
        except (ValueError, OSError, KeyError, TypeError) as error:
            # A JSON error quotes nothing of the document; a ValueError of ours names choices.
            words = str(error.args[0]) if error.args else ""
            return json_answer({"error": f"{type(error).__name__}: {words}"}, status=400)
        return json_answer({"error": "no such control"}, status=404)

    def _put_token(self, order: Any) -> Answer:
        if not isinstance(order, dict):
            raise TypeError("an order is a JSON object")
        behaviour = Behaviour(order.get("behaviour", Behaviour.granted))
        on = None if order.get("on") is None else [Route(route) for route in order["on"]]
        value = order.get("token")
        if "token_file" in order:
            value = read_or_issue(self._hub, Path(order["token_file"]))
        if not isinstance(value, str) or not value:
            raise ValueError("give `token` or `token_file`")
        if not self._hub.knows(value) or any(name in order for name in _SETTINGS):
            settings: dict[str, Any] = {
                name: int(order[name]) for name in _SETTINGS if name in order
            }
            self._hub.issue_token(
                account=str(order.get("account", "alice")), value=value, **settings
            )
        self._hub.set_behaviour(value, behaviour, repo_id=order.get("repo_id"), on=on)
        return json_answer({"fingerprint": fingerprint(value), "behaviour": behaviour})


def read_or_issue(hub: LocalHub, path: Path) -> str:
    """Read a token file, or write a new one that only its owner can read."""
    if path.exists():
        return path.read_text().strip()
    token = hub.issue_token()
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token + "\n")
    return token
