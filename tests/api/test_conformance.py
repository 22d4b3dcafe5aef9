"""Any request that OpenAI's document describes, and many that it forbids, gets a valid answer."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
)

from serve_app.api.supported_fields import CHAT, COMPLETION, RESPONSES
from tests.api.harness import MODEL, Service
from tests.api.specification import EVENTS, conform, document, request_fields
from tests.fakes import FakeEngine

pytestmark = pytest.mark.slow

BODIES = {
    "CreateChatCompletionRequest": (CHAT, "messages"),
    "CreateCompletionRequest": (COMPLETION, "prompt"),
    "CreateResponse": (RESPONSES, "input"),
}
_NAME = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"type": "string"},
    },
    "required": ["role", "content"],
}
_TOOL = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": _NAME, "parameters": {"type": "object"}},
    "required": ["type", "name"],
}
# Where a field has many forms, one that is served.
SERVED: dict[str, dict[str, Any]] = {
    "CreateChatCompletionRequest": {},
    "CreateCompletionRequest": {
        "prompt": {"type": "string", "minLength": 1},
        "best_of": {"type": "null"},  # it must equal `n`, which is tried
    },
    "CreateResponse": {
        "input": {"type": "array", "minItems": 1, "items": _MESSAGE},
        "tools": {"type": "array", "items": _TOOL},
    },
}
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
REPEATABLE = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
ANSWERED: Counter[tuple[str, str]] = Counter()


def narrow(described: dict[str, Any], *, stream: bool) -> None:
    """Ask for the served model, and not for what is refused by name (test_supported_fields.py).

    Otherwise nearly every request would end there, and next to nothing would reach the engine.
    """
    for name, (fields, required) in BODIES.items():
        asked = {k: v for k, v in request_fields(name).items() if k not in fields.refused}
        asked |= {"model": {"const": MODEL}, **SERVED[name]}
        if stream:
            asked["stream"] = {"const": True}
        else:
            del asked["stream_options"]
        described["components"]["schemas"][name] = {
            "type": "object",
            "properties": asked,
            "required": ["model", required, *(["stream"] if stream else [])],
        }
    parameters = described["paths"]["/models/{model}"]["get"]["parameters"]
    parameters[0]["schema"] = {"enum": [MODEL, "another"]}


def served(*, stream: bool) -> Any:
    """Return the document as schemathesis reads it, in front of the application."""
    described = deepcopy(document())
    described["servers"] = [{"url": "/v1"}]
    narrow(described, stream=stream)
    schema = schemathesis.openapi.from_dict(described, config=SchemathesisConfig())
    schema.config.max_stream_events = 10_000
    if stream:
        schema.config.generation.modes = [GenerationMode.POSITIVE]
    schema.app = Service(FakeEngine(["a", "b"])).app
    return schema


def check(case: Any) -> None:
    """Send a request; fail unless its answer, or each event of it, is as described."""
    response = case.call()
    case.validate_response(response, checks=CHECKS)
    kind = response.headers["content-type"][0].partition(";")[0]
    if kind == "text/event-stream":
        lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
        events = [line.removeprefix("data: ") for line in lines]
        if case.path != "/responses":
            assert events.pop() == "[DONE]"
        for event in events:
            conform(json.loads(event), EVENTS[case.path])
    ANSWERED[case.operation.label, kind if response.status_code == 200 else "refused"] += 1


whole, streams = served(stream=False), served(stream=True).include(method="POST")


@REPEATABLE
@whole.parametrize()
def test_operations_answer_as_described(case):
    """No 5xx, the described content types, and bodies that fit their schemas."""
    check(case)


@REPEATABLE
@streams.parametrize()
def test_operations_stream_as_described(case):
    """The same where a stream is asked for; its events fit their schemas."""
    check(case)


def test_operations_were_really_answered():
    """The requests above were no heap of refusals; runs after them, not alone."""
    for path in EVENTS:
        for kind in ("application/json", "text/event-stream", "refused"):
            assert ANSWERED[f"POST {path}", kind] >= 20, ANSWERED
    assert ANSWERED["GET /models", "application/json"], ANSWERED
    assert ANSWERED["GET /models/{model}", "application/json"], ANSWERED


def test_operations_checks_can_fail():
    """A 5xx does not pass."""
    broken = served(stream=False)
    broken.app = Service(FakeEngine([RuntimeError("fault")])).app
    case = broken["/completions"]["POST"].Case(
        body={"model": MODEL, "prompt": "a"}, media_type="application/json"
    )
    with pytest.raises(FailureGroup):
        case.call_and_validate(checks=CHECKS)
