"""The commands from end to end, against a server of known latencies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from serve_app.cli.main import main
from serve_app.loadtest.capacity import HEADROOM
from tests.loadtest.scripted import Scripted, serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KEY = "sk-" + "canary" * 5
SCRIPT = (0.1, "a", 0.02, "b", 0.02, "c", 0.02, "d")


def run(url, *options):
    return main(["loadtest", url, "--output-tokens", "4", *options])


def test_loadtest_reports_the_numbers_of_the_server(tmp_path, capsys):
    """An open loop over two processes: times, counts, goodput, table, JSON and page."""
    app = Scripted(SCRIPT)
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    with serving(app) as url:
        code = run(
            url,
            *(
                "--rate",
                "20",
                "--duration",
                "3",
                "--processes",
                "2",
                "--slo",
                "ttft=200ms,itl=60ms",
            ),
            *("--prompt-tokens", "50", "--api-key-file", str(key)),
            *("--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")),
        )
    out, err = capsys.readouterr()
    assert code == 0, err
    stage = json.loads((tmp_path / "r.json").read_text())["stages"][0]
    assert (stage["completed"], stage["errors"]) == (stage["requests"], {})
    assert stage["latency"]["ttft_s"]["p50"] == pytest.approx(0.1, abs=0.03)
    assert stage["latency"]["itl_s"]["p50"] == pytest.approx(0.02, abs=0.01)
    assert stage["latency"]["e2e_s"]["p50"] == pytest.approx(0.16, abs=0.05)
    assert stage["req_s"] == pytest.approx(20, rel=0.4)
    assert stage["output_tok_s"] == pytest.approx(4 * stage["req_s"], rel=0.1)
    assert stage["goodput"]["share"] > 0.9
    assert stage["client"]["processes"] == 2
    # the warm-up was sent, and is not counted
    assert len(app.asked) > stage["requests"]
    assert {len(body["messages"][0]["content"].split()) for body in app.asked} == {40}
    assert "goodput" in out
    # the key was sent with each request, and stands nowhere
    assert {headers[b"authorization"] for headers in app.headers} == {f"Bearer {KEY}".encode()}
    files = [path for path in tmp_path.iterdir() if path != key]
    assert len(files) == 2
    assert all(KEY not in text for text in (out, err, *(path.read_text() for path in files)))


def test_loadtest_sweep_has_a_stage_for_each_rate(tmp_path):
    """And requests that fail are counted by their kind."""
    app = Scripted(lambda n: (429,) if n % 2 else (0.01, "a"))
    with serving(app) as url:
        code = run(url, "--sweep", "20,40", "--duration", "1.5", "--json", str(tmp_path / "r.json"))
    assert code == 0
    stages = json.loads((tmp_path / "r.json").read_text())["stages"]
    assert [stage["rate"] for stage in stages] == [20, 40]
    for stage in stages:
        assert set(stage["errors"]) == {"http_429"}
        assert stage["errors"]["http_429"] == pytest.approx(stage["requests"] / 2, rel=0.3)


def test_loadtest_fails_when_nothing_answered(tmp_path):
    """Exit 1, and the report is written."""
    with serving(Scripted((500,))) as url:
        code = run(url, "--concurrency", "2", "--duration", "1", "--json", str(tmp_path / "r.json"))
    assert code == 1
    assert json.loads((tmp_path / "r.json").read_text())["stages"][0]["loop"] == "closed"


def test_loadtest_replays_a_trace_and_leaves_long_requests_out(tmp_path, capsys):
    """The repository's trace twenty times as fast; what does not fit the window is reported."""
    trace = ROOT / "scripts" / "traces" / "synthetic.jsonl"
    app = Scripted((0.01, "a"), window=400)
    with serving(app) as url:
        code = main(
            [
                *("loadtest", url, "--trace", str(trace), "--speed", "20", "--warmup", "0.1"),
                *("--json", str(tmp_path / "r.json")),
            ]
        )
    assert code == 0
    stage = json.loads((tmp_path / "r.json").read_text())["stages"][0]
    assert len(app.asked) + stage["left_out"] == len(trace.read_text().splitlines())
    assert stage["left_out"] > 0
    assert "left out" in capsys.readouterr().out
    assert len({body["max_tokens"] for body in app.asked}) > 10


def test_capacity_writes_a_patch_with_its_evidence(tmp_path, capsys):
    """A server that holds about 100 a second is found to; the patch fits the quickstart."""
    patch = tmp_path / "capacity.yaml"
    with serving(Scripted((0.02, "a"), places=2)) as url:
        code = main(
            [
                *("capacity", url, "--slo", "ttft=200ms", "--peak", "500", "--patch", str(patch)),
                *("--start-rate", "50", "--duration", "1.5", "--timeout", "10"),
            ]
        )
    out = capsys.readouterr().out
    assert code == 0, out
    report = json.loads((tmp_path / "capacity.json").read_text())
    limit = report["search"]["holds"]
    assert 25 < limit < 130  # 100 a second, less what the bunching of arrivals costs
    proposed, overload = report["stages"][-2:]
    assert proposed["rate"] == pytest.approx(limit * HEADROOM)
    assert overload["rate"] == pytest.approx(limit * 1.3)
    args = yaml.safe_load(patch.read_text())["applications"][0]["args"]
    assert args["replica"]["max_replicas"] == pytest.approx(500 / (limit * HEADROOM), abs=1)
    assert args["api"]["max_queued_requests"] >= 1
    assert str(patch) in out


def test_capacity_of_a_service_that_answers_nothing(tmp_path):
    """No patch, exit 1, and no search down to nothing."""
    with serving(Scripted((429,))) as url:
        code = main(
            [
                *("capacity", url, "--slo", "ttft=1s", "--peak", "1"),
                *("--patch", str(tmp_path / "c.yaml"), "--start-rate", "100", "--duration", "1"),
            ]
        )
    assert code == 1
    assert not (tmp_path / "c.yaml").exists()


def test_compare_is_a_gate(tmp_path, capsys):
    """The same report passes; one with every time doubled exits 1 and says where."""
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    with serving(Scripted((0.05, "a", 0.01, "b"))) as url:
        assert run(url, "--rate", "40", "--duration", "3", "--json", str(before)) == 0
    report = json.loads(before.read_text())
    # a busy machine makes the client late, which the gate refuses; that has its own test
    report["stages"][0]["client"] |= {"bottleneck": False, "reasons": []}
    before.write_text(json.dumps(report))
    columns = report["stages"][0]["samples"]
    for name in ("ttft_s", "e2e_s"):
        columns[name] = [value and value * 2 for value in columns[name]]
    after.write_text(json.dumps(report))
    capsys.readouterr()
    assert main(["loadtest", "compare", str(before), str(before)]) == 0
    assert "regressed" not in capsys.readouterr().out
    assert main(["loadtest", "compare", str(before), str(after)]) == 1
    assert "regressed" in capsys.readouterr().out
    assert main(["loadtest", "compare", str(before), str(after), "--threshold", "100"]) == 0


def test_loadtest_writes_at_ctrl_c_what_was_measured(tmp_path):
    """A minute's run, ended in the middle: exit 130, both files, and no traceback."""
    app = Scripted(SCRIPT)
    with serving(app) as url:
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "serve_app", "loadtest", url, "--rate", "20"),
                *("--duration", "60", "--warmup", "0.1", "--processes", "2"),
                *("--json", tmp_path / "r.json", "--html", tmp_path / "r.html"),
            ],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while len(app.asked) < 40 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(child.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches every process
        out, err = child.communicate(timeout=20)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["interrupted"] is True
    assert report["stages"][0]["completed"] > 10
    assert report["stages"][0]["errors"] == {}
    assert "Interrupted" in (tmp_path / "r.html").read_text()
    assert "ttft" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["loadtest", "ftp://x"], "http"),
        (["loadtest", "http://user:secret@127.0.0.1:9"], "credentials"),
        (["loadtest", "http://127.0.0.1:9", "http://b"], "one URL"),
        (["loadtest", "compare", "a.json"], "BEFORE.json"),
        (["loadtest", "http://127.0.0.1:9", "--goodput"], "--slo"),
        (["loadtest", "http://127.0.0.1:9", "--prompt-tokens", "x"], "lognormal"),
        (["loadtest", "http://127.0.0.1:9"], "cannot be reached"),
        (["capacity", "no.yaml", "--slo", "ttft=1s", "--peak", "1"], "no.yaml"),
    ],
)
def test_loadtest_called_wrongly_says_one_sentence(capsys, arguments, words):
    """Exit 2, the fix on stderr, and no credential repeated."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert "secret" not in err
