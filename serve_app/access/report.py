"""The gate's words for people: the table of `serve status`, and one line for logs.

Serve prints a message as a plain block only if no line has a tab, a trailing space or a
character outside ASCII; so everything that goes out of here is made so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from serve_app.access.verdict import NodeVerdict, Verdict

ROWS = 64  # beyond these, granted nodes are counted instead of listed
WIDTH = 100
GRANTED = "granted"
HEAD = ("NODE", "OUTCOME", "TOKEN", "ACCOUNT")
OUR_WORDS = ("weights_unreachable", "unknown", "identity_refused", "signature_invalid")
_Problem: TypeAlias = tuple[str, str | None, str]


def line(node: NodeVerdict) -> str:
    """Say one node's verdict in one line."""
    parts = [f"{node.node_name}: {node.outcome}, token {node.token}"]
    if node.hub_message:
        parts.append(f"{_speaker(node)}: {node.hub_message}")
    if node.outcome != GRANTED:
        parts.append(node.remedy + (f" {node.url}" if node.url else ""))
    return _ascii(" | ".join(parts))


def table(verdict: Verdict) -> str:
    """Say a whole verdict: the decision, a line for each node, then each problem with its fix.

    With adapters, one after the other; first what blocks.
    """
    return "\n\n".join(_table(part) for part in _ordered(verdict))


def _table(verdict: Verdict) -> str:
    lines = [*_head(verdict), "", *_rows(verdict), *_problems(verdict), *_warnings(verdict)]
    return "\n".join(_ascii(entry).rstrip() for entry in lines)


def _ordered(verdict: Verdict) -> Sequence[Verdict]:
    return sorted(verdict.parts, key=lambda part: part.approved)


def html(verdict: Verdict) -> str:
    """Say the same as `table` for a notebook; every value is escaped, links can be clicked."""
    return "".join(_html(part) for part in _ordered(verdict))


def _html(verdict: Verdict) -> str:
    cells = [
        (node.node_name, str(node.outcome), str(node.token), node.token.account or "-")
        for node in verdict.nodes
    ]
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in cells
    )
    names = "".join(f"<th>{name.title()}</th>" for name in HEAD)
    said = [*_problems(verdict), *_warnings(verdict)]
    text = "<br>".join(_linked(line) for line in (*_head(verdict), *said))
    return f"<p>{text}</p><table><tr>{names}</tr>{rows}</table>"


def _linked(line: str) -> str:
    label, found, url = line.partition("Link: ")
    if not found or not url.startswith("https://"):
        return escape(line)
    return f'{escape(label)}<a href="{escape(url)}" rel="noreferrer">{escape(url)}</a>'


def _head(verdict: Verdict) -> Iterator[str]:
    pin = f", {_pin_name(verdict.commit)} {verdict.commit[:12]}" if verdict.commit else ""
    version = "" if verdict.is_local else f" ({verdict.revision}{pin})"
    what = verdict.repo_id + version
    total = len(verdict.nodes)
    failed = sum(node.outcome != GRANTED for node in verdict.nodes)
    if verdict.is_deferred:
        yield f"Access DEFERRED, nothing is proven: no node is there yet that could read {what}."
        yield "Each replica proves its own access when it starts (access.on_no_nodes: defer)."
    elif verdict.approved:
        yield f"Access granted: {what} can be read on {_count(total)}."
    elif failed:
        said = "Access BLOCKED" if verdict.exit_code == 3 else "Access NOT PROVEN"
        yield f"{said}: {failed} of {_count(total)} cannot read {what}."
    else:
        pin = _pin_name(verdict.commit or "")
        yield f"Access NOT PROVEN: the nodes disagree about the {pin} of {what}."
    if not verdict.is_local:
        asked = f"{verdict.hub_requests} requests in {verdict.duration_s:.1f} s"
        yield f"Asked {verdict.endpoint}, {asked}."


def _pin_name(pin: str) -> str:
    """Name what is pinned: a Hub's commit, or the listing of a source without commits."""
    return "listing" if len(pin) == 64 else "commit"


def _count(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"


def _rows(verdict: Verdict) -> Iterator[str]:
    nodes = list(verdict.nodes)
    hidden = 0
    if len(nodes) > ROWS:
        refused = [node for node in nodes if node.outcome != GRANTED]
        granted = [node for node in nodes if node.outcome == GRANTED]
        kept = granted[: max(0, ROWS - len(refused))]
        hidden = len(granted) - len(kept)
        nodes = refused + kept
    cells = [HEAD]
    cells += [
        (node.node_name, str(node.outcome), str(node.token), node.token.account or "-")
        for node in nodes
    ]
    yield from aligned(cells)
    if hidden:
        yield f"  and {hidden} more nodes, all granted"


def aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Put rows of cells into columns, indented; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  " + "  ".join(cells).rstrip()


def _problems(verdict: Verdict) -> Iterator[str]:
    seen: dict[_Problem, list[str]] = {}
    links: dict[_Problem, NodeVerdict] = {}
    for node in verdict.nodes:
        if node.outcome == GRANTED:
            continue
        key: _Problem = (node.outcome.value, node.hub_message, node.remedy)
        seen.setdefault(key, []).append(node.node_name)
        links.setdefault(key, node)
    for key, names in seen.items():
        node = links[key]
        yield ""
        yield f"{node.outcome} on {_names(names)}"
        if node.hub_message:
            yield from _wrapped(f"{_speaker(node)}: ", node.hub_message)
        yield from _wrapped("Fix: ", node.remedy)
        if node.url:
            yield f"  Link: {node.url}"


def _warnings(verdict: Verdict) -> Iterator[str]:
    seen: dict[str, list[str]] = {}
    for node in verdict.nodes:
        reservation = (node.hub_message,) if node.outcome == GRANTED and node.hub_message else ()
        for warning in (*reservation, *_by_mirror(node), *node.token.warnings):
            seen.setdefault(warning, []).append(node.node_name)
    known = [node for node in verdict.nodes if node.token.fingerprint and not _by_role(node)]
    prints = {node.token.fingerprint for node in known}
    if len(prints) > 1:
        text = f"the nodes use {len(prints)} different tokens"
        seen[text] = [node.node_name for node in known]
    if seen:
        yield ""
    for warning, names in seen.items():
        yield from _wrapped("Note: ", f"{warning} ({_names(names)})", indent="")


def _by_role(node: NodeVerdict) -> bool:
    """Return whether a cloud gives this node keys of its own, which change by themselves."""
    return node.token.source.startswith("s3:") and "role" in node.token.source


def _by_mirror(node: NodeVerdict) -> tuple[str, ...]:
    """Say what a grant proves that came from a mirror."""
    if node.mirror is None or node.outcome != GRANTED:
        return ()
    return (
        f"granted by {node.mirror} in the Hub's place: proven is what this node may read there; "
        "the Hub saw the account of the mirror, one for all nodes, and no account of this node",
    )


def _speaker(node: NodeVerdict) -> str:
    """Introduce the message: the Hub's own words, or what was found out about an answer."""
    if node.http_status is None or node.outcome in OUR_WORDS:
        return "Found"
    who = "The Hub" if node.mirror is None else node.mirror.capitalize()
    return f"{who} said ({node.http_status})"


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _wrapped(label: str, text: str, *, indent: str = "  ") -> Iterable[str]:
    return textwrap.wrap(
        indent + label + text,
        WIDTH,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _ascii(text: str) -> str:
    return text.replace("\t", " ").encode("ascii", "backslashreplace").decode()
