"""The command that proves the engine on a card, as far as it runs without one."""

import copy
import subprocess
import sys

import pytest

from scripts.bench import gpu_proof
from scripts.bench.worker import ROOT

RESULT = {
    "rates": {"weights_bytes": 16e9, "copy_bytes_per_s": 2e12},
    "contenders": {
        "serve-app": {"streams": {"1": {"tok_s": 90.0}, "64": {"tok_s": 9.0}}},
        "continuous": {"streams": {"1": {}, "64": {"ours_tok_s_ratio": 3.0}}},
    },
}


def test_judge_reached():
    """90 tokens a second of 16 GB are 72 % of 2 TB/s."""
    (one, words), (many, others) = gpu_proof.judge(RESULT)
    assert (one, many) == (True, True)
    assert "72%" in words
    assert "3.00 x" in others


@pytest.mark.parametrize(("tok_s", "ratio"), [(80.0, 3.1), (95.0, 2.9)])
def test_judge_not_reached(tok_s, ratio):
    """Each bar by itself."""
    result = copy.deepcopy(RESULT)
    result["contenders"]["serve-app"]["streams"]["1"]["tok_s"] = tok_s
    result["contenders"]["continuous"]["streams"]["64"]["ours_tok_s_ratio"] = ratio
    assert sorted(reached for reached, _ in gpu_proof.judge(result)) == [False, True]


def test_judge_without_the_peer():
    """What was not measured is not reached."""
    result = RESULT | {"contenders": {"serve-app": RESULT["contenders"]["serve-app"]}}
    assert [reached for reached, _ in gpu_proof.judge(result)] == [True, False]


@pytest.mark.slow
def test_gpu_proof_on_a_cpu_writes_a_report(tmp_path):
    """All but the card: both engines, the bars, the file; a bar that is missed is exit code 1."""
    out = tmp_path / "proof.md"
    command = ["scripts/gpu_proof", "--device", "cpu", "--config", "tiny", "--lengths", "mixed"]
    more = ["--streams", "1", "2", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(
        command + more, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    report = out.read_text()
    assert ("NOT reached" in report) == (done.returncode == 1)
    assert report.count("reached: ") == 2
    assert "| serve-app |" in report
    assert "| continuous |" in report


@pytest.mark.slow
def test_gpu_tests_and_the_engine_need_no_ray():
    """A borrowed card's image has none: they are collected, and skipped for want of a card."""
    code = (
        "import sys; sys.modules['ray'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "tests/gpu"],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
