"""Write the generated tables of configs/README.md: configuration, metrics, log events.

`scripts/fix` runs it; a test fails when the file is not what the code says.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from serve_app.access_config import parts_in
from serve_app.config import AppConfig
from serve_app.telemetry.logs import EVENTS

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "configs" / "README.md"
METRICS = ROOT / "serve_app" / "telemetry" / "metrics.py"
KINDS = ("Counter", "Gauge", "Histogram")


def tables() -> dict[str, str]:
    """Return each table by the name of its place in the file."""
    return {
        "configuration": _table("key", "default", "meaning", rows=_settings()),
        "metrics": _table("metric", "kind", "labels", "meaning", rows=_metrics()),
        "events": _table("event", "meaning", rows=((f"`{k}`", v) for k, v in EVENTS.items())),
    }


def render(text: str) -> str:
    """Return the file's text with its tables made anew."""
    for name, table in tables().items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text, places = place.subn(f"{begin}\n\n{table}\n\n{end}".replace("\\", r"\\"), text)
        if places != 1:
            raise ValueError(f"{TARGET} has {places} places for {name}")
    return text


def _table(*head: str, rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _settings() -> Iterator[tuple[str, str, str]]:
    for part, info in AppConfig.model_fields.items():
        for inner in parts_in(info.annotation):
            yield from _settings_of(inner, part)


def _settings_of(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for key, field in model.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        shown = json.dumps(list(default) if isinstance(default, tuple) else default)
        cell = "required" if field.is_required() else f"`{shown}`"
        yield f"`{prefix}.{key}`", cell, field.description or ""
        for inner in parts_in(field.annotation):
            yield from _settings_of(inner, f"{prefix}.{key}")


def _metrics() -> Iterator[tuple[str, str, str, str]]:
    """Read the declarations from the source: importing it would need Ray."""
    for node in ast.walk(ast.parse(METRICS.read_text(encoding="utf-8"))):
        kind = getattr(getattr(node, "func", None), "attr", None)
        if isinstance(node, ast.Call) and kind in KINDS:
            options = {k.arg: k.value for k in node.keywords}
            labels = ast.literal_eval(options["tag_keys"]) if "tag_keys" in options else ()
            yield (
                f"`ray_{ast.literal_eval(node.args[0])}`",
                kind.lower(),
                ", ".join(labels),
                ast.literal_eval(options["description"]),
            )


if __name__ == "__main__":
    TARGET.write_text(render(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
