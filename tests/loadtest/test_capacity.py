"""Recommendations, and the patch that carries them."""

import hashlib
from pathlib import Path

import pytest
import yaml

from serve_app.cli.main import main
from serve_app.errors import ConfigError
from serve_app.loadtest.capacity import (
    HEADROOM,
    PRECISION,
    Demand,
    Found,
    Measured,
    merge,
    patch,
    recommend,
    search,
    served,
)
from serve_app.loadtest.summary import Slo

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
MEASURED = Measured(
    limit=10.0,
    proposed={"in_flight": 24.0, "latency": {"ttft_s": {"p50": 0.2}}},
    overload={"req_s": 12.0},
)


def test_recommend_numbers_that_follow_from_the_measurement():
    """Two replicas held 10/s, so one is planned for 4.25/s; a queue drains 6/s for 0.8 s."""
    parts = recommend(MEASURED, Demand(peak=30, low=5, replicas=2), Slo(ttft_s=1.0))
    assert parts == {
        "replica": {"target_ongoing_requests": 12.0, "min_replicas": 2, "max_replicas": 8},
        "api": {"max_queued_requests": 4},
    }


def test_recommend_less_than_a_third_below_what_the_search_saw_break():
    """However the bracket lies, so that a person who tries it sees the limit."""
    assert HEADROOM * 1.3 > PRECISION


def test_recommend_a_replica_and_a_place_for_a_small_peak():
    """Nothing is ever zero."""
    parts = recommend(MEASURED, Demand(peak=0.1, low=1e-9, replicas=2), Slo(ttft_s=0.1))
    assert parts["replica"]["min_replicas"] == parts["replica"]["max_replicas"] == 1
    assert parts["api"]["max_queued_requests"] == 1


def test_recommend_leaves_the_queue_alone_without_a_limit_of_ttft():
    """Nothing was measured that could decide it."""
    assert set(recommend(MEASURED, Demand(10, 1, 2), Slo(e2e_s=5))) == {"replica"}


def test_patch_merged_is_valid(tmp_path, capsys):
    """The command `validate` accepts the config with the patch in it; its evidence is named."""
    evidence = tmp_path / "capacity.json"
    evidence.write_text("{}")
    parts = recommend(MEASURED, Demand(30, 5, 2), Slo(ttft_s=1.0))
    text = patch("llm", parts, evidence, "two\nlines")
    assert hashlib.sha256(b"{}").hexdigest() in text
    assert text.startswith("# two\n# lines\n")
    merged = merge(yaml.safe_load(QUICKSTART.read_text()), yaml.safe_load(text))
    config = tmp_path / "merged.yaml"
    config.write_text(yaml.safe_dump(merged))
    assert main(["validate", str(config)]) == 0
    args = merged["applications"][0]["args"]
    assert args["replica"] == {
        **{"num_gpus": 0, "num_cpus": 2, "target_ongoing_requests": 12.0},
        **{"min_replicas": 2, "max_replicas": 8},
    }
    assert args["engine"]["max_running_requests"] == 32


def test_merge_leaves_the_config_alone():
    """The merged tree is a new one."""
    config = {"applications": [{"name": "llm", "args": {"api": {"max_queued_requests": 9}}}]}
    change = {"applications": [{"name": "llm", "args": {"api": {"max_queued_requests": 1}}}]}
    assert merge(config, change)["applications"][0]["args"]["api"]["max_queued_requests"] == 1
    assert config["applications"][0]["args"]["api"]["max_queued_requests"] == 9


def test_patch_for_another_application_is_refused():
    """It names the one that is missing."""
    with pytest.raises(ConfigError, match="named other"):
        merge({"applications": [{"name": "llm"}]}, {"applications": [{"name": "other"}]})


def test_served_of_a_config_is_where_its_service_runs():
    """Address, application and replicas."""
    service = served(str(QUICKSTART))
    assert (service.url, service.name, service.replicas) == ("http://127.0.0.1:8000", "llm", 1)


def test_served_of_a_url_is_itself():
    """One replica, no config."""
    assert served("http://127.0.0.1:9").document is None


def test_served_of_a_scaling_config_is_refused(tmp_path):
    """What one replica holds is not seen while their number changes."""
    config = yaml.safe_load(QUICKSTART.read_text())
    config["applications"][0]["args"]["replica"]["max_replicas"] = 3
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="min_replicas = max_replicas"):
        served(str(path))


def searched(limit, first=1.0):
    tried = []

    def holds_at(rate):
        tried.append(rate)
        return rate <= limit

    return search(holds_at, first=first), tried


@pytest.mark.parametrize("limit", [0.07, 0.9, 1.0, 7.3, 300.0])
def test_search_finds_the_limit_in_a_narrow_bracket(limit):
    """Between the last rate that held and the first that did not, ten percent apart."""
    found, tried = searched(limit)
    assert found.holds <= limit < found.breaks
    assert found.breaks / found.holds <= 1.1
    assert len(tried) <= 16


def test_search_reports_a_service_that_holds_nothing():
    """No rate held."""
    found, _ = searched(0.0)
    assert found.holds is None


def test_search_reports_a_service_that_holds_everything():
    """No rate broke it."""
    found, tried = searched(1e9)
    assert found == Found(tried[-1], None)


def test_search_ends_at_a_stop():
    """With what is known."""
    answers = iter([True, True, False, None])
    assert search(lambda _rate: next(answers), first=1.0) == Found(2.0, 4.0)
