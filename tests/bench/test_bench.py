"""The benchmark as it is called, on a tiny model."""

import json
import subprocess
import sys

import pytest

from scripts.bench.worker import ROOT, Contender, ContenderFailed, Setup

pytestmark = pytest.mark.slow


def test_bench_engine_lets_two_contenders_take_turns_and_agree(tmp_path):
    """Each in a process of its own; float32 tokens are equal and the files are written."""
    out = tmp_path / "results" / "tiny"
    command = ["scripts/bench_engine", "--config", "tiny", "--dtype", "float32", "--rounds", "1"]
    more = ["--streams", "2", "--only", "serve-app", "generate", "--out", str(out)]
    done = subprocess.run(
        command + more, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = out.parent.glob("tiny-*.json")  # by the class of processor
    result = json.loads(written.read_text())
    row = result["contenders"]["serve-app"]["streams"]["2"]
    assert row["equal_to_generate"] == "2/2"
    assert 0 < row["ttft_p50_s"] < row["ttft_p95_s"] + 1e-9
    assert result["contenders"]["generate"]["streams"]["2"]["ours_tok_s_ratio"] > 0
    assert "| serve-app |" in written.with_suffix(".md").read_text()


def test_bench_engine_runs_without_ray():
    """What is measured is the engine; Ray would bring threads and memory of its own."""
    code = "import sys, scripts.bench.contenders.ours; sys.exit('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0


def test_contender_that_ends_is_named_with_its_log(tmp_path):
    """Loading that fails is an error of that contender alone, with a place to look."""
    setup = Setup(str(tmp_path), "float32", "cpu", 1, 2, 384, "")
    log = tmp_path / "log"
    with pytest.raises(ContenderFailed, match=str(log)):
        Contender("generate", "huggingface:one_by_one", sys.executable, setup, log)
    assert "config" in log.read_text()
