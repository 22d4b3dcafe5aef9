"""What a structure may be before anything is compiled: bounds that real ones never meet.

They refuse what is known to be out of reach, with a sentence that names the bound. What passes
can still be expensive; the limits of `worker.py` (time, memory) decide about that.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

MAX_BYTES = 512 * 1024
MAX_DEPTH = 100  # of a JSON schema; llguidance's own parser ends at 128
MAX_RULES = 2_000  # of a grammar; a chain of 5,000 overflows the stack of llguidance 1.9
MAX_CHOICES = 20_000
MAX_REPEAT = 100_000  # of an expression's or a grammar's {m,n}
# An automaton that decides divisibility by n has n states, but for the factors of ten in n.
MAX_MULTIPLE = 100_000

_RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_][\w.\-]*[ \t]*(?:\[[^\]]*\][ \t]*)?:", re.MULTILINE)
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}|~[ \t]*(\d+)(?:[ \t]*\.\.[ \t]*(\d+))?")


def check_text(kind: str, definition: str) -> None:
    """Check the text of a structure.

    Args:
        kind: of `protocol.Structure`.
        definition: the schema, expression, choices or grammar.

    Raises:
        ValueError: names the bound that is passed.
    """
    size = len(definition.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, {MAX_BYTES:,} is the limit")
    if kind == "grammar":
        rules = sum(1 for _ in _RULE.finditer(definition))
        if rules > MAX_RULES:
            raise ValueError(f"it has {rules:,} rules, {MAX_RULES:,} is the limit")
    if kind in ("grammar", "regex"):
        _check_repeats(definition)


def _check_repeats(text: str) -> None:
    for found in _REPEAT.finditer(text):
        for bound in found.groups():
            # Compared by length first: int() refuses thousands of digits.
            if bound and (len(bound) > 9 or int(bound) > MAX_REPEAT):
                raise ValueError(f"a repetition is above the limit of {MAX_REPEAT:,}")


def is_too_large_a_multiple(value: Any) -> bool:
    """Return whether `multipleOf` at this value takes an automaton beyond `MAX_MULTIPLE` states."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return False  # malformed: the compiler says so
    if value == float("inf"):
        return True
    rest = Fraction(repr(value) if isinstance(value, float) else value).numerator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    return rest > MAX_MULTIPLE
