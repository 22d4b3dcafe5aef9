"""Thoughts and answer are separated, however the text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.text.reasoning import Thinking, ThoughtSplitter, thinking_after


def split(pieces, start=Thinking.POSSIBLE):
    splitter = ThoughtSplitter(start)
    seen = [*(splitter.push(piece) for piece in pieces), splitter.flush()]
    return "".join(thoughts for thoughts, _ in seen), "".join(words for _, words in seen)


CASES = [
    (Thinking.POSSIBLE, "<think>hm</think>yes", ("hm", "yes")),
    (Thinking.POSSIBLE, "\n<think>\n hm \n</think>\n\n yes \n", ("hm", "yes \n")),
    (Thinking.POSSIBLE, "<think>\n\n</think>\n\nyes", ("", "yes")),
    (Thinking.POSSIBLE, "yes", ("", "yes")),
    (Thinking.POSSIBLE, " \n yes </think>", ("", " \n yes </think>")),
    (Thinking.POSSIBLE, "<thin", ("", "<thin")),
    (Thinking.POSSIBLE, "<thing> yes", ("", "<thing> yes")),
    (Thinking.POSSIBLE, "a <think>hm</think>", ("", "a <think>hm</think>")),
    (Thinking.POSSIBLE, "", ("", "")),
    (Thinking.POSSIBLE, " ", ("", " ")),
    (Thinking.POSSIBLE, "<think>hm", ("hm", "")),
    (Thinking.OPEN, "hm\nhm</think>\n\nyes", ("hm\nhm", "yes")),
    (Thinking.OPEN, "hm</thin", ("hm</thin", "")),
    (Thinking.OPEN, "a < b </ c </think>yes</think>", ("a < b </ c", "yes</think>")),
    (Thinking.OPEN, "\n<think>hm</think>yes", ("<think>hm", "yes")),
    (Thinking.OVER, " yes <think>", ("", " yes <think>")),
]


@pytest.mark.parametrize(("start", "text", "parts"), CASES)
def test_thought_splitter_finds_thoughts_between_their_tags(start, text, parts):
    """White space around the tags belongs to neither; what never closes is all thoughts."""
    assert split([text], start) == parts
    assert split(text, start) == parts


near = st.sampled_from(["<think>", "</think>", "<", "</", "think>", "a", " ", "\n", ">", "/"])


@settings(max_examples=500, deadline=None)
@given(
    st.lists(near, max_size=12).map("".join),
    st.lists(st.integers(0, 60), max_size=8),
    st.sampled_from(Thinking),
)
def test_thought_splitter_splits_any_cut_of_any_text_alike(text, ends, start):
    """Pieces are an accident of time."""
    ends = sorted(min(end, len(text)) for end in ends)
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert split(pieces, start) == split([text], start) == split(text, start)


def test_thought_splitter_reports_thoughts_while_they_come():
    """What may be the closing tag is held, and white space before it."""
    splitter = ThoughtSplitter(Thinking.OPEN)
    seen = [splitter.push(piece) for piece in ["\nI", " see ", "<", "b", " </th", "ink>\n", "so"]]
    assert seen == [("I", ""), (" see", ""), ("", ""), (" <b", ""), ("", ""), ("", ""), ("", "so")]


@pytest.mark.parametrize(
    ("prompt", "continues", "state"),
    [
        ("<user>hi</><assistant>", False, Thinking.POSSIBLE),
        ("<assistant><think>\n", False, Thinking.OPEN),
        ("<assistant><think>\n\n</think>\n\n", False, Thinking.OVER),
        ("<user><think> in a question</><assistant>", False, Thinking.POSSIBLE),
        ("<assistant>I am", True, Thinking.OVER),
        ("<assistant><think>I am", True, Thinking.OPEN),
        ("<assistant><think>hm</think>I am", True, Thinking.OVER),
    ],
)
def test_thinking_after_a_prompt_says_what_a_completion_begins_with(prompt, continues, state):
    """DeepSeek's template opens the thoughts, Qwen's may close them, others leave it open."""
    assert thinking_after(prompt, continues=continues) is state
