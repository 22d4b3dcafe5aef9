"""Pure ASGI layers around the routes: the request id, and the one end of every request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.error_body import envelope, error_headers
from serve_app.api.request_body import require_small_headers
from serve_app.api.request_record import RequestRecord, Trace, attach, path_of, trace_of
from serve_app.api.sse import dump
from serve_app.errors import EngineError, RequestCancelled, ServeAppError
from serve_app.redaction import place_of

log = structlog.get_logger()

_SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """Gives each request an id, the client's own if it is sane, and returns it as a header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with a trace in the scope and `x-request-id` on the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # The client's own, so that its logs and ours name the same request; it goes into log lines.
        given = Headers(scope=scope).get("x-request-id", "")
        trace = Trace(request_id=given) if _SANE_ID.fullmatch(given) else Trace()
        trace.client = (scope.get("client") or ("",))[0]
        attach(scope, trace)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = {"x-request-id": trace.request_id, **trace.more_headers()}
                MutableHeaders(scope=message).update(more)
            await send(message)

        await self._app(scope, receive, send_with_id)


class Boundary:
    """The one place where exceptions become answers, and where a request's record is made.

    An error before the answer started becomes an envelope with its status; after that it
    becomes the last event of the stream. Whatever is not a `ServeAppError` says no more
    than that generation failed, and under which request id.

    Args:
        app: everything inside.
        on_finished: called once for each request that is not a probe.
        probes: paths that are asked all the time and leave no record while they are well.
        send_timeout_s: how long a client may take nothing of its answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        on_finished: Callable[[RequestRecord], None] | None,
        probes: frozenset[str],
        send_timeout_s: float = 60.0,
    ) -> None:
        self._app = app
        self._on_finished = on_finished
        self._probes = probes
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request to its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace, answer = trace_of(scope), _Answer(send, self._send_timeout_s)
        error: ServeAppError | None = None
        try:
            # Inside, so that this refusal too is an envelope, with an id and a record.
            require_small_headers(scope["headers"])
            await self._app(scope, receive, answer.send)
        # Serve cancels the task when the client goes, and waits until it has ended so.
        except asyncio.CancelledError:
            if not answer.complete:
                error = RequestCancelled("the request was cancelled")
            raise
        except Exception as fault:  # noqa: BLE001 - the boundary: nothing else may reach a client
            failure = _speakable(fault, trace)
            if not answer.complete:  # what went out whole has ended well, whatever came later
                error = failure
                await answer.fail(failure, trace.write_failure)
        finally:
            path = path_of(scope)
            if self._on_finished is not None and path not in self._probes:
                self._on_finished(trace.close(path=path, status=answer.status, error=error))


class _Answer:
    """What went out so far, and how to end it with an error."""

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._streaming = False
        self._lost = False
        self.complete = False
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._streaming = kind.startswith("text/event-stream")
        await self._pass_on(message)
        if message["type"] == "http.response.body":
            # Behind the send: only what the server has taken counts as delivered.
            self.complete = not message.get("more_body", False)

    async def _pass_on(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                await self._send(message)
        except TimeoutError as error:
            self._lost = limit.expired()
            if not self._lost:
                raise
            raise RequestCancelled("the client takes nothing of its answer any more") from error
        except OSError as error:  # how ASGI servers say that nobody listens any more
            self._lost = True
            raise RequestCancelled("the client went away") from error

    async def fail(
        self, error: ServeAppError, write: Callable[[ServeAppError], bytes] | None
    ) -> None:
        # Writing to who has gone would wait for another whole `send_timeout_s`.
        if self._lost:
            return
        try:
            if not self.status:
                await self._refuse(error)
            # The status is out; in a JSON body there is no place for an error, so it stays cut.
            elif self._streaming and write is not None:
                body = write(error)
                await self.send({"type": "http.response.body", "body": body, "more_body": False})
        except RequestCancelled:
            return

    async def _refuse(self, error: ServeAppError) -> None:
        body = dump(envelope(error))
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **error_headers(error),
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send(
            {"type": "http.response.start", "status": error.http_status, "headers": raw}
        )
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _speakable(fault: Exception, trace: Trace) -> ServeAppError:
    if isinstance(fault, ServeAppError):
        return fault
    cause = type(fault).__name__
    log.error("request.failed", request_id=trace.request_id, cause=cause, where=place_of(fault))
    return EngineError(f"generation failed (request {trace.request_id})", cause=cause)
