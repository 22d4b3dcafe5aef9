"""The whole error tree: what can go wrong, its stable code, its HTTP status.

    ServeAppError
    ├── ConfigError              a config that cannot be used; the command line exits 2
    ├── AccessDenied             a node may not read the weights; blocks a rollout or a replica
    ├── ModelLoadError           weights or tokenizer are unusable after the gate said yes
    ├── RequestError             the client's fault, 4xx
    │   ├── InvalidRequest           400, malformed or out of range
    │   ├── UnsupportedParameter     400, a known field that is not done here
    │   ├── ContextLengthExceeded    400, prompt and completion do not fit the window
    │   ├── AnswerTooLarge           400, the answer grew over the limit
    │   ├── HostNotAllowed           403, the Host header names another machine
    │   ├── ModelNotFound            404, another model's name
    │   ├── RouteNotFound            404, no such path
    │   ├── MethodNotAllowed         405, another method's path
    │   ├── BodyTimeout              408, the body did not come in time
    │   ├── RequestTooLarge          413, body over the limit
    │   ├── UnsupportedMediaType     415, the body does not say that it is JSON
    │   ├── HeadersTooLarge          431, too many headers or too many bytes of them
    │   └── InvalidApiKey            401, no key or an unknown one
    │       └── ExpiredApiKey            401, one whose time is over
    ├── Overloaded               429, the queue is full; says when to retry
    ├── KeyLimitExceeded         429, a limit of the API key is reached; says which
    ├── RequestCancelled         499, the client went away or asked to stop
    ├── DeadlineExceeded         504, the request's own time limit passed
    ├── NotReady                 503, no replica can answer now
    └── EngineError              500, generation failed for a reason of ours
        └── EngineDead           503, the engine stopped; the replica is being replaced

Owns the words a client may see: `ServeAppError.message` and nothing else. This module
imports nothing of the package. Errors cross actors, so every class pickles: instances hold
one message and flat keyword details, and no secret ever enters either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeAlias

Detail: TypeAlias = str | int | float | bool | None


class ServeAppError(Exception):
    """Base of every error of this package.

    Args:
        message: one sentence for a person, naming the fix where there is one.
        param: the request or config field at fault, if one is.
        details: flat facts for logs, never shown to a client.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    error_type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, **details: Detail) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details

    def __str__(self) -> str:
        """Return the message alone."""
        return self.message

    def __reduce__(self) -> tuple[Callable[..., ServeAppError], tuple[object, ...]]:
        """Rebuild with keyword details; plain exceptions with keywords do not unpickle."""
        return _rebuild, (type(self), self.message, self.param, self.details)


def _rebuild(
    kind: type[ServeAppError], message: str, param: str | None, details: dict[str, Detail]
) -> ServeAppError:
    return kind(message, param=param, **details)


class ConfigError(ServeAppError):
    """The configuration cannot be used; the message names the key and the fix."""

    code = "config_error"


class AccessDenied(ServeAppError):
    """This node may not read the weights, or could not prove that it may."""

    code = "access_denied"
    http_status = 503


class ModelLoadError(ServeAppError):
    """Weights, tokenizer or their numbers are unusable."""

    code = "model_load_error"
    http_status = 503


class RequestError(ServeAppError):
    """The request is at fault; repeating it unchanged cannot succeed."""

    code = "invalid_request"
    http_status = 400
    error_type = "invalid_request_error"


class InvalidRequest(RequestError):
    """A field is malformed, missing or out of range."""

    code = "invalid_value"


class UnsupportedParameter(RequestError):
    """A known field of the API that this service does not do."""

    code = "unsupported_parameter"


class ContextLengthExceeded(RequestError):
    """Prompt and requested completion do not fit the model's window."""

    code = "context_length_exceeded"


class AnswerTooLarge(RequestError):
    """The answer grew over `api.max_answer_bytes` while it was generated."""

    code = "answer_too_large"


class HostNotAllowed(RequestError):
    """The Host header names a machine that this service is not known as."""

    code = "host_not_allowed"
    http_status = 403


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    code = "model_not_found"
    http_status = 404


class RouteNotFound(RequestError):
    """No such path."""

    code = "not_found"
    http_status = 404


class MethodNotAllowed(RequestError):
    """The path exists under another method."""

    code = "method_not_allowed"
    http_status = 405


class BodyTimeout(RequestError):
    """The body did not come within `api.body_timeout_s`. Repeating it may succeed."""

    code = "request_timeout"
    http_status = 408


class RequestTooLarge(RequestError):
    """The body is over `api.max_request_bytes`."""

    code = "request_too_large"
    http_status = 413


class HeadersTooLarge(RequestError):
    """The request has more headers, or more bytes of them, than are read."""

    code = "headers_too_large"
    http_status = 431


class UnsupportedMediaType(RequestError):
    """The body does not say that it is JSON."""

    code = "unsupported_media_type"
    http_status = 415


class InvalidApiKey(RequestError):
    """The request carries no API key, or an unknown one."""

    code = "invalid_api_key"
    http_status = 401


class ExpiredApiKey(InvalidApiKey):
    """The request carries an API key whose time is over."""

    code = "api_key_expired"


class KeyLimitExceeded(ServeAppError):
    """A limit of the API key is reached; `param` is which. `details` as those of `Overloaded`."""

    code = "key_limit_exceeded"
    http_status = 429
    error_type = "rate_limit_error"


class Overloaded(ServeAppError):
    """The queue is full. `details["retry_after_s"]` is a whole number of seconds, >= 1."""

    code = "rate_limit_exceeded"
    http_status = 429
    error_type = "rate_limit_error"


class RequestCancelled(ServeAppError):
    """The request was cancelled before it finished (status as nginx's 499)."""

    code = "request_cancelled"
    http_status = 499


class DeadlineExceeded(ServeAppError):
    """The request's own time limit passed before it finished."""

    code = "deadline_exceeded"
    http_status = 504


class NotReady(ServeAppError):
    """No replica can answer now; retrying may succeed."""

    code = "not_ready"
    http_status = 503


class EngineError(ServeAppError):
    """Generation failed for a reason that is not the client's."""

    code = "engine_error"


class EngineDead(EngineError):
    """The engine stopped for good; its replica is being replaced. Retrying may succeed."""

    code = "engine_dead"
    http_status = 503
