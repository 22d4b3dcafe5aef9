"""The server's own view, from a Prometheus page."""

import time

from serve_app.loadtest.scrape import Scraper, read
from tests.loadtest.scripted import Scripted, serving

PAGE = """# HELP ray_serve_app_num_requests_running Requests in the batch.
ray_serve_app_num_requests_running{replica="a"} 3
ray_serve_app_num_requests_running{replica="b"} 4.0
ray_serve_app_num_requests_waiting{replica="a"} 1
ray_serve_app_kv_cache_usage_perc{replica="a"} 0.25
ray_serve_app_kv_cache_usage_perc{replica="b"} 0.75
ray_serve_app_generation_tokens_total 120
ray_serve_deployment_replica_healthy{deployment="LLMServer",replica="a"} 1
ray_serve_deployment_replica_healthy{deployment="LLMServer",replica="b"} 1
ray_serve_deployment_replica_healthy{deployment="Ingress",replica="c"} 1
python_gc_objects_collected_total{generation="0"} 1e5
"""


def test_read_sums_a_page_over_replicas():
    """Counts add up, a share is their mean, and the ingress is no replica of the model."""
    assert read(PAGE) == {
        "running": 7,
        "waiting": 1,
        "kv_cache_usage": 0.5,
        "generation_tokens": 120,
        "replicas": 2,
    }


def test_read_knows_vllms_names():
    """The suffixes are the same."""
    assert read('vllm:num_requests_running{model_name="m"} 2\n') == {"running": 2}


def test_scraper_asks_a_page_every_second():
    """Points have times after the start."""
    start = time.monotonic()
    with serving(Scripted(metrics=PAGE)) as url, Scraper(url + "/metrics", {}) as scraper:
        time.sleep(2.5)
    timeline = scraper.timeline(start)
    assert timeline["running"] == [7, 7]
    assert all(0.5 < at < 3 for at in timeline["at_s"])


def test_scraper_without_a_page_has_no_timeline():
    """Neither an error nor a wait."""
    with serving(Scripted()) as url, Scraper(url + "/metrics", {}) as scraper:
        time.sleep(1.3)
    assert scraper.timeline(0.0) is None
