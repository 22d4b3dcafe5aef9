"""Paths as clients write them, and what to say to those that lead nowhere."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile(r"/{2,}")
# OpenAI's own paths, which a base URL without /v1 leads to.
_UNDER_V1 = re.compile(r"/(?:chat/completions|completions|responses|models(?:/.*)?)")
_NOT_DONE = (
    (
        re.compile(r"/v1/responses/input_tokens"),
        "input tokens are counted by POST {root}/tokenize",
    ),
    (
        re.compile(r"/v1/(?:responses|conversations)(?:/.*)?"),
        "responses are not stored here; send the whole conversation as `input` of POST "
        "{root}/v1/responses",
    ),
    (re.compile(r"/v1/chat/completions/.*"), "chat completions are not stored here"),
    (
        re.compile(r"(?:/v1)?/(?:embeddings|embed|rerank|score|pooling|classify)(?:/.*)?"),
        "this service generates text; embeddings and scores are not done here",
    ),
    (
        re.compile(r"(?:/v1)?/(?:audio|images|videos|realtime)(?:/.*)?"),
        "this service generates text; pictures and sound are not done here",
    ),
    (
        re.compile(
            r"/v1/(?:assistants|batches|containers|evals|files|fine_tuning|moderations|skills|"
            r"threads|uploads|vector_stores)(?:/.*)?"
        ),
        "this part of OpenAI's API is not done here; chat completions, completions, responses "
        "and models are",
    ),
    (
        re.compile(r"(?:/v1)?/messages(?:/.*)?"),
        "Anthropic's API is not done here; use POST {root}/v1/chat/completions",
    ),
    (
        re.compile(r"/api/.*"),
        "Ollama's API is not done here; use POST {root}/v1/chat/completions",
    ),
    (
        re.compile(r"/(?:completion|infill|generate|generate_stream|invocations|v2/.*)"),
        "this API is not done here; use POST {root}/v1/completions or {root}/v1/chat/completions",
    ),
)


class PlainPath:
    """Takes a double slash and one at the end for slips: the same route, without a redirect.

    A redirected POST loses its body in many clients, and some base URLs end in a slash.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on under the plain path."""
        if scope["type"] == "http":
            root = scope.get("root_path", "")
            path = str(scope["path"]).removeprefix(root)
            plain = _SLASHES.sub("/", path)
            plain = plain.rstrip("/") or plain[:1]
            if plain != path:
                scope = {**scope, "path": root + plain}
        await self._app(scope, receive, send)


def lost(path: str, root: str) -> str:
    """Return the words for a path that leads nowhere.

    Args:
        path: below the prefix under which the service is reached.
        root: that prefix, `` at the top.
    """
    if path == "/v1":
        return f"this is the base URL of clients; the models are listed at {root}/v1/models"
    if path.startswith("/v1/v1"):
        return f"the path has /v1 twice; the base URL of clients ends in {root}/v1, once"
    if _UNDER_V1.fullmatch(path):
        return f"the API is under {root}/v1; end the client's base URL in {root}/v1"
    for pattern, words in _NOT_DONE:
        if pattern.fullmatch(path):
            return words.format(root=root)
    return f"no such path; the API is under {root}/v1, for example {root}/v1/models"
