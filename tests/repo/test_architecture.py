"""The shape of the package: import contracts, sizes, light start."""

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "serve_app").rglob("*.py"))
# LICENSE and dotfiles besides; a build leaves an egg-info that git ignores
TOP_LEVEL = {"serve_app", "configs", "pyproject.toml", "tests", "scripts", "README.md", "LICENSE"}


def run(*command):
    return subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_import_contracts_hold():
    """torch, Ray and HTTP stay where the architecture puts them."""
    done = run(str(Path(sys.executable).parent / "lint-imports"))
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_files_stay_readable():
    """No file outgrows its idea."""
    long = {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 350}
    assert not long
    assert len(SOURCES) > 20


def test_private_calls_of_ray_are_in_one_package():
    """They change without a word; whoever upgrades Ray reads `serve_app/cluster/` alone."""
    private = re.compile(r"ray\.(serve\.)?_private|ray\._raylet|internal_kv|_get_global_client")
    found = {path.parent.name for path in SOURCES if private.search(path.read_text())}
    assert found == {"cluster"}


def test_top_level_is_fixed():
    """Nothing new at the top of the repository."""
    tracked = run("git", "ls-files").stdout.split()
    if not tracked:  # a source archive without git
        tracked = [p.name for p in ROOT.iterdir() if p.name in TOP_LEVEL]
    top = {name.split("/")[0] for name in tracked}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_help_answers_at_once():
    """`--help` imports neither Ray nor torch: under 0.3 s (best of five on a shared machine)."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = run(sys.executable, "-m", "serve_app", "--help")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert "check" in done.stdout
    assert min(times) < 0.3


def test_packages_import_nothing_heavy():
    """Importing the package and its parts' `__init__` loads no third-party module."""
    code = (
        "import sys, serve_app, serve_app.access, serve_app.engine, serve_app.api;"
        "print(sorted({'ray','torch','transformers','fastapi','pydantic'} & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_gate_and_servers_do_not_import_torch():
    """A refusal must not wait for torch; neither may the ingress pay for it."""
    code = (
        "import sys, serve_app.app, serve_app.deployments.server, serve_app.deployments.ingress;"
        "print(sorted({'torch','transformers','accelerate'} & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_token_values_stand_nowhere_in_the_repository():
    """Fake tokens are built at run time."""
    found = run("git", "grep", "-nIE", "hf_[A-Za-z0-9]{30,}", "--", ".")
    assert found.stdout == ""


def test_token_values_are_used_by_access_alone():
    """Whoever asks who may see a token reads these files and no other."""
    found = {
        str(path.relative_to(ROOT / "serve_app"))
        for path in SOURCES
        if ".reveal()" in path.read_text()
    }
    assert found == {"access/hub/probe.py", "access/hub/download.py"}
