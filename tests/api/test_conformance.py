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

from serve_app.api.fields import CHAT, COMPLETION
from tests.api.harness import MODEL, Service
from tests.api.specification import EVENTS, conform, document
from tests.fakes import FakeEngine

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
REPEATABLE = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
ANSWERED: Counter[tuple[str, str]] = Counter()


def narrow(described: dict[str, Any], *, stream: bool) -> None:
    """Ask for the served model, and not for what is refused by name (tests/api/test_fields.py).

    Otherwise nearly every request would end there, and next to nothing would reach the engine.
    """
    schemas = described["components"]["schemas"]
    chat = schemas["CreateChatCompletionRequest"]["allOf"][1]
    completion = schemas["CreateCompletionRequest"]
    del completion["properties"]["prompt"]["nullable"]
    del completion["properties"]["best_of"]  # it begins with 0, and only `n` is taken
    for body, fields in ((chat, CHAT), (completion, COMPLETION)):
        body["properties"]["model"] = {"const": MODEL}
        for name in fields.refused:
            body["properties"].pop(name, None)
        if stream:
            body["properties"]["stream"] = {"const": True}
            body["required"].append("stream")
        else:
            del body["properties"]["stream_options"]
    parameters = described["paths"]["/models/{model}"]["get"]["parameters"]
    parameters[0]["schema"] = {"enum": [MODEL, "another"]}


def served(*, stream: bool) -> Any:
    """Return the document as schemathesis reads it, in front of the application."""
    described = deepcopy(document())
    del described["paths"]["/responses"]
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
        *chunks, done = [line.removeprefix("data: ") for line in response.text.split("\n\n")[:-1]]
        assert done == "[DONE]"
        for chunk in chunks:
            conform(json.loads(chunk), EVENTS[case.path])
    ANSWERED[case.operation.label, kind if response.status_code == 200 else "refused"] += 1


whole, streams = served(stream=False), served(stream=True).include(method="POST")


@REPEATABLE
@whole.parametrize()
def test_every_answer_is_as_described(case):
    """No 5xx, the described content types, and bodies that fit their schemas."""
    check(case)


@REPEATABLE
@streams.parametrize()
def test_every_stream_is_as_described(case):
    """The same where a stream is asked for; its events fit their schemas."""
    check(case)


def test_enough_was_really_answered():
    """The requests above were no heap of refusals; runs after them, not alone."""
    for path in EVENTS:
        for kind in ("application/json", "text/event-stream", "refused"):
            assert ANSWERED[f"POST {path}", kind] >= 20, ANSWERED
    assert ANSWERED["GET /models", "application/json"], ANSWERED
    assert ANSWERED["GET /models/{model}", "application/json"], ANSWERED


def test_the_checks_can_fail():
    """A 5xx does not pass."""
    broken = served(stream=False)
    broken.app = Service(FakeEngine([RuntimeError("fault")])).app
    case = broken["/completions"]["POST"].Case(
        body={"model": MODEL, "prompt": "a"}, media_type="application/json"
    )
    with pytest.raises(FailureGroup):
        case.call_and_validate(checks=CHECKS)
