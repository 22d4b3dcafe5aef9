"""Prompts: as long as asked for, and equal only where a trace says so."""

from serve_app.loadtest.prompts import Prompts
from serve_app.loadtest.stage import Shot


def test_two_measurements_tell_template_and_words():
    """The line through both gives back the tokens of any number of words."""
    prompts = Prompts.fitted((8, 42), (72, 122))  # 32 for the template, 1.25 a word
    text = prompts.text(Shot(0, 232, 1), seed=0)
    assert len(text.split()) * 1.25 + 32 == 232


def test_a_server_that_counts_nothing_still_gets_words():
    """A flat line is no reason to divide by zero."""
    assert len(Prompts.fitted((8, 5), (72, 5)).text(Shot(0, 64, 1), seed=0).split()) == 64


def test_prompts_differ_by_serial_and_seed_alone():
    """No prefix cache is hit by chance."""
    prompts = Prompts()
    texts = [prompts.text(Shot(0, 50, 1, serial=n), seed=s) for n in range(20) for s in (0, 1)]
    assert len({text[:40] for text in texts}) == 40
    assert prompts.text(Shot(9, 50, 1, serial=3), seed=0) == texts[6]


def test_equal_blocks_are_equal_text():
    """Prompts that share a block share exactly its 512 tokens."""
    prompts = Prompts()
    one = prompts.text(Shot(0, 1000, 1, (1, 2), serial=1), seed=0).split()
    two = prompts.text(Shot(0, 1000, 1, (1, 3), serial=2), seed=0).split()
    assert one[:512] == two[:512]
    assert one[512:] != two[512:]
    assert len(one) == len(two) == 1000
