"""Dashboard and alerts ask for metrics that the package exports."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from scripts.reference import tables
from tests.prometheus import prometheus, rule_groups

ROOT = Path(__file__).parent.parent.parent
DASHBOARD = json.loads((ROOT / "configs/grafana/serve-app.json").read_text())
RULES = yaml.safe_load((ROOT / "configs/prometheus/rules.yaml").read_text())
RULE_TESTS = yaml.safe_load((ROOT / "tests/repo/data/rules_test.yaml").read_text())
# Serve's own, as of Ray 2.60.
SERVE = {"ray_serve_deployment_replica_healthy": {"application", "deployment"}}

BY_OTHERS = {"le", "application"}  # Prometheus' own, and what Serve adds to each of ours


def asked(expression: str) -> set[str]:
    """Return the metrics of an expression, histograms without their suffix."""
    names = re.findall(r"\bray_[a-z0-9_]+", expression)
    return {re.sub(r"_bucket$", "", name) for name in names}


def exported() -> dict[str, set[str]]:
    """Return the labels of each metric, as the code declares them."""
    rows = [line.split(" | ") for line in tables()["metrics"].splitlines()[2:]]
    return {row[0].strip("| `"): set(row[2].split(", ")) for row in rows} | SERVE


def labels(expression: str) -> set[str]:
    """Return the labels that an expression selects or groups by."""
    grouped = re.findall(r"by \(([\w, ]+)\)", expression)
    selected = re.findall(r'(\w+)(?:=|!=|=~|!~)"', expression)
    return {name for group in grouped for name in group.split(", ")} | set(selected)


def alerts() -> dict[str, str]:
    return {rule["alert"]: rule["expr"] for group in RULES["groups"] for rule in group["rules"]}


def test_panels_ask_for_what_is_exported():
    """A renamed metric would leave an empty panel."""
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len(panels) > 10
    for panel in panels:
        for target in panel["targets"]:
            names = asked(target["expr"])
            assert names, panel["title"]
            assert names <= set(exported()), panel["title"]


def test_panels_lie_on_the_grid_beside_each_other():
    """No two overlap, ids are unique, and all take the chosen data source."""
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        own = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not own & places
        assert grid["x"] + grid["w"] <= 24
        places |= own
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_alerts_ask_for_what_is_exported():
    """An alert over a metric that is not there never fires."""
    for name, expression in alerts().items():
        assert asked(expression), name
        assert asked(expression) <= set(exported()), name


def test_labels_are_those_that_the_metric_carries():
    """A sum by a label that is not there is one series without a name."""
    shown = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    checked = 0
    for expression in [*(target["expr"] for target in shown), *alerts().values()]:
        for name in asked(expression):
            assert labels(expression) - BY_OTHERS <= exported()[name], expression
            checked += len(labels(expression) - BY_OTHERS)
    assert checked > 10


def test_alerts_have_a_test_in_which_they_fire():
    """Each is expected to fire at some time with the words that a person will read."""
    fired = {
        case["alertname"]
        for test in RULE_TESTS["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == set(alerts())


@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", "configs/prometheus/rules.yaml"),
        ("test", "rules", "tests/repo/data/rules_test.yaml"),
    ],
    ids=" ".join,
)
def alerts_pass_promtool(words):
    """The rules parse, and each alert fires and stays silent as its test says."""
    done = subprocess.run(
        ["promtool", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(120)
def alerts_are_taken_by_prometheus(tmp_path):
    """Every group is loaded whole, and no rule fails when it is evaluated."""
    with prometheus("http://127.0.0.1:9", tmp_path) as address:
        deadline = time.monotonic() + 30
        groups = rule_groups(address)
        while time.monotonic() < deadline and any(
            rule["health"] == "unknown" for group in groups for rule in group["rules"]
        ):
            time.sleep(0.2)
            groups = rule_groups(address)
    loaded = {group["name"]: [rule["name"] for rule in group["rules"]] for group in groups}
    assert loaded == {
        group["name"]: [rule["alert"] for rule in group["rules"]] for group in RULES["groups"]
    }
    faults = {
        rule["name"]: rule.get("lastError", rule["health"])
        for group in groups
        for rule in group["rules"]
        if rule["health"] != "ok"
    }
    assert faults == {}


if shutil.which("promtool"):  # more tests where there is a Prometheus; not counted elsewhere
    test_alerts_pass_promtool = alerts_pass_promtool
if shutil.which("prometheus"):
    test_alerts_are_taken_by_prometheus = alerts_are_taken_by_prometheus
