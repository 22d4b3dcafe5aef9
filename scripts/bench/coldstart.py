"""Time what remains of a replica's start where the weights are on its node already.

    python -m scripts.bench.coldstart --config meta-llama/Llama-3.2-1B --out FILE.md

A Hub and a Ray instance of its own; the node is prefetched, a first replica deployed beside its
ingress, then the deployment is scaled `--rounds` times from one replica to two. What each start
took is `serve-app coldstart`'s ledger. Beside it stands what a start cannot do without: a process
that imports what a replica imports, and one read of the weights.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from scripts.bench import shapes
from scripts.bench.report import cpu_features
from scripts.local_hub import Behaviour, LocalHub, Repo
from scripts.local_hub.model import build_demo_model, default_cache_dir
from scripts.quickstart_state import LOOPBACK

ROOT = Path(__file__).parents[2]
DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
APP = "llm"
START_S = 300.0
REST_S = 3.0  # after a replica has stopped, so that what ends it is over
IMPORTS = """
from serve_app.config import EngineConfig
from serve_app.deployments import server
from serve_app.engine import backends
backends.import_libraries(EngineConfig())
"""


def main() -> int:
    """Start replicas, write what came out."""
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="coldstart-", dir=args.scratch) as scratch:
        directory = args.directory or _model(args.config, Path(scratch))
        weights = sorted(directory.glob("*.safetensors"))
        needed = (_imports_s(), _read_s(weights))
        with _cluster(args, directory, Path(scratch)) as config:
            starts = _starts(config, args.rounds)
    text = markdown(args, starts, needed, sum(path.stat().st_size for path in weights))
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 0


def _model(config: str, scratch: Path) -> Path:
    if config == DEMO:
        return build_demo_model(default_cache_dir())
    shapes.write(config, scratch / "model")
    return scratch / "model"


def _imports_s(rounds: int = 3) -> float:
    """Return the median of processes that import what a replica imports, and end."""

    def once() -> float:
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=ROOT)
        return time.monotonic() - began

    once()  # what lies on the disk alone
    return statistics.median(once() for _ in range(rounds))


def _read_s(files: Sequence[Path], rounds: int = 3) -> float:
    """Return the median of reading the weights into the memory that they are to lie in."""
    import torch  # noqa: PLC0415 (not before the processes are timed)

    from serve_app.engine.model.native.huge_pages import HugePages  # noqa: PLC0415

    def once() -> float:
        began = time.monotonic()
        memory = HugePages()
        for path in files:
            with path.open("rb", buffering=0) as stream:
                place = memory.empty(path.stat().st_size, torch.uint8).numpy()
                while len(place) and (count := stream.readinto(place)):
                    place = place[count:]
        return time.monotonic() - began

    once()
    return statistics.median(once() for _ in range(rounds))


@contextmanager
def _cluster(args: argparse.Namespace, directory: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """Run a Hub and Ray, fetch the weights; yields the Serve config."""
    repo_id = DEMO if args.config == DEMO else args.config.partition("/")[2] + "/random"
    hub = LocalHub([Repo.from_dir(repo_id, directory, gated="manual")])
    with hub:
        token = hub.issue_token(Behaviour.granted, account="bench")
        secret = scratch / "token"
        secret.write_text(token)
        secret.chmod(0o600)
        model = {"repo_id": repo_id, "served_name": "m"}
        server = {"name": "LLMServer", "num_replicas": 1}  # Serve takes no 0 here
        config = {
            "http_options": {"host": "127.0.0.1", "port": args.port},
            "applications": [
                {
                    "name": APP,
                    "import_path": "serve_app.app:build_app",
                    "external_scaler_enabled": True,
                    "args": {
                        "model": model,
                        "access": {"endpoint": hub.url, "token_file": str(secret)},
                        "replica": {"num_gpus": 0, "num_cpus": os.cpu_count() or 1},
                        "engine": {"max_context_tokens": 8192, "max_running_requests": 32},
                    },
                    "deployments": [server],
                }
            ],
        }
        path = scratch / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        environment = {
            **LOOPBACK,
            "HF_HOME": str(scratch / "hf"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT),
        }
        os.environ.update(environment)
        import ray  # noqa: PLC0415 (reads its environment when imported)

        context: Any = ray.init(
            "local",
            num_cpus=4 * (os.cpu_count() or 1),
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        try:
            address = str(context.address_info["gcs_address"])
            command = [sys.executable, "-m", "serve_app", "prefetch", str(path)]
            subprocess.run([*command, "--address", address], check=True, cwd=ROOT)
            yield config
        finally:
            from ray import serve  # noqa: PLC0415

            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def _starts(config: dict[str, Any], rounds: int) -> list[Any]:
    """Return the ledger of the first replica and of each second one."""
    from serve_app.rollout.serve_client import Instance  # noqa: PLC0415

    instance = Instance(config)
    found = [_start(lambda: instance.apply(config))]
    for _ in range(rounds):
        found.append(_start(lambda: _scale(2)))
        _scale(1)
        _until(lambda: len(_running()) == 1)
        time.sleep(REST_S)
    return found


def _start(begin: Callable[[], None]) -> Any:
    """Have a replica started and ask until it has answered; returns its start."""
    from ray import serve  # noqa: PLC0415

    from serve_app.rollout.serve_client import CANARY  # noqa: PLC0415
    from serve_app.telemetry import cold_start  # noqa: PLC0415

    before = {start.replica for start in cold_start.recent()}

    def new() -> list[Any]:
        return [start for start in cold_start.recent() if start.replica not in before]

    begin()
    _until(new)
    handle: Any = serve.get_deployment_handle("LLMServer", app_name=APP)
    handle = handle.options(stream=True)

    def answered() -> bool:
        for _ in handle.generate.remote(CANARY):
            pass
        return any(span.phase == "first_token" for start in new() for span in start.spans)

    _until(answered)
    time.sleep(REST_S)
    return new()[0]


def _scale(count: int) -> None:
    import ray  # noqa: PLC0415
    from ray.serve._private.common import DeploymentID  # noqa: PLC0415

    from serve_app.cluster.controller import controller_client  # noqa: PLC0415

    controller = controller_client()._controller
    server = DeploymentID(name="LLMServer", app_name=APP)
    ray.get(controller.update_deployment_replicas.remote(server, count))


def _running() -> list[dict[str, Any]]:
    from serve_app.cluster.controller import replicas  # noqa: PLC0415

    return replicas(APP, START_S)["LLMServer"]


def _until(done: Any) -> None:
    deadline = time.monotonic() + START_S
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit(f"not done within {START_S:g} s")
        time.sleep(0.05)


def markdown(
    args: argparse.Namespace, starts: Sequence[Any], needed: tuple[float, float], size: int
) -> str:
    """Return the ledger as a table: the first replica, and the medians of the second ones."""
    first, later = starts[0], starts[1:]
    phases = list(dict.fromkeys(span.phase for start in starts for span in start.spans))

    def middle(group: Sequence[Any], phase: str, what: str) -> float | None:
        found = [
            span.duration_s if what == "took" else span.started_at - start.started_at
            for start in group
            for span in start.spans
            if span.phase == phase
        ]
        return statistics.median(found) if found else None

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    lines = [
        f"## {args.config}, {size / 1e9:.2f} GB of weights",
        "",
        f"{', '.join(cpu_features()) or 'no AVX512'}; {os.cpu_count()} cores, "
        f"{datetime.now(UTC):%Y-%m-%d}, torch {version('torch')}, transformers "
        f"{version('transformers')}, ray {version('ray')}; medians of "
        f"{len(later)} second replicas.",
        "",
        "| phase | first: at (s) | took (s) | second: at (s) | took (s) |",
        "|---|--:|--:|--:|--:|",
    ]
    for phase in phases:
        cells = (
            middle(group, phase, what) for group in ([first], later) for what in ("at", "took")
        )
        lines.append(f"| {phase} | {' | '.join(map(shown, cells))} |")
    ready = statistics.median(start.ready_s for start in later)
    lines.append(f"| ready | {first.ready_s:.2f} | | {ready:.2f} | |")
    imports_s, read_s = needed
    least = imports_s + read_s
    lines += [
        "",
        f"A process that imports what a replica imports: {imports_s:.2f} s; one read of the "
        f"weights into huge pages: {read_s:.2f} s. Second replica ready ÷ both: "
        f"{ready / least:.2f}.",
    ]
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.coldstart", description=__doc__)
    parser.add_argument("--config", choices=[DEMO, *shapes.CONFIGS], default=DEMO)
    parser.add_argument("--directory", type=Path, help="a model of these shapes that is there")
    parser.add_argument("--rounds", type=int, default=3, help="second replicas")
    parser.add_argument("--port", type=int, default=18_500)
    parser.add_argument("--scratch", type=Path, help="a folder for random weights and their copies")
    parser.add_argument("--out", type=Path, help="write the table there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
