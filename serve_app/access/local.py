"""A model that is a directory on the node: complete, or what is missing. No network.

Reads names, config.json, the index and the headers of safetensors files, all with limits: the
check must not load a tensor library before the node has proven what it holds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from serve_app.access.capacity import room_fault
from serve_app.access.digest import digest_of, directory_hashes
from serve_app.access.license import facts_of
from serve_app.access.limited import within
from serve_app.access.remedies import remedy
from serve_app.access.signature import Unverified, require_signed
from serve_app.access.terms import Terms
from serve_app.access.verdict import NodeVerdict, Outcome, TokenReport
from serve_app.checkpoint.adapter import check_adapter
from serve_app.checkpoint.directory import check_checkpoint
from serve_app.checkpoint.runnable import Loader, weights_bytes
from serve_app.errors import ModelLoadError
from serve_app.redaction import sanitise


def check_directory(path: str, loader: Loader | None = None) -> NodeVerdict:
    """Check config, tokenizer, index, and the header and size of every weights file.

    Args:
        path: the directory; `~` works.
        loader: what will load it, so that what it cannot load is refused; None asks for
            completeness alone.

    Returns:
        `granted`, or `weights_missing` with the first thing that is wrong.
    """
    try:
        if loader is not None and loader.adapter:
            check_adapter(Path(path).expanduser())
            return _verdict(Outcome.GRANTED, path, "")
        found = check_checkpoint(Path(path).expanduser(), loader)
        if loader is not None:
            _refuse_size(found.weights_bytes(), found.config, loader)
    except ModelLoadError as fault:
        remedy = fault.details.get("remedy")
        return _verdict(Outcome.WEIGHTS_MISSING, path, fault.message, remedy)
    except OSError as error:
        return _verdict(Outcome.WEIGHTS_MISSING, path, f"{error.filename}: {error.strerror}")
    return _verdict(Outcome.GRANTED, path, "")


def check_model(path: str, terms: Terms, loader: Loader | None, limit_s: float) -> NodeVerdict:
    """Do `check_directory`, and compare license, digest and signature with what is wanted.

    Reads every byte of the directory if a digest or a signature is wanted, the next time only
    what changed.

    Args:
        path: the directory; `~` works.
        terms: what is wanted of it.
        loader: see `check_directory`.
        limit_s: of reading all but those bytes: a mount whose server is gone answers nothing.

    Returns:
        Its verdict, or `license_not_allowed`, `digest_mismatch`, `signature_invalid` or
        `weights_unreachable`; with what the directory is.
    """
    place = Path(path).expanduser()
    read = within(limit_s, lambda: (check_directory(path, loader), facts_of(place)))
    if read is None:
        message = f"{path} was not read within {limit_s:g} s"
        way = f"See to the mount of {path} on this node: its server does not answer, or too slowly."
        return _verdict(Outcome.WEIGHTS_UNREACHABLE, path, message, way)
    verdict, facts = read
    if verdict.outcome is not Outcome.GRANTED:
        return replace(verdict, facts=facts)
    try:
        hashes = directory_hashes(place) if terms.wants_files else {}
        if terms.digest is not None:
            facts = replace(facts, digest=digest_of(hashes))
        if found := terms.fault(facts):
            outcome, message = found
            verdict = _verdict(outcome, path, message, remedy(outcome)[0])
        elif terms.signature is not None:
            require_signed(place, hashes, terms.signature, whole=True)
    except ModelLoadError as fault:
        verdict = _verdict(Outcome.WEIGHTS_MISSING, path, fault.message)
    except Unverified as fault:
        way = fault.remedy or remedy(fault.outcome)[0]
        verdict = _verdict(fault.outcome, path, fault.message, way)
    return replace(verdict, facts=facts)


def _refuse_size(listed: int, config: dict[str, Any], loader: Loader) -> None:
    if found := room_fault(weights_bytes(listed, config, loader), loader):
        raise ModelLoadError(found.message, remedy=found.remedy)


def _verdict(outcome: Outcome, path: str, message: str, remedy: object = None) -> NodeVerdict:
    sentence = "Nothing to do."
    if outcome is not Outcome.GRANTED:
        sentence = f"Put the complete model into {path} on this node (model.path)."
    return NodeVerdict(
        node_id="",
        node_name="",
        outcome=outcome,
        remedy=str(remedy) if remedy else sentence,
        hub_message=sanitise(message) or None,
        token=TokenReport(),
    )
