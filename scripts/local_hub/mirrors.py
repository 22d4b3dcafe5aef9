"""Mirrors: what answers in the Hub's place, asks it with an account of its own, and has gaps.

with LocalHub([repo]) as hub:
hub.answer_as(artifactory(hub.issue_token(), tokens=[mine]))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from scripts.local_hub.answers import json_answer
from scripts.local_hub.behaviours import Route
from scripts.local_hub.repos import Repo, RepoFile
from scripts.local_hub.targets import find_target
from scripts.local_hub.wire import Answer, Request, file_answer

HUBS_OWN = ("x-repo-commit", "x-error-", "x-xet-", "x-linked-", "x-request-id", "link", "ratelimit")


@dataclass(frozen=True)
class Mirror:
    """One mirror.

    Args:
        account: the token that it asks the Hub with, for everybody.
        tokens: that it issued itself; None asks for none.
        headers: of every answer.
        loses: beginnings of headers of the Hub's that it does not pass on.
        lacks: questions that it does not know.
        states_hashes: whether it knows `blobs=true`; else its description names files alone.
        redirects: whether large files stay where the Hub has them.
        others: files of which it sends other bytes.
    """

    account: str | None
    tokens: Collection[str] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    loses: tuple[str, ...] = HUBS_OWN
    lacks: frozenset[Route] = frozenset({Route.xet_token, Route.whoami})
    states_hashes: bool = True
    redirects: bool = False
    others: Mapping[str, bytes] = field(default_factory=dict)

    def answer(
        self, request: Request, ask: Callable[[Request], Answer], repos: Mapping[str, Repo]
    ) -> Answer:
        """Answer one request by asking the Hub."""
        if self.tokens is not None and request.bearer not in self.tokens:
            who = {"WWW-Authenticate": 'Basic realm="Mirror"', **self.headers}
            return json_answer(
                {"errors": [{"status": 401, "message": "Bad credentials"}]}, who, 401
            )
        target = find_target(request)
        if target.route in self.lacks:
            return json_answer({"errors": [{"message": "Not found"}]}, dict(self.headers), 404)
        said = ask(self._as_itself(request))
        path = "/".join(target.tail[1:])
        if target.route is Route.resolve and path in self.others:
            said = file_answer(request, RepoFile(path, self.others[path]), {})
        elif said.status == 302 and not self.redirects:
            files = repos[target.repo_id].files(target.tail[0])
            said = file_answer(request, files[path], {})
        if target.route is Route.info and said.status == 200 and not self.states_hashes:
            said = replace(said, body=_names_alone(said.body))
        return replace(said, headers=self._passed_on(said.headers))

    def _as_itself(self, request: Request) -> Request:
        headers = {k: v for k, v in request.headers.items() if k != "authorization"}
        if self.account is not None:
            headers["authorization"] = f"Bearer {self.account}"
        return replace(request, headers=headers)

    def _passed_on(self, headers: Mapping[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in headers.items() if not k.lower().startswith(self.loses)}
        return {**kept, **self.headers}


def artifactory(account: str | None, **facts: object) -> Mirror:
    """Return a remote repository of Artifactory: it names itself, and sends large files itself."""
    named = {"X-JFrog-Version": "Artifactory/7.111.4", "X-Artifactory-Id": "a1b2c3"}
    return replace(Mirror(account, headers=named), **facts)  # type: ignore[arg-type]


def nexus(account: str | None, **facts: object) -> Mirror:
    """Return a proxy repository of Nexus: no lists of files, but their hashes are described."""
    lacks = frozenset({Route.xet_token, Route.whoami, Route.tree})
    named = {"Server": "Nexus/3.95.3-01 (COMMUNITY)"}
    return replace(Mirror(account, headers=named, lacks=lacks), **facts)  # type: ignore[arg-type]


def _names_alone(body: object) -> bytes:
    described = json.loads(body if isinstance(body, bytes) else b"{}")
    files = [{"rfilename": each["rfilename"]} for each in described["siblings"]]
    return json.dumps({**described, "siblings": files}).encode()
