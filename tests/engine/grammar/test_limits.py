"""Bounds before anything is compiled."""

import pytest

from serve_app.engine.grammar.limits import (
    MAX_BYTES,
    MAX_REPEAT,
    MAX_RULES,
    check_text,
    is_too_large_a_multiple,
)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", " " * (MAX_BYTES + 1), "bytes"),
        ("regex", "é" * (MAX_BYTES // 2 + 1), "bytes"),
        ("grammar", "\n".join(f'r{n}: "a"' for n in range(MAX_RULES + 1)), "rules"),
        ("grammar", "\n".join(f'?r{n}[lazy]: "a"' for n in range(MAX_RULES + 1)), "rules"),
        ("grammar", "\n".join(f'R{n} : "a"' for n in range(MAX_RULES + 1)), "rules"),
        ("regex", f"a{{{MAX_REPEAT + 1}}}", "repetition"),
        ("regex", f"a{{1,{MAX_REPEAT + 1}}}", "repetition"),
        ("regex", "a{1," + "9" * 5000 + "}", "repetition"),
        ("grammar", f'start: "a"{{2,{MAX_REPEAT + 1}}}', "repetition"),
        ("grammar", f'start: "a"~2..{MAX_REPEAT + 1}', "repetition"),
    ],
)
def test_check_text_names_the_limit(kind, text, words):
    """Each bound is one sentence with its number."""
    with pytest.raises(ValueError, match=f"{words}.*limit"):
        check_text(kind, text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", " " * MAX_BYTES),
        ("grammar", "\n".join(f'r{n}: "a"' for n in range(MAX_RULES))),
        ("regex", f"a{{{MAX_REPEAT}}}"),
        ("regex", "[a-z]{2,}x{,3}"),
        ("json_schema", '{"maxLength": 2000000}'),
    ],
)
def test_check_text_at_the_limit(kind, text):
    """What stands at a bound passes."""
    check_text(kind, text)


@pytest.mark.parametrize("value", [99_999_989, 2e5 + 1, float("inf"), 100_003, 1.00003])
def test_is_too_large_a_multiple(value):
    """Primes, and what is no round number, take as many states as they are large."""
    assert is_too_large_a_multiple(value)


@pytest.mark.parametrize("value", [1, 60, 3600, 86_400, 10**6, 1e308, 0.01, 0.05, 2.5, 99_991])
def test_is_too_large_a_multiple_passes_a_usual_one(value):
    """Seconds, cents and powers of ten are small automata."""
    assert not is_too_large_a_multiple(value)


@pytest.mark.parametrize("value", [True, "3", None, 0, -7, float("nan")])
def test_is_too_large_a_multiple_leaves_a_malformed_one_to_the_compiler(value):
    """It says what is wrong with it."""
    assert not is_too_large_a_multiple(value)
