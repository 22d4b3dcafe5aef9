"""The error tree: codes, statuses, and the way across processes."""

import inspect
import pickle

import pytest

from serve_app import errors
from serve_app.errors import ServeAppError

ALL = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ServeAppError)
]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_errors_survive_pickling(kind):
    """Message, field, details and class arrive on the other side unchanged."""
    error = kind("no room", param="max_tokens", limit=8, retry_after_s=2)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.message, copy.param, copy.details) == (error.message, error.param, error.details)
    assert str(copy) == "no room"


def test_errors_have_unique_codes_and_error_statuses():
    """A code names one class, so that clients can branch on it."""
    codes = [kind.code for kind in ALL]
    assert len(ALL) >= 14
    assert len(set(codes)) == len(codes)
    assert all(400 <= kind.http_status <= 599 for kind in ALL)


def test_errors_blame_the_client_with_4xx_and_nothing_else():
    """RequestError and Overloaded are 4xx; engine faults are 5xx."""
    for kind in ALL:
        if issubclass(kind, errors.RequestError):
            assert 400 <= kind.http_status < 500
            assert kind.error_type == "invalid_request_error"
        if issubclass(kind, errors.EngineError):
            assert kind.http_status >= 500


def test_errors_docstring_draws_every_class():
    """The tree at the top of the module is complete."""
    for kind in ALL:
        assert kind.__name__ in (errors.__doc__ or "")
