"""Every form of a call, and the tags that models put around them.

A new form is a module with a class like the others', and a row here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from serve_app.api.formats.buffer import Buffer, Read, Tools
from serve_app.api.formats.function_tag import FunctionTag
from serve_app.api.formats.json_calls import JsonCall, JsonCalls
from serve_app.api.formats.named_json import ARGUMENTS, CALL_ID, NamedJson
from serve_app.api.formats.pythonic import PythonCall, PythonCalls


class Form(Protocol):
    """One form of calls."""

    @property
    def opening(self) -> str:
        """What it begins with, wherever it stands; empty if that is a tool's name."""
        ...

    def read(self, buffer: Buffer, at: int, tools: Tools, *, sure: bool) -> Read[bool]:
        """Read the calls at a place: emit them, and take the text up to their end.

        Args:
            buffer: the text; white space before the place belongs to the calls.
            at: where they begin.
            tools: only these can be called.
            sure: calls are expected here: at the start, after another one, within a tag.

        Returns:
            False if there are none; then nothing was emitted or taken.
        """
        ...


@dataclass(frozen=True, slots=True)
class Tag:
    """What may stand around calls.

    Args:
        opening: wherever it stands, calls may follow.
        closing: may stand behind them; empty if nothing does.
        after: what may stand between the opening and the calls, beside white space.
        sure: calls are expected in it, whatever stands before it.
    """

    opening: str
    closing: str = ""
    after: str = ""
    sure: bool = True


FORMS: tuple[Form, ...] = (
    JsonCall(),
    JsonCalls(),
    PythonCalls(),
    FunctionTag(),
    NamedJson(),
    PythonCall(),
)
TAGS = (
    Tag("<tool_call>", "</tool_call>"),  # Hermes, Qwen
    Tag("<|python_tag|>"),  # Llama 3
    Tag("<|python_start|>", "<|python_end|>"),  # Llama 4
    Tag("[TOOL_CALLS]"),  # Mistral
    Tag("```", "```", after="abcdefghijklmnopqrstuvwxyz_", sure=False),  # a fence, ```json
)
THOUGHTS_END = "</think>"
# Special tokens in some tokenizers; they must have a text while calls are looked for.
MARKS = (
    *(mark for tag in TAGS for mark in (tag.opening, tag.closing) if mark.strip("`")),
    *(ARGUMENTS, CALL_ID, "<function=", "<think>", THOUGHTS_END),
)
# Where content may go over into calls.
OPENINGS = tuple(dict.fromkeys(
    [tag.opening for tag in TAGS] + [form.opening for form in FORMS if form.opening]
    + [THOUGHTS_END]
))  # fmt: skip
ANY_OPENING = re.compile("|".join(map(re.escape, OPENINGS)))
