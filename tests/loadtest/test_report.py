"""The document and the table."""

import json

import pytest

from serve_app.errors import ConfigError
from serve_app.loadtest.report import SCHEMA, document, load, milliseconds, table, verdict, write
from serve_app.loadtest.summary import Slo, summarise
from tests.loadtest.scripted import ran, sample

SEARCH = {"holds": 2.0, "breaks": 2.2, "attainment": 0.95}


def whole(**more):
    samples = [sample(i / 10, ttft_s=0.1 + i / 1000) for i in range(50)]
    samples.append(sample(6.0, error="http_429"))
    stage = summarise(ran(samples), Slo(ttft_s=0.14)) | {"left_out": 0, "start_s": 0.5}
    about = {"target": "http://x", "model": "m", "created": "now", "version": "1"}
    about |= {"interrupted": False, "slo": {"ttft_s": 0.14}, "load": {}, "seed": 0}
    return document(about, [stage], **{"timeline": None, "search": None, **more})


def test_load_gives_what_write_wrote(tmp_path):
    """Written and read, it is the same."""
    write(whole(), tmp_path / "deep" / "r.json")
    assert load(tmp_path / "deep" / "r.json") == json.loads(json.dumps(whole()))


def test_stage_schema_is_stable():
    """Scripts and dashboards read these names; a change needs a new schema number."""
    assert SCHEMA == "serve-app/loadtest/1"
    report = whole()
    assert set(report) == {
        *("schema", "target", "model", "created", "version", "interrupted", "slo", "load"),
        *("seed", "timeline", "search", "stages"),
    }
    stage = report["stages"][0]
    assert set(stage) == {
        *("name", "loop", "rate", "concurrency", "duration_s", "warmup_s", "start_s"),
        *("requests", "completed", "left_out", "errors", "latency", "goodput", "client"),
        *("req_s", "output_tok_s", "prompt_tok_s", "in_flight", "samples", "seconds"),
    }
    assert set(stage["latency"]) == {"ttft_s", "itl_s", "tpot_s", "e2e_s"}
    for spread in stage["latency"].values():
        assert set(spread) == {"count", "mean", "p50", "p90", "p95", "p99", "max", "cdf"}
    assert set(stage["samples"]) == {
        *("at_s", "ttft_s", "itl_s", "tpot_s", "e2e_s"),
        *("prompt_tokens", "output_tokens", "error"),
    }
    assert set(stage["client"]) == {
        *("processes", "cpu_share_max", "loop_lag_p99_s", "send_lag_p99_s"),
        *("bottleneck", "reasons"),
    }
    assert {len(column) for column in stage["samples"].values()} == {51}


def test_table_shows_every_quantity():
    """Percentiles, rates, goodput, errors by kind, and the client."""
    text = table(whole(search=SEARCH))
    for part in ("p50", "p90", "p95", "p99", "ttft", "itl", "tpot", "e2e", "req/s"):
        assert part in text
    assert "51 counted, 50 ok, 1 http_429" in text
    assert "within the SLO" in text
    assert "10% CPU" in text
    assert "WARNING" not in text
    assert "Up to 2 req/s 95%" in text


def test_table_says_that_a_stage_is_spoiled():
    """The bottleneck stands in the table."""
    stage = summarise(ran([sample(1.0)], strain=(0.99, 0.0)), None) | {"left_out": 0}
    assert "the client was the bottleneck" in table(whole() | {"stages": [stage]})


def test_table_reports_what_was_left_out():
    """Requests that do not fit the window are no silent gap."""
    report = whole()
    report["stages"][0]["left_out"] = 7
    assert "7 longer than the model's window were left out" in table(report)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.01234, "12.3 ms"), (0.9, "900 ms"), (12.345, "12.3 s")]
)
def test_milliseconds_have_three_digits(seconds, text):
    """In the unit that people read."""
    assert milliseconds(seconds) == text


def test_verdict_of_a_search_is_one_sentence():
    """Found, nothing held, nothing broke."""
    assert "at 2.2 req/s fewer do" in verdict(SEARCH)
    assert "no rate" in verdict(SEARCH | {"holds": None}).lower()
    assert "broke" in verdict(SEARCH | {"breaks": None})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": "serve-app/loadtest/0"}'])
def test_load_refuses_another_file(tmp_path, content):
    """No traceback for a file that is no report."""
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError):
        load(tmp_path / "x.json")
