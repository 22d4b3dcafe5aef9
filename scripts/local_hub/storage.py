"""Where large files come from: the CDN behind signed URLs, the Xet store behind its tokens.

Both live on origins of their own. A Hub token that arrives here is a leak: the request is
answered as if it had not come, and the log says so.
"""

from __future__ import annotations

from dataclasses import replace

from scripts.local_hub.answers import faulty_answer, json_answer
from scripts.local_hub.behaviours import Account, Behaviour, Route
from scripts.local_hub.repos import Repo, RepoFile
from scripts.local_hub.state import State
from scripts.local_hub.wire import Answer, Request, Silence, file_answer

DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
)


def _fault(state: State, account: Account, route: Route, repo_id: str) -> Answer | None:
    # A fault of the Hub reaches the storage only when it is limited to it by name.
    if account.on is None:
        return None
    fault = state.accounts.fault(account, route, repo_id)
    return None if fault is None else faulty_answer(fault, account, route)


class Cdn:
    """Serves large files to whoever holds a signed URL."""

    def __init__(self, state: State) -> None:
        self._state = state

    def answer(self, request: Request) -> Answer:
        """Answer one request."""
        key = self._state.signer.opens(request.path, request.query)
        account = None if key is None else self._state.accounts.by_key(key)
        repo_id, _, sha256 = request.path.removeprefix("/xet-bridge-us/").rpartition("/")
        repo = self._state.repos.get(repo_id)
        if account is None or repo is None:
            return Answer(403, DENIED, {"Content-Type": "application/xml"})
        faulty = _fault(self._state, account, Route.cdn, repo_id)
        if faulty is not None:
            return faulty
        file = repo.large_file(sha256)
        if file is None or account.toward(repo_id) is Behaviour.cdn_denied:
            return Answer(403, DENIED, {"Content-Type": "application/xml"})
        answer = file_answer(request, file, {"ETag": f'"{file.sha256}"'})
        cut = account.toward(repo_id) is Behaviour.cdn_cut
        return replace(answer, silence=Silence.CUT) if cut else answer


class XetStore:
    """Lists how files are put together; enough for a probe, not for the hf_xet client."""

    def __init__(self, state: State) -> None:
        self._state = state

    def answer(self, request: Request) -> Answer:
        """Answer one request."""
        admitted = self._state.signer.admits(request.bearer)
        if admitted is None:
            return json_answer({"error": "Unauthorized"}, status=401)
        repo_id, key = admitted
        account, repo = self._state.accounts.by_key(key), self._state.repos.get(repo_id)
        if account is None or repo is None:
            return json_answer({"error": "Unauthorized"}, status=401)
        faulty = _fault(self._state, account, Route.cas, repo_id)
        if faulty is not None:
            return faulty
        if account.toward(repo_id) is Behaviour.cdn_denied:
            return json_answer({"error": "Forbidden"}, status=403)
        match request.segments:
            case ["v1" | "v2", "reconstructions", xet_hash] if file := repo.xet_file(xet_hash):
                return json_answer(self._reconstruction(repo, file, key))
        return json_answer({"error": "Not found"}, status=404)

    def _reconstruction(self, repo: Repo, file: RepoFile, key: str) -> dict[str, object]:
        path = f"/xet-bridge-us/{repo.repo_id}/{file.sha256}"
        origin = self._state.chunks_url or self._state.urls["cdn"]
        url = f"{origin}{path}?{self._state.signer.query(path, key)}"
        chunks = {"start": 0, "end": 1}
        ranges = [{"chunks": chunks, "bytes": {"start": 0, "end": file.size - 1}}]
        return {
            "offset_into_first_range": 0,
            "terms": [{"hash": file.xet_hash, "unpacked_length": file.size, "range": chunks}],
            "xorbs": {file.xet_hash: [{"url": url, "ranges": ranges}]},
        }
