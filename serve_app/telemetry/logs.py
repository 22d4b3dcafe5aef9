"""Structured logs: one set-up, one catalogue of event names, one net that catches secrets.

Inside Serve the events go through the standard logger `ray.serve`, so that they land in the
replica's own files beside Serve's lines, with its request id, replica and route; with
`format: json` the event's name and its facts are top-level keys there, and the message is the
same in one readable line. On the command line they go to stderr.
Prompts, completions, headers and tokens are never logged; the scrubber is the last net for
other libraries' lines and for mistakes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping, Sequence
from typing import Any

import structlog

from serve_app.config import LoggingConfig
from serve_app.redaction import scrub

SERVE_LOGGER = "ray.serve"  # Ray Serve writes this logger to the replica's files

EVENTS = {
    "access.granted": "this node proved that it can read the weights",
    "access.refused": "this node may not, or could not prove that it may; says why",
    "access.deferred": "no node is there to ask; each replica will prove its own access",
    "access.not_rechecked": "a gated application could not be looked at; the last verdict stays",
    "access.conflict": "another token here disagrees with the one in use, or no receipt is kept",
    "access.file_changed": "a token's, an identity's or the API keys' file on this node is another "
    "one now; a token's node is checked again at once",
    "rollout.approved": "every node that may host a replica proved its access",
    "rollout.blocked": "at least one node did not; what served goes on serving",
    "history.recorded": "an entry of the rollout history: what was decided, when, why, by whom; "
    "`kept` is false where the cluster did not take it",
    "model.downloading": "weights of the pinned commit are fetched into the node's cache",
    "weights.copied": "other nodes of the cluster gave pieces of the files",
    "weights.peer_failed": "a node gave nothing, or other bytes than the piece; another is asked",
    "weights.refuted": "a file's pieces were as their list says, the whole is not as the Hub says: "
    "the list's author is not believed any more, and the file comes again",
    "weights.peers_unknown": "which nodes have the files is not known; the Hub is asked",
    "weights.xet_failed": "the chunk store gave no or other bytes; these files come over HTTP",
    "weights.lock_unavailable": "the cache's file system has no locks; a marker file takes over",
    "weights.damaged": "a file in the cache has not the bytes that the Hub lists; it is refetched",
    "weights.outdated": "other revisions in the cache, with the bytes that only they hold",
    "model.loading": "weights are read",
    "model.defaults_unusable": "values of generation_config.json that no request could ask for",
    "template.hides_tools": "the chat template shows no tools to the model, so that it calls none "
    "by itself; `model.chat_template` replaces it",
    "model.loaded": "weights are on the device, dtype asserted, warm-up answered",
    "engine.drafts_off": "decode steps run as CUDA graphs, which guesses would leave",
    "engine.compile_unavailable": "torch cannot compile for this GPU: it is slower, and why",
    "engine.graphs_unavailable": "decode steps are not recorded as CUDA graphs, and why",
    "engine.native_unavailable": "the CPU's compiled forward cannot be used here, and why",
    "engine.varlen_unavailable": "torch has no FlashAttention: a GPU attends row by row, slowly",
    "engine.started": "the replica takes requests",
    "replica.started": "the cold-start ledger: seconds by phase until the replica takes requests",
    "engine.step_failed": "all that ran is computed again, shorter or one request at a time",
    "engine.request_failed": "vLLM gave one request up, and says why; the others go on",
    "replica.ended": "the process ends because its engine has stopped; Serve starts another one",
    "engine.hung": "a step takes longer than engine.step_timeout_s; with its phase and its stack",
    "engine.died": "the engine stopped for good; every open request has got its error",
    "ingress.hung": "the ingress' event loop is blocked; its process ends; with the stack",
    "job.failed": "work beside the requests (the re-check, a canary's share, the keys' limits, "
    "files that are watched) met a fault and begins again; with the place",
    "frames.not_listening": "replicas cannot connect to this ingress; their answers come over Ray",
    "frames.unreachable": "a replica cannot connect to an ingress; its answers go over Ray, slower",
    "frames.broken": "a replica's connection said what is no frame, and was ended",
    "grammar.failed": "no process could be made to compile a structure; the client got a 429",
    "grammar.unavailable": "the model's tokenizer cannot be used for structured output, and why",
    "keys.failed": "the file of API keys cannot be read, or its file system does not answer; the "
    "keys read before go on counting",
    "request.finished": "one line for each request, in the ingress",
    "request.failed": "generation failed for a reason that no client may read; says which",
    "request.moved": "its replica was lost before the first token; another one is asked",
    "canary.failed": "a canary gave no first token; the version that serves answers; with the code",
    "request.fields_ignored": "a request had fields that change nothing here; their names",
    "request.tools_left_out": "a request had tools that only OpenAI can run; their types",
    "request.cancelled": "the client went away before the end",
}


class SecretFilter(logging.Filter):
    """Scrub a record of any library, traceback included, before a handler formats it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record in place; never drops one."""
        message = record.getMessage()
        clean = scrub(message)
        if clean != message:
            record.msg, record.args = clean, None
        if record.exc_info and not record.exc_text:
            record.exc_text = scrub(logging.Formatter().formatException(record.exc_info))
        return True


def configure_serve(config: LoggingConfig) -> None:
    """Send structlog's events through Serve's logger. Call once in each replica."""
    render = [_as_record if config.format == "json" else _as_text]
    _configure(config, render, _serve_logger)
    _guard(logging.getLogger(SERVE_LOGGER), logging.getLogger())


def configure_cli(config: LoggingConfig) -> None:
    """Send structlog's events to stderr: readable on a terminal, JSON elsewhere."""
    render: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if sys.stderr.isatty() or config.format == "console":
        render.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
    else:
        render.append(structlog.processors.JSONRenderer())
    _configure(config, render, _stderr_logger)
    _guard(logging.getLogger())


def serve_logging(config: LoggingConfig) -> dict[str, Any]:
    """Return Serve's `logging_config` for a deployment; the access line is ours."""
    encoding = "JSON" if config.format == "json" else "TEXT"
    return {
        "encoding": encoding,
        "log_level": config.level.upper(),
        "enable_access_log": False,
    }


def _configure(config: LoggingConfig, render: Sequence[Any], factory: Any) -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            _scrub_event,
            *render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(config.level),
        logger_factory=factory,
        cache_logger_on_first_use=False,
    )


def _stderr_logger(*_names: str) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)  # the stream of the moment, tests replace it


def _serve_logger(*_names: str) -> logging.Logger:
    return logging.getLogger(SERVE_LOGGER)


def _as_text(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    """Say the event and its facts in one line for a person."""
    facts = [f"{key}={value}" for key, value in event.items() if key != "event"]
    return " ".join([event["event"], *facts])


def _as_record(logger: Any, method: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """Make every fact, and the event's name, a key of its own beside the readable line."""
    return {"msg": _as_text(logger, method, event), "extra": dict(event)}


def _scrub_event(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    return {key: scrub(value) for key, value in event.items()}


def _guard(*loggers: logging.Logger) -> None:
    for logger in loggers:
        for handler in logger.handlers:
            if not any(isinstance(known, SecretFilter) for known in handler.filters):
                handler.addFilter(SecretFilter())
