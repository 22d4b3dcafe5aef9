"""What the requests of one conversation have in common."""

import pytest

from serve_app.deployments.conversation import CHARACTERS, MESSAGES, opening
from serve_app.protocol import ChatPrompt, TextPrompt, TokenPrompt

SYSTEM, HELLO = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}
MORE = ({"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And?"})


@pytest.mark.parametrize("question", [CHARACTERS, 3])
def test_opening_does_not_change_while_a_conversation_grows(question):
    """Whatever is said behind its first question, or behind a long beginning."""
    for first, later in (
        (ChatPrompt((SYSTEM, HELLO)), ChatPrompt((SYSTEM, HELLO, *MORE))),
        (ChatPrompt((HELLO,)), ChatPrompt((HELLO, *MORE))),
        (TextPrompt("word " * 100), TextPrompt("word " * 101)),
        (TokenPrompt(tuple(range(300))), TokenPrompt(tuple(range(400)))),
    ):
        assert repr(opening(first, question)) == repr(opening(later, question))


def test_opening_of_a_long_question_is_its_beginning_where_asked():
    """Two questions about one text differ behind it; the messages before it count in full."""
    one, two = (ChatPrompt((SYSTEM, {"role": "user", "content": f"Text. {q}"})) for q in "ab")
    assert opening(one) != opening(two)
    assert opening(one, 5) == opening(two, 5)
    assert opening(one, 5) != opening(ChatPrompt(one.messages[1:]), 5)


def test_opening_of_a_huge_prompt_is_small():
    """Megabytes in one message, or in many, cost an event loop no more than a long prompt."""
    megabytes = {"role": "system", "content": "\x01" * (2 << 20)}
    for messages in ((megabytes, HELLO), ({**megabytes, "role": "user"},), (SYSTEM,) * 10**5):
        assert len(repr(opening(ChatPrompt(messages)))) < 4 * CHARACTERS + 64 * MESSAGES
    assert opening(ChatPrompt((megabytes, HELLO))) != opening(ChatPrompt((SYSTEM, HELLO)))


@pytest.mark.parametrize("question", [CHARACTERS, 3])
def test_opening_of_any_prompt(question):
    """No message, none of the user, and one without a text have one, too."""
    for messages in ((), (SYSTEM,), ({"role": "user", "content": None},)):
        assert isinstance(repr(opening(ChatPrompt(messages), question)), str)
