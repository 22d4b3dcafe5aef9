"""Answers that need no repository: JSON, and what a sick Hub or network says."""

from __future__ import annotations

import json
from typing import Any

from scripts.local_hub.behaviours import Account, Behaviour, Route
from scripts.local_hub.state import rate_headers
from scripts.local_hub.wire import Answer, Silence

HTML = {"Content-Type": "text/html; charset=utf-8"}


def json_answer(payload: Any, headers: dict[str, str] | None = None, status: int = 200) -> Answer:
    """Answer with JSON."""
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(status, json.dumps(payload).encode(), kind | (headers or {}))


def faulty_answer(fault: Behaviour, caller: Account, route: Route) -> Answer:
    """Answer as a Hub, or a network on the way to it, does that is not well."""
    if fault is Behaviour.hang:
        return Answer(0, silence=Silence.HANG)
    if fault is Behaviour.not_http:
        return Answer(0, silence=Silence.NOT_HTTP)
    if fault is Behaviour.garbage:
        page = b"<html><body><h1>Sign in to use this network</h1></body></html>"
        return Answer(200, page, dict(HTML))
    if fault is Behaviour.server_error:
        page = b"<html><head><title>Server error</title></head><body>Server error</body></html>"
        return Answer(caller.failure_status, page, dict(HTML))
    kind = "resolvers" if route is Route.resolve else "api"
    message = (
        "We had to rate limit you: you hit the quota of 1000 api requests per 5 minutes period. "
        "To continue using our service, wait or upgrade your account."
    )
    headers = {
        **rate_headers(kind, left=0, reset_s=caller.retry_after_s),
        "Retry-After": str(caller.retry_after_s),
        "X-Error-Message": message,
    }
    return json_answer({"error": message}, headers, 429)
