"""Events survive any text and any client's idea of a line."""

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.api.sse import dump, dump_large, event


@example("a\u2028b\u2029c\x85d")
@example("a\r\nb\x0b\x0c\x1c\x1d\x1e")
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_event_is_one_line_and_any_text_comes_back(text):
    """However a client splits lines, an event is one, and its JSON is the text."""
    block = event({"text": text}).decode()
    assert block.endswith("\n\n")
    line = block.removesuffix("\n\n")
    assert len(line.splitlines()) == 1
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


def test_event_does_not_blow_text_up():
    """Letters of any script travel as UTF-8, not as escapes."""
    assert "日本 é".encode() in event({"text": "日本 é"})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


@example({"choices": [{"logprobs": {"content": list(range(1000))}}] * 130})
@example({"a": [], "b": {}, "c": [[], {}], "d": [{}] * 65, "e": {"f": [[1]] * 200}})
@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), json_values))
def test_dump_large_gives_the_same_text(body):
    """Written in slices or at once."""
    assert dump_large(body) == dump(body)
