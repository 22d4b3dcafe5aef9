"""Prove the builtin engine on a CUDA device: its tests, its speed, one report to commit.

Takes about 20 minutes on a card that holds Llama-3.1-8B in bf16; the weights are random. Runs
tests/gpu, then this engine and after it transformers' continuous batching, 1,000 tokens of prompt
and 200 of completion each, beside what the card reads, copies and multiplies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from scripts.bench import shapes
from scripts.bench.report import OURS, markdown
from scripts.bench.worker import ROOT

PEER = "continuous"  # transformers' own
OF_COPY, FASTER = 0.70, 3.0  # the bars: one stream, and many
FAILED = 1


def main(argv: list[str] | None = None) -> int:
    """Run everything; returns 0 if all tests passed and all bars were reached, else 1."""
    command = sys.argv[1:] if argv is None else argv
    args = _arguments(command)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is here; nothing was proven", file=sys.stderr)
        return FAILED
    with tempfile.TemporaryDirectory(prefix="gpu-proof-") as scratch:
        tests = run_tests(Path(scratch)) if args.device == "cuda" else None
        result = run_bench(args, Path(scratch))
    bars = list(judge(result))
    lines = [
        f"# The builtin engine on {_device(args.device)}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, by `{' '.join(('scripts/gpu_proof', *command))}`.",
        "",
        *([f"- tests/gpu: {tests['words']}"] if tests else []),
        *(f"- {'reached' if reached else 'NOT reached'}: {words}" for reached, words in bars),
        "",
        markdown(result).replace("\n## ", "\n### ").replace("# ", "## ", 1),
    ]
    report = "\n".join(lines)
    print(report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report, encoding="utf-8")
    is_good = (tests is None or tests["is_good"]) and all(reached for reached, _ in bars)
    return 0 if is_good else FAILED


def run_tests(scratch: Path) -> dict[str, Any]:
    """Run tests/gpu; returns whether all passed, and how many did, in words."""
    junit, began = scratch / "junit.xml", time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", f"--junitxml={junit}"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    seconds = time.monotonic() - began
    if not junit.exists():
        return {"is_good": False, "words": f"did not run (pytest ended with {done.returncode})"}
    suite = ElementTree.parse(junit).getroot().find("testsuite")  # noqa: S314 (our own)
    counts = {} if suite is None else suite.attrib
    ran, skipped = int(counts.get("tests", 0)), int(counts.get("skipped", 0))
    failed = int(counts.get("failures", 0)) + int(counts.get("errors", 0))
    passed = ran - failed - skipped
    words = f"{passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s"
    return {"is_good": done.returncode == 0 and passed == ran > 0, "words": words}


def run_bench(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time the engine and its peer; returns the benchmark's result."""
    command = [
        *(sys.executable, "-m", "scripts.bench", "--device", args.device),
        *("--config", args.config, "--rounds", str(args.rounds), "--lengths", args.lengths),
        *("--streams", *map(str, args.streams), "--only", OURS, PEER),
        *("--out", str(scratch / "bench")),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    (written,) = scratch.glob("bench-*.json")
    result: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return result


def judge(result: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield for each bar whether it was reached, and the number."""
    rates = result["rates"]
    for streams, row in result["contenders"][OURS]["streams"].items():
        if streams == "1":
            share = row["tok_s"] * rates["weights_bytes"] / rates["copy_bytes_per_s"]
            words = f"one stream reads weights at {share:.0%} of what a copy moves ({OF_COPY:.0%})"
            yield share >= OF_COPY, words
            continue
        peer = result["contenders"].get(PEER)
        if peer is None:
            yield False, f"{streams} at once: transformers' continuous batching did not run"
            continue
        ratio = peer["streams"][streams]["ours_tok_s_ratio"]
        words = f"{streams} at once: {ratio:.2f} x transformers' continuous batching ({FASTER:g} x)"
        yield ratio >= FASTER, words


def _device(device: str) -> str:
    if device == "cpu":
        return "a CPU, to try this command"
    card = torch.cuda.get_device_properties(0)
    version = torch.version.cuda
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {version}"


def _arguments(command: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_proof", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--config", choices=shapes.CONFIGS, default="meta-llama/Llama-3.1-8B")
    parser.add_argument("--lengths", choices=("mixed", "steady"), default="steady")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "scripts" / "bench" / "results" / "gpu-proof.md",
        help="the report",
    )
    return parser.parse_args(command)


if __name__ == "__main__":
    sys.exit(main())
