"""Load every contender once, let them take turns for some rounds, write what came out.

On a card they run one after the other, all rounds each.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from scripts.bench import report, shapes
from scripts.bench.worker import (
    ROOT,
    Contender,
    ContenderFailed,
    Setup,
    recommended_by_vllm,
)
from scripts.bench.workload import ALONE, LENGTHS, STEADY, Request, make, window_of
from scripts.local_hub.model import build_demo_model, default_cache_dir, find_gguf

ROOFLINE = "roofline"
# Name, `module:function` and whose Python; the first is measured against the others.
CONTENDERS = {
    "serve-app": ("ours:load", None),
    "generate": ("huggingface:one_by_one", None),
    "static": ("huggingface:static", None),
    "continuous": ("huggingface:continuous", None),
    "vllm": ("vllm:load", "vllm_python"),
    "vllm-zentorch": ("vllm:load", "zentorch_python"),
    "llama.cpp": ("llama_cpp:load", "llama_python"),
    ROOFLINE: ("roofline:load", None),
}
KINDS = {"mixed": LENGTHS, "steady": STEADY}
GENERATED_TEXT = 4096
WARM_UP = -1  # instead of a round's number


def main() -> int:
    """Run the benchmark."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all contenders are ended
    logs = Path(tempfile.mkdtemp(prefix="bench-engine-"))
    with tempfile.TemporaryDirectory(prefix="bench-model-") as scratch:
        model_dir, text = _model(args, Path(scratch))
        setup = Setup(
            model_dir=str(model_dir),
            dtype=args.dtype,
            device=args.device,
            threads=args.threads,
            streams=max(args.streams),
            window=window_of(KINDS[args.lengths]),
            gguf=args.gguf or ("" if args.config else str(find_gguf())),
        )
        names = [*args.only, ROOFLINE]
        # A card's memory holds one at a time; its times do not change from minute to minute.
        groups = [names] if args.device == "cpu" else [[name] for name in names]
        records: list[report.Record] = []
        loaded: dict[str, Contender] = {}
        for group in groups:
            with contextlib.ExitStack() as stack:
                contenders = _load(group, args, setup, logs, stack)
                records += _rounds(args, contenders, text)
                loaded |= contenders
    result = report.summarise(
        records,
        setup=vars(args) | {"model": args.config or model_dir.name},
        load_s={name: contender.load_s for name, contender in loaded.items()},
        settings={name: contender.settings for name, contender in loaded.items()},
    )
    markdown = report.markdown(result)
    print(markdown)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # A file for each class of processor: their numbers have nothing to do with each other.
        best = (report.cpu_features() or ["cpu"])[0] if args.device == "cpu" else args.device
        stem = args.out.with_name(f"{args.out.name}-{best}")
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench_engine", description=__doc__)
    parser.add_argument("--model", type=Path, help="a model's directory; default: the demo model")
    parser.add_argument("--config", choices=shapes.CONFIGS, help="random weights of these shapes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--streams",
        type=int,
        nargs="+",
        default=[1, len(LENGTHS)],
        help=f"requests at once; 1 is the first {ALONE}, one after the other",
    )
    parser.add_argument(
        "--lengths", choices=KINDS, default="mixed", help="steady: 1,000 tokens in, 200 out"
    )
    parser.add_argument("--rounds", type=int, default=3)
    peers = [name for name in CONTENDERS if name != ROOFLINE]
    parser.add_argument("--only", nargs="+", choices=peers, default=peers)
    parser.add_argument(
        "--vllm-python", default=os.environ.get("BENCH_VLLM_PYTHON"), help="of its environment"
    )
    parser.add_argument(
        "--zentorch-python",
        default=os.environ.get("BENCH_ZENTORCH_PYTHON"),
        help="of an environment with vLLM and zentorch (AMD's operators, of torch's own version)",
    )
    parser.add_argument(
        "--llama-python", default=os.environ.get("BENCH_LLAMA_PYTHON"), help="of its environment"
    )
    parser.add_argument("--gguf", help="the model for llama.cpp; default: the demo model's")
    parser.add_argument(
        "--out", type=Path, help="write OUT-CLASS.json and .md, by the class of processor"
    )
    return parser.parse_args()


def _model(args: argparse.Namespace, scratch: Path) -> tuple[Path, list[int]]:
    """Return the model's directory and a text's ids to cut prompts from."""
    if args.config:
        shapes.write(args.config, scratch, device=args.device)
        draw = random.Random(0)  # noqa: S311 (repeatable on purpose)
        vocabulary = shapes.CONFIGS[args.config]["vocab_size"]
        return scratch, [draw.randrange(vocabulary) for _ in range(GENERATED_TEXT)]
    model_dir = args.model or build_demo_model(default_cache_dir())
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return model_dir, tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8")).ids


def _load(
    names: list[str],
    args: argparse.Namespace,
    setup: Setup,
    logs: Path,
    stack: contextlib.ExitStack,
) -> dict[str, Contender]:
    """Start what can be started; the rest is named with its reason."""
    contenders: dict[str, Contender] = {}
    for name in names:
        start, interpreter = CONTENDERS[name]
        python = vars(args)[interpreter] if interpreter else sys.executable
        if not python or (name == "llama.cpp" and not setup.gguf):
            print(f"{name}: left out, see --help for how to name its environment")
            continue
        try:
            preload = recommended_by_vllm(python) if start == "vllm:load" else []
            log = logs / f"{name}.log"
            contenders[name] = Contender(name, start, python, setup, log, preload)
            stack.callback(contenders[name].close)
            print(f"{name}: loaded in {contenders[name].load_s:.1f} s", flush=True)
        except ContenderFailed as error:
            print(f"{name}: left out: {error}", flush=True)
    return contenders


def _rounds(
    args: argparse.Namespace, contenders: dict[str, Contender], text: list[int]
) -> list[report.Record]:
    """Let all run the same requests in turn; who begins changes with the round."""
    names, lengths = list(contenders), KINDS[args.lengths]
    warm_up = [Request(each.prompt, 4) for each in make(text, streams=2, turn=1, lengths=lengths)]
    plan = itertools.product(range(args.rounds), args.streams)
    turns = [
        (number, streams, make(text, streams=streams, turn=turn, lengths=lengths))
        for turn, (number, streams) in enumerate(plan, start=2)
    ]
    records: list[report.Record] = []
    for number, streams, requests in [(WARM_UP, len(warm_up), warm_up), *turns]:
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            work = [] if name == ROOFLINE else requests
            try:
                answer = contenders[name].run(work, together=streams > 1 or name == ROOFLINE)
            except ContenderFailed as error:  # the others' hour is not lost
                print(f"{error}; it is left out", flush=True)
                names.remove(name)
                records = [record for record in records if record.name != name]
                continue
            if number != WARM_UP:
                records.append(report.Record(name, number, streams, requests, answer))
                print(records[-1], flush=True)
    return records


if __name__ == "__main__":
    sys.exit(main())
