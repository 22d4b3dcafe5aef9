"""The Hub's own routes: metadata for everybody, content for those who have the grant.

Order of every content route, as recorded from the real Hub: a dead token, the gate, the
revision, the file. Refusals carry X-Error-Code and X-Error-Message; `/api` bodies are JSON,
`/resolve` bodies are text.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from scripts.local_hub.answers import faulty_answer, json_answer
from scripts.local_hub.behaviours import (
    BAD_CREDENTIALS,
    ENTRY_NOT_FOUND,
    EXPIRED,
    FILES_DENIED,
    GATE,
    LOG_IN,
    READ_ONLY,
    REPO_NOT_FOUND,
    REVISION_NOT_FOUND,
    Account,
    Behaviour,
    Refusal,
    Route,
)
from scripts.local_hub.metadata import model_payload, tree_page, whoami_payload
from scripts.local_hub.repos import Repo, RepoFile
from scripts.local_hub.state import State
from scripts.local_hub.targets import Target, find_target
from scripts.local_hub.wire import Answer, Request, file_answer


class Refused(Exception):
    """Ends a request with a refusal."""

    def __init__(
        self, refusal: Refusal, name: str = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
        self.name = name
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class Call:
    """One request with everything that was found out about it on the way in."""

    request: Request
    target: Target
    caller: Account
    repo: Repo

    @property
    def behaviour(self) -> Behaviour:
        """How the caller is treated toward the repository."""
        return self.caller.toward(self.repo.repo_id)

    @property
    def is_anonymous(self) -> bool:
        """Return whether no token came with the request."""
        return self.request.bearer is None


class Hub:
    """Answers what huggingface.co answers."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._answers: dict[Route, Callable[[Call], Answer]] = {
            Route.info: self._model,
            Route.tree: self._tree,
            Route.auth_check: self._auth_check,
            Route.resolve: self._resolve,
            Route.xet_token: self._xet_token,
        }

    def answer(self, request: Request) -> Answer:
        """Answer one request; never raises for what a client can send."""
        mirror = self._state.mirror
        if mirror is not None:
            return mirror.answer(request, self._answer, self._state.repos)
        return self._answer(request)

    def _answer(self, request: Request) -> Answer:
        target = find_target(request)
        answer = self._faulty(request, target) or self._sound(request, target)
        headers = {
            "x-request-id": f"Root=1-{secrets.token_hex(4)}-{secrets.token_hex(12)}",
            **self._state.rate_headers(request.bearer, target.route),
            **answer.headers,
        }
        dropped = self._state.dropped_headers
        kept = {name: value for name, value in headers.items() if name.lower() not in dropped}
        return Answer(answer.status, answer.body, kept, answer.silence)

    def _caller(self, request: Request) -> Account:
        known = self._state.accounts.find(request.bearer)
        return known or Account("unknown", Behaviour.invalid)

    def _faulty(self, request: Request, target: Target) -> Answer | None:
        caller = self._caller(request)
        fault = self._state.outage or self._state.accounts.fault(
            caller, target.route, target.repo_id
        )
        if fault is Behaviour.flaky:
            limited = caller.failure_status == 429
            fault = Behaviour.rate_limited if limited else Behaviour.server_error
        return None if fault is None else faulty_answer(fault, caller, target.route)

    def _sound(self, request: Request, target: Target) -> Answer:
        if target.route is Route.other:
            return _other(request)
        if target.route is Route.exchange:
            status, body = self._state.publishers.answer(request.method, request.body)
            if issued := body.get("access_token"):
                self._state.accounts.add(issued, self._state.publishers.account_of(issued))
            return json_answer(body, None, status)
        try:
            if target.route is Route.whoami:
                return self._whoami(request)
            moved = self._state.renamed.get(target.repo_id)
            if moved is not None:
                new = request.target.replace(f"/{target.repo_id}", f"/{moved.repo_id}", 1)
                return Answer(307, b"", {"Location": moved.origin + new})
            return self._answers[target.route](self._call(request, target))
        except Refused as refused:
            return self._refuse(request, target, refused)

    def _refuse(self, request: Request, target: Target, refused: Refused) -> Answer:
        refusal, repo_id = refused.refusal, target.repo_id
        message = refusal.message.format(id=repo_id, name=refused.name)
        headers = {"X-Error-Message": message, **refused.headers}
        if refusal.code is not None:
            headers["X-Error-Code"] = refusal.code
        if refusal.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="Authentication required", charset="UTF-8"'
        if request.segments[0] == "api":
            return json_answer({"error": message}, headers, refusal.status)
        headers["Content-Type"] = "text/plain; charset=utf-8"
        return Answer(refusal.status, message.encode(), headers)

    # Who is asking, and is there such a repository?

    def _whoami(self, request: Request) -> Answer:
        caller = self._caller(request)
        if request.bearer is None or caller.behaviour is Behaviour.invalid:
            raise Refused(BAD_CREDENTIALS)
        if caller.behaviour is Behaviour.expired:
            raise Refused(EXPIRED, caller.name)
        return json_answer(whoami_payload(caller))

    def _call(self, request: Request, target: Target) -> Call:
        caller = self._caller(request)
        if caller.behaviour is Behaviour.expired:
            raise Refused(EXPIRED, caller.name)
        repo = self._state.repos.get(target.repo_id)
        hidden = repo is None or (repo.readers is not None and caller.name not in repo.readers)
        if repo is None or hidden:
            stranger = request.bearer is None or caller.behaviour is Behaviour.invalid
            raise Refused(BAD_CREDENTIALS if stranger else REPO_NOT_FOUND)
        return Call(request, target, caller, repo)

    # May the caller read? Each of these raises `Refused` for no.

    def _pass_public(self, call: Call) -> None:
        """Let everybody in but a dead token, which fails on public routes as well."""
        if call.behaviour in {Behaviour.invalid, Behaviour.expired}:
            raise Refused(EXPIRED if call.behaviour is Behaviour.expired else BAD_CREDENTIALS)

    def _pass_gate(self, call: Call, path: str | None = None) -> None:
        if call.repo.gated is False or (path is not None and call.repo.is_open(path)):
            return self._pass_public(call)
        if call.is_anonymous:
            raise Refused(LOG_IN)
        if call.behaviour in GATE:
            raise Refused(GATE[call.behaviour])
        denied = call.behaviour is Behaviour.auth_ok_files_denied
        if denied and call.target.route is not Route.auth_check:
            raise Refused(FILES_DENIED)
        return None

    def _has_grant(self, call: Call) -> bool:
        if call.repo.gated is False:
            return True
        return not call.is_anonymous and call.behaviour not in GATE

    def _commit(self, call: Call, revision: str) -> str:
        commit = call.repo.commit(revision)
        if commit is None:
            raise Refused(REVISION_NOT_FOUND, revision)
        return commit

    # The routes.

    def _model(self, call: Call) -> Answer:
        self._pass_public(call)
        commit = self._commit(call, call.target.tail[0] if call.target.tail else call.repo.sha)
        return json_answer(
            model_payload(
                call.repo,
                commit,
                disabled=call.behaviour is Behaviour.disabled,
                blobs=call.request.flag("blobs"),
                masked=not self._has_grant(call),
                expand=call.request.query.get("expand", []),
            )
        )

    def _tree(self, call: Call) -> Answer:
        self._pass_public(call)
        revision, *folder = call.target.tail or ("main",)
        commit = self._commit(call, revision)
        page = tree_page(
            call.repo,
            commit,
            call.request,
            folder="/".join(folder).strip("/"),
            masked=not self._has_grant(call),
            size=self._state.page_size,
        )
        if page is None:
            raise Refused(ENTRY_NOT_FOUND, headers={"X-Repo-Commit": commit})
        entries, following = page
        headers = {"X-Repo-Commit": commit}
        if following is not None:
            headers["Link"] = f'<{self._state.urls["hub"]}{following}>; rel="next"'
        return json_answer(entries, headers)

    def _auth_check(self, call: Call) -> Answer:
        self._pass_gate(call)
        if call.target.tail:  # auth-check/write
            raise Refused(READ_ONLY)
        return Answer(200, b"OK", {"Content-Type": "text/plain; charset=utf-8"})

    def _resolve(self, call: Call) -> Answer:
        if len(call.target.tail) < 2:
            raise Refused(ENTRY_NOT_FOUND)
        revision, path = call.target.tail[0], "/".join(call.target.tail[1:])
        self._pass_gate(call, path)
        commit = self._commit(call, revision)
        file = call.repo.files(commit).get(path)
        headers = {"X-Repo-Commit": commit}
        if file is None:
            raise Refused(ENTRY_NOT_FOUND, headers=headers)
        headers["ETag"] = f'"{file.etag}"'
        if file.is_large:
            return self._to_cdn(call, file, headers)
        if call.repo.gated is False and call.request.segments[0] != "api":
            # Small public files come from a cache, one relative redirect away.
            place = f"/api/resolve-cache/models/{quote(call.repo.repo_id)}/{commit}/{quote(path)}"
            linked = {"X-Linked-Size": str(file.size), "X-Linked-Etag": headers["ETag"]}
            return Answer(307, b"", {**headers, **linked, "Location": place})
        return file_answer(call.request, file, headers)

    def _to_cdn(self, call: Call, file: RepoFile, headers: dict[str, str]) -> Answer:
        origin = self._state.urls["cdn"]
        if call.behaviour is Behaviour.cdn_down:
            origin = self._state.closed_url
        path = f"/xet-bridge-us/{call.repo.repo_id}/{file.sha256}"
        headers |= {
            "Location": f"{origin}{path}?{self._state.signer.query(path, call.caller.key)}",
            "X-Linked-Size": str(file.size),
            "X-Linked-Etag": headers["ETag"],
        }
        if call.repo.xet:
            base = f"{self._state.urls['hub']}/api/models/{call.repo.repo_id}"
            token_url = f"{base}/xet-read-token/{headers['X-Repo-Commit']}"
            store_url = f"{self._state.urls['xet']}/v2/reconstructions/{file.xet_hash}"
            headers |= {
                "X-Xet-Hash": file.xet_hash,
                "Link": f'<{token_url}>; rel="xet-auth", '
                f'<{store_url}>; rel="xet-reconstruction-info"',
            }
        return Answer(302, b"", headers)

    def _xet_token(self, call: Call) -> Answer:
        self._pass_gate(call)
        commit = self._commit(call, call.target.tail[0] if call.target.tail else "main")
        if not call.repo.xet:
            raise Refused(ENTRY_NOT_FOUND)
        down = call.behaviour is Behaviour.cdn_down
        url = self._state.closed_url if down else self._state.urls["xet"]
        token, expires = self._state.signer.token(call.repo.repo_id, call.caller.key)
        headers = {
            "X-Repo-Commit": commit,
            "X-Xet-Cas-Url": url,
            "X-Xet-Access-Token": token,
            "X-Xet-Token-Expiration": str(expires),
        }
        return json_answer({"casUrl": url, "exp": expires, "accessToken": token}, headers)


def _other(request: Request) -> Answer:
    if request.path == "/api/agent-harnesses":
        return json_answer({"standardEnvVars": [], "harnesses": {}})
    return json_answer({"error": "Sorry, we can't find the page you are looking for."}, None, 404)
