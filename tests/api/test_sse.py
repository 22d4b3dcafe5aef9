"""Events survive any text and any client's idea of a line."""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from serve_app.api.sse import event


@example("a\u2028b\u2029c\x85d")
@example("a\r\nb\x0b\x0c\x1c\x1d\x1e")
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_is_one_line_and_comes_back(text):
    """However a client splits lines, an event is one, and its JSON is the text."""
    block = event({"text": text}).decode()
    assert block.endswith("\n\n")
    line = block.removesuffix("\n\n")
    assert len(line.splitlines()) == 1
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


def test_text_is_not_blown_up():
    """Letters of any script travel as UTF-8, not as escapes."""
    assert "日本 é".encode() in event({"text": "日本 é"})
