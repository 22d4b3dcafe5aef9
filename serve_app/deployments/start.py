"""A replica's start behind its proof of access: libraries, weights, an engine that answers."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog

from serve_app.access.node_check import keep_receipt
from serve_app.config import AccessConfig, AppConfig, EngineConfig, ModelConfig
from serve_app.engine import backends
from serve_app.errors import ModelLoadError
from serve_app.telemetry import cold_start
from serve_app.weights.fetch import Fetched, fetch, joined
from serve_app.weights.peers import Peers

if TYPE_CHECKING:
    from serve_app.access.verdict import NodeVerdict
    from serve_app.engine.backends import ReplicaEngine

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Proven:
    """What this node may read: a model or an adapter, its commit, and the proof."""

    model: ModelConfig
    commit: str | None
    verdict: NodeVerdict


def import_libraries(engine: EngineConfig, spans: cold_start.Ledger) -> threading.Thread:
    """Begin to import what the engine needs, which takes seconds, and return the thread.

    It reads nothing of a model, so it may run beside the proof; a refusal does not wait for it.
    """
    thread = threading.Thread(target=_import_libraries, args=(engine, spans), daemon=True)
    thread.start()
    return thread


def load(
    config: AppConfig,
    proven: Sequence[Proven],
    spans: cold_start.Ledger,
    libraries: threading.Thread,
) -> tuple[ReplicaEngine, Fetched]:
    """Fetch what was proven and load it into the engine that the config names; blocks.

    Args:
        config: of the application.
        proven: the model first, then its adapters.
        spans: gets the phases.
        libraries: that is importing them.

    Raises:
        AccessDenied: the Hub refuses although the probe was granted a moment ago.
        ModelLoadError: the weights cannot be fetched or loaded.
    """
    with spans.span("download"):
        fetched = [_fetch(each, config.access, spans) for each in proven]
    spans.publish("libraries")
    libraries.join()
    spans.publish("load")
    loading_at = cold_start.now()
    adapters = {
        each.model.name: found.directory
        for each, found in zip(proven[1:], fetched[1:], strict=True)
    }
    engine = backends.load(fetched[0].directory, config, adapters)
    spans.follow(engine.load_report.phases(), started_at=loading_at)
    log.info(
        "model.loaded",
        repo_id=config.model.source,
        commit=proven[0].commit,
        **engine.load_report.facts(),
    )
    log.info("engine.started", max_context_tokens=engine.max_context_tokens)
    return engine, joined(fetched)


def _import_libraries(engine: EngineConfig, spans: cold_start.Ledger) -> None:
    # Not a `span`: it would publish this phase in place of those beside it.
    started_at = cold_start.now()
    gc.disable()  # it would look at all modules again and again: a fifth of the time
    try:
        with suppress(ModelLoadError):  # reported when it is loaded
            backends.import_libraries(engine)
        gc.freeze()  # modules stay; looking at them would stop the replica for half a second
    finally:
        gc.enable()
    spans.follow({"libraries": cold_start.now() - started_at}, started_at=started_at)


def _fetch(proven: Proven, access: AccessConfig, spans: cold_start.Ledger) -> Fetched:
    started = time.monotonic()
    model, commit = proven.model, proven.commit
    log.info("model.downloading", repo_id=model.source, commit=commit)
    fetched = fetch(
        model,
        access,
        commit,
        offline=proven.verdict.receipt_age_s is not None,
        peers=Peers.of(model, commit),
        progress=partial(spans.publish, "download"),
    )
    keep_receipt(proven.verdict, model, access)  # once more: the license is here now
    log.info(
        "model.loading",
        repo_id=model.source,
        commit=commit,
        download_s=round(time.monotonic() - started, 3),
        **fetched.bytes_by_source(),
    )
    return fetched
