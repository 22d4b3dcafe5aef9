"""Traces: three formats, distinguished by their content."""

import json
from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.loadtest.traces import read_lengths, read_trace

SYNTHETIC = Path(__file__).parents[2] / "scripts" / "traces" / "synthetic.jsonl"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.6805900,12,0
"""
MOONCAKE = [
    {"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]},
    {"timestamp": 3500, "input_length": 900, "output_length": 50, "hash_ids": [1, 3]},
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": "q" * 400}, {"from": "gpt", "value": "a" * 40}]},
    {"conversations": [{"from": "human", "value": "no answer"}]},
]


def file(tmp_path, content):
    path = tmp_path / "trace"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_read_trace_of_azure_in_order(tmp_path):
    """Times count from the first request; a completion of nothing asks for one token."""
    shots = read_trace(file(tmp_path, AZURE))
    assert [(s.prompt_tokens, s.output_tokens) for s in shots] == [(374, 44), (12, 1), (396, 109)]
    assert [s.at_s for s in shots] == pytest.approx([0, 2, 4.314579], abs=1e-5)


def test_read_trace_of_mooncake_with_its_blocks(tmp_path):
    """Milliseconds become seconds, and prompts know what they share."""
    first, second = read_trace(file(tmp_path, lines(MOONCAKE)))
    assert (first.at_s, first.prompt_tokens, first.output_tokens) == (0, 700, 5)
    assert (second.at_s, second.blocks) == (2.5, (1, 3))


def test_read_trace_faster_squeezes_time(tmp_path):
    """Twice as fast is half the time."""
    assert read_trace(file(tmp_path, lines(MOONCAKE)), speed=2)[1].at_s == 1.25


def test_read_lengths_of_sharegpt(tmp_path):
    """Tokens are estimated from the characters of a question and its answer."""
    assert read_lengths(file(tmp_path, SHAREGPT)) == ((100, 10),)


def test_read_lengths_of_a_trace(tmp_path):
    """Lengths of a trace can be offered at another rate."""
    assert read_lengths(file(tmp_path, lines(MOONCAKE))) == ((700, 5), (900, 50))


def test_read_trace_refuses_sharegpt_which_has_no_times(tmp_path):
    """It holds no times, and the message says what to do instead."""
    with pytest.raises(ConfigError, match="--lengths"):
        read_trace(file(tmp_path, SHAREGPT))


@pytest.mark.parametrize(
    "content", ["", "a,b\n1,2\n", '{"x": 1}\n', "{broken\n", '{"timestamp": "z"}', "\n\n"]
)
def test_read_trace_refuses_another_file(tmp_path, content):
    """No traceback for a wrong file."""
    with pytest.raises(ConfigError):
        read_trace(file(tmp_path, content))


@pytest.mark.parametrize("content", ["[1]", "[]", '[{"conversations": 3}]', "[broken"])
def test_read_lengths_refuses_another_list(tmp_path, content):
    """Neither for a wrong JSON."""
    with pytest.raises(ConfigError):
        read_lengths(file(tmp_path, content))


def test_read_trace_refuses_a_missing_file(tmp_path):
    """The path is named."""
    with pytest.raises(ConfigError, match="nowhere"):
        read_trace(tmp_path / "nowhere")


def test_trace_of_the_repository_has_a_burst_and_shared_prefixes():
    """A minute whose third ten seconds are busiest; some prompts go on where others ended."""
    shots = read_trace(SYNTHETIC)
    by_ten = [sum(int(s.at_s // 10) == i for s in shots) for i in range(6)]
    assert sum(by_ten) == len(shots)
    assert by_ten[2] == max(by_ten)
    firsts = [s.blocks[0] for s in shots]
    assert len(set(firsts)) < len(firsts)
