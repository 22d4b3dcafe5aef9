"""Logs: secrets scrubbed everywhere, facts as keys, names from the catalogue."""

import io
import json
import logging
import re
from pathlib import Path

import pytest
import structlog

import serve_app
from serve_app.config import LoggingConfig
from serve_app.telemetry import logs

TOKEN = "hf_" + "Qz7" * 12


@pytest.fixture
def serve_stream():
    """A handler on Serve's logger, as a replica has one."""
    logger = logging.getLogger(logs.SERVE_LOGGER)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.setLevel("DEBUG")
    logger.propagate = False
    yield stream, handler
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate
    structlog.reset_defaults()


@pytest.mark.parametrize(
    "value",
    [
        TOKEN,
        f"x {TOKEN} y",
        {"a": [TOKEN]},
        (TOKEN,),
        ValueError(TOKEN),
        TOKEN.encode(),
        {TOKEN: 1},
        f"Authorization: Bearer {TOKEN}",
        "authorization: bearer abcdefghijkl",
    ],
)
def test_scrub_leaves_no_secret(value):
    """Tokens vanish from strings, containers, exceptions and bytes."""
    clean = str(logs.scrub(value))
    assert TOKEN not in clean
    assert "abcdefghijkl" not in clean
    assert "[secret]" in clean


def test_scrub_keeps_facts():
    """Numbers, None and plain words pass unchanged."""
    facts = {"n": 1, "f": 0.5, "none": None, "ok": True, "text": "hf_home is a name"}
    assert logs.scrub(facts) == facts


def test_record_has_facts_as_keys(serve_stream):
    """In a replica the event and every fact are keys of the record, and one readable line."""
    _, handler = serve_stream
    records = []
    handler.emit = records.append
    logs.configure_serve(LoggingConfig())
    structlog.get_logger().info("request.finished", status=200, detail=TOKEN)
    (record,) = records
    assert (record.event, record.status, record.detail) == ("request.finished", 200, "[secret]")
    assert record.getMessage() == "request.finished status=200 detail=[secret]"


def test_console_format_is_one_readable_line(serve_stream):
    """Without JSON the line alone carries the facts."""
    stream, _ = serve_stream
    logs.configure_serve(LoggingConfig(format="console"))
    structlog.get_logger().info("engine.started", max_context_tokens=8192)
    assert stream.getvalue() == "engine.started max_context_tokens=8192\n"


def test_scrub_reaches_other_libraries_and_tracebacks(serve_stream):
    """A library's line and an exception's text are scrubbed before they are written."""
    stream, _ = serve_stream
    logs.configure_serve(LoggingConfig())
    logger = logging.getLogger(logs.SERVE_LOGGER)
    logger.warning("GET with %s", TOKEN)
    try:
        raise RuntimeError(TOKEN)
    except RuntimeError:
        logger.exception("failed")
    text = stream.getvalue()
    assert TOKEN not in text
    assert "RuntimeError: [secret]" in text


def test_logging_honours_levels(serve_stream):
    """Below the configured level nothing is written."""
    stream, _ = serve_stream
    logs.configure_serve(LoggingConfig(level="error"))
    structlog.get_logger().info("model.loading")
    assert stream.getvalue() == ""


def test_configure_cli_writes_json_to_stderr(capsys):
    """Without a terminal one JSON object per event."""
    logs.configure_cli(LoggingConfig())
    structlog.get_logger().info("rollout.approved", nodes=2, token=TOKEN)
    structlog.reset_defaults()
    event = json.loads(capsys.readouterr().err)
    assert (event["event"], event["nodes"], event["level"], event["token"]) == (
        "rollout.approved",
        2,
        "info",
        "[secret]",
    )


def test_events_in_the_code_are_those_of_the_catalogue():
    """The catalogue lists exactly what the code logs."""
    source = "\n".join(path.read_text() for path in Path(serve_app.__file__).parent.rglob("*.py"))
    used = set(re.findall(r"\blog\.(?:debug|info|warning|error)\(\s*\"([a-z_.]+)\"", source))
    assert used == set(logs.EVENTS)
