"""A completion's deltas: running totals, held text, one end."""

from serve_app.engine.sequence import Update
from serve_app.engine.text.completion import Completion
from serve_app.engine.text.reasoning import Thinking
from serve_app.protocol import FinishReason
from tests.models import END, make_tokenizer

BACKEND = make_tokenizer().backend_tokenizer
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def decode(ids):
    return BACKEND.decode(ids, skip_special_tokens=True)


def completion(*stop, decode=decode, **options):
    return Completion(
        decode, stop=stop, prompt_tokens=9, context=(), piece=lambda _: ("", b""), **options
    )


def updates(text, end=None):
    made = [Update(1, token) for token in BACKEND.encode(text).ids]
    return [*made[:-1], Update(1, made[-1].token, end)] if end else made


def test_completion_makes_one_delta_of_updates_ready_together():
    """Text, ids and totals of all of them."""
    some = completion()
    delta = some.take(updates("Hello, fox"))
    assert delta.text == "Hello, fox"
    assert delta.usage.completion_tokens == len(delta.token_ids)
    assert delta.usage.prompt_tokens == 9
    assert delta.finish_reason is None
    assert not some.finished


def test_completion_sends_held_ids_with_their_text():
    """Half a character or half a stop string is no delta; its ids are not lost."""
    some = completion("END")
    first, *rest = updates("𐎠 E")
    assert some.take([first]) is None
    delta = some.take(rest)
    assert delta.text == "𐎠 "
    assert len(delta.token_ids) == 1 + len(rest)
    last = some.take(updates("x", LENGTH))
    assert last.text == "Ex"
    assert last.usage.completion_tokens == len(delta.token_ids) + 1


def test_completion_shows_no_text_of_the_ending_id():
    """An end of sequence with a text of its own is counted and not shown."""
    word = updates(" dog")[-1].token
    some = completion()
    delta = some.take([*updates("fox"), Update(1, word, STOP)])
    assert delta.text == "fox"
    assert delta.token_ids[-1] == word
    assert delta.finish_reason is STOP
    assert some.finished


def test_completion_cuts_at_a_stop_string_before_the_limit():
    """The last allowed token may complete a stop string; ids after it do not exist."""
    some = completion("fox")
    delta = some.take(updates("a fox", LENGTH))
    assert (delta.text, delta.finish_reason) == ("a ", STOP)
    other = completion("fox")
    everything = updates("a fox runs and runs")
    delta = other.take(everything)
    assert (delta.text, delta.finish_reason) == ("a ", STOP)
    assert len(delta.token_ids) < len(everything)


def test_completion_shows_held_text_at_the_end():
    """What began like a stop string and was none belongs to the text; half a character does not."""
    some = completion("fox hunt")
    assert some.take(updates("a fox hu", LENGTH)).text == "a fox hu"
    half = updates("x𐎠")[:-1]
    assert completion().take([*half[:-1], Update(1, half[-1].token, LENGTH)]).text == "x"


def test_completion_can_end_with_what_stopped_it():
    """The stop string, or the text of the token that ended it if it has one."""
    assert completion("fox", include_stop=True).take(updates("a fox runs")).text == "a fox"
    word = updates(" dog")[-1].token
    ended = [*updates("fox"), Update(1, word, STOP)]
    assert completion(include_stop=True).take(ended).text == "fox dog"
    end = [*updates("fox"), Update(1, 0, STOP)]
    assert completion(include_stop=True).take(end).text == "fox"  # a special token has no text


def test_completion_can_show_a_stop_string_that_is_a_token_without_a_text():
    """Once, whether its token has a text or not."""
    end = [*updates("fox"), Update(1, 0, STOP)]
    options = {"include_stop": True, "stop_strings": {0: END}}
    assert completion(END, **options).take(end).text == f"fox{END}"

    def whole(ids):
        return BACKEND.decode(ids, skip_special_tokens=False)

    assert completion(END, decode=whole, **options).take(end).text == f"fox{END}"
    assert completion(END, decode=whole, stop_strings={0: END}).take(end).text == "fox"


def test_completion_sends_thoughts_beside_the_text():
    """In deltas of their own or together with it; a stop string ends the answer, no thought."""
    some = completion("fox", thinking=Thinking.OPEN)
    first = some.take(updates("a fox is"))
    assert (first.reasoning, first.text, first.finish_reason) == ("a fox is", "", None)
    assert len(first.token_ids) == first.usage.completion_tokens
    second = some.take(updates(" so</think>\n\nThe fox"))
    assert (second.reasoning, second.text, second.finish_reason) == (" so", "The ", STOP)


def test_completion_sends_thoughts_that_never_end_as_thoughts():
    """The limit came first."""
    delta = completion(thinking=Thinking.OPEN).take(updates("a fox </th", LENGTH))
    assert (delta.reasoning, delta.text, delta.finish_reason) == ("a fox </th", "", LENGTH)


def test_completion_sends_the_prompts_ids_once():
    """With the first delta, if they were asked for."""
    some = completion(shown_prompt=[7, 8])
    assert some.take(updates("fox")).prompt_token_ids == (7, 8)
    assert some.take(updates("fox")).prompt_token_ids == ()
    assert completion().take(updates("fox")).prompt_token_ids == ()
