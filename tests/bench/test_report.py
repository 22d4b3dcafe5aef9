"""From runs to medians, ratios and the machine's bound."""

import pytest

from scripts.bench.report import Record, markdown, summarise
from scripts.bench.workload import Request

REQUESTS = [Request((1,) * 10, 4), Request((2,) * 20, 2)]
RATES = {
    "body_parameters": 900.0,
    "head_parameters": 100.0,
    "weights_bytes": 2000.0,
    "kv_bytes_per_token": 10.0,
    "read_bytes_per_s": 8000.0,
    "copy_bytes_per_s": 4000.0,
    "flop_per_s": 1e5,
}
SETUP = {
    "dtype": "float32", "device": "cpu", "threads": 2, "rounds": 3, "streams": [2], "model": "m",
}  # fmt: skip


def turn(name, number, seconds, *, ids=(5, 6, 7, 8), peak=10_000):
    """One run: both requests at once, the first token after a quarter of the time."""
    times = [seconds / 4 * (i + 1) for i in range(4)]
    streams = [{"ids": list(ids), "times": times}, {"ids": [1, 2], "times": times[:2]}]
    return Record(
        name, number, 2, REQUESTS, {"results": [streams], "peak_bytes": peak, "waited": 0.1}
    )


def machine(number):
    return Record("roofline", number, 2, REQUESTS, {"results": [RATES], "peak_bytes": 0})


@pytest.fixture
def result():
    records = [machine(number) for number in range(3)]
    for number, (ours, theirs) in enumerate([(1.0, 2.0), (2.0, 6.0), (3.0, 30.0)]):
        records.append(turn("serve-app", number, ours, ids=(5, 6, 7, 9)))
        records.append(turn("generate", number, theirs, peak=9_000 + number))
    return summarise(
        records,
        setup=SETUP,
        load_s={"serve-app": 1.0, "generate": 2.0},
        settings={"serve-app": "2 threads", "generate": "as it comes"},
    )


def test_summarise_ratio_is_the_median_of_each_rounds_own(result):
    """2, 3 and 10 times as fast give 3, whatever the medians' quotient is."""
    row = result["contenders"]["generate"]["streams"]["2"]
    assert row["ours_tok_s_ratio"] == pytest.approx(3.0)
    assert row["ours_ttft_p50_s_ratio"] == pytest.approx(1 / 3)
    assert row["tok_s"] == pytest.approx(1.0)
    assert row["rounds_tok_s"] == pytest.approx([3.0, 1.0, 0.2])
    assert row["itl_p50_s"] == row["itl_p95_s"] == pytest.approx(1.5)


def test_summarise_bound_is_what_reading_and_multiplying_allow(result):
    """Four steps read 2,000 bytes each at the faster rate; the products take less."""
    flop = 2 * (900 * (30 + 6) + 100 * 6)
    assert flop / 1e5 < 4 * 2000 / 8000
    row = result["contenders"]["serve-app"]["streams"]["2"]
    assert row["of_bound"] == pytest.approx(row["tok_s"] / (6 / 1.0))


def test_summarise_counts_memory_above_weights_and_the_requests_kv(result):
    """The largest peak of all rounds, less the weights and K and V of every token."""
    above = result["contenders"]["generate"]["peak_above_weights_and_kv_bytes"]
    assert above == 9_002 - 2000 - 36 * 10


def test_summarise_compares_tokens_with_generates(result):
    """One of two requests differs in each of three rounds; `generate` equals itself."""
    rows = {name: c["streams"]["2"] for name, c in result["contenders"].items()}
    assert rows["serve-app"]["equal_to_generate"] == "3/6"
    assert rows["generate"]["equal_to_generate"] == "6/6"


def test_markdown_names_settings_and_the_class_of_processor(result):
    """A number without them could not be repeated, or would be compared with another machine's."""
    table = markdown(result)
    assert "- serve-app: 2 threads" in table
    assert set(result["machine"]["features"]) <= {"amx_bf16", "avx512_bf16", "avx512f", "avx2"}
    assert f"({', '.join(result['machine']['features'])})" in table


def test_markdown_table_names_every_contender_with_its_ratio(result):
    """Markdown, one table for each number of streams."""
    table = markdown(result)
    assert "## Streams: 2" in table
    assert "| serve-app | 3.0 | 1.00 ×" in table
    assert "| generate | 1.0 | 3.00 ×" in table


def test_turn_refuses_a_contender_that_stops_early():
    """Fewer tokens in less time must not look fast."""
    cut = turn("serve-app", 0, 1.0, ids=(5, 6, 7))
    with pytest.raises(ValueError, match="serve-app made 3 of 4"):
        summarise(
            [machine(0), cut],
            setup=SETUP,
            load_s={"serve-app": 1.0},
            settings={"serve-app": "as it is"},
        )
