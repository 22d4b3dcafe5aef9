"""What is known of one API request: collected while it runs, handed out once at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.types import Scope

from serve_app.api.key_limits import Allowance
from serve_app.api.keys import Key
from serve_app.errors import ServeAppError
from serve_app.protocol import FinishReason, Timing, Usage

_SLOT = "serve_app.trace"
UNMATCHED = "unmatched"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished API request; holds no text of a prompt, a completion or a header.

    Args:
        request_id: the `x-request-id` of the answer.
        path: the route's template, so that its values are few; `unmatched` for no route.
        status: the HTTP status; of a stream that broke, the status its error stands for.
        finish_reason: of the first choice; None for answers that generate nothing.
        error_code: `ServeAppError.code` if the request ended with an error.
        prompt_tokens: tokens read, every prompt counted once.
        completion_tokens: tokens generated for all choices, also of a cancelled request.
        ttft_s: from arrival to the first delta; None if there was none.
        duration_s: from arrival to the end.
        stream: whether the answer was asked for as a stream.
        model: the served model; None where no model is involved.
        timing: what the engine did with the first choice.
        itl_s: seconds a token, one for each delta after the first.
        key: the API key that it came with; None without keys, and for one that is not known.
    """

    request_id: str
    path: str
    status: int
    finish_reason: str | None
    error_code: str | None
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float | None
    duration_s: float
    stream: bool
    model: str | None
    timing: Timing = field(default_factory=Timing)
    itl_s: tuple[float, ...] = ()
    key: Key | None = None


@dataclass(slots=True)
class Trace:
    """One running API request, from its arrival to its record."""

    request_id: str = field(default_factory=lambda: f"req_{uuid4().hex}")
    started: float = field(default_factory=time.monotonic)
    ttft_s: float | None = None
    stream: bool = False
    model: str | None = None
    client: str = ""  # whose turn it is among others: a key's name, else the peer's address
    key: Key | None = None
    allowance: Allowance | None = None  # of the key, while the request is under way
    more_headers: Callable[[], Mapping[str, str]] = dict  # of its answer, when that begins
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    finish_reason: FinishReason | None = None
    timing: Timing = field(default_factory=Timing)
    itl_s: list[float] = field(default_factory=list)
    latest: float = 0.0
    write_failure: Callable[[ServeAppError], bytes] | None = None  # how its stream writes an error

    def delta_arrived(self, usage: Usage, timing: Timing, choices: int) -> None:
        """Note the running totals; the first call ends the time to the first token.

        Args:
            usage: of all choices.
            timing: of the first one.
            choices: that grow at the same time, so that a step has a token for each.
        """
        now = time.monotonic()
        new = usage.completion_tokens - self.usage.completion_tokens
        if self.ttft_s is None:
            self.ttft_s = now - self.started
        elif new > 0:
            self.itl_s.append((now - self.latest) * choices / new)
        self.latest, self.usage, self.timing = now, usage, timing

    @property
    def server_timing(self) -> str:
        """Return the value of the `server-timing` header so far, in milliseconds."""
        parts = {
            "queue": self.timing.queue_s,
            "prefill": self.timing.prefill_s,
            "decode": self.timing.decode_s,
            "total": time.monotonic() - self.started,
        }
        return ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in parts.items())

    def close(self, *, path: str, status: int, error: ServeAppError | None) -> RequestRecord:
        """Return the record of a request that has ended."""
        return RequestRecord(
            request_id=self.request_id,
            path=path,
            status=status if error is None else error.http_status,
            finish_reason=str(self.finish_reason) if self.finish_reason and not error else None,
            error_code=None if error is None else error.code,
            prompt_tokens=self.usage.prompt_tokens,
            completion_tokens=self.usage.completion_tokens,
            ttft_s=self.ttft_s,
            duration_s=time.monotonic() - self.started,
            stream=self.stream,
            model=self.model,
            timing=self.timing,
            itl_s=tuple(self.itl_s),
            key=self.key,
        )


def attach(scope: Scope, trace: Trace) -> None:
    """Give a connection's scope its trace."""
    scope[_SLOT] = trace


def trace_of(scope: Scope) -> Trace:
    """Return the trace that `attach` put into this scope."""
    trace = scope[_SLOT]
    assert isinstance(trace, Trace)  # noqa: S101 - narrows a scope's Any, cannot fail
    return trace


def path_of(scope: Scope) -> str:
    """Return the matched route's template; a free path must not become a metric's label."""
    return str(getattr(scope.get("route"), "path", UNMATCHED))
