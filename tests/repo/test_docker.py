"""The image: built of what is pinned, with the whole package, for the user of the pods.

Nothing here runs Docker.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parent.parent.parent
BASE = REPOSITORY / "configs" / "kubernetes" / "base"
DOCKERFILE = REPOSITORY / "configs" / "docker" / "Dockerfile"


def instructions(stage: str | None = None) -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions and what follows each, of one stage or of all."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found, current = [], ""
    for name, rest in (line.split(maxsplit=1) for line in lines):
        current = rest.rpartition(" AS ")[2] if name == "FROM" else current
        if stage in (None, current):
            found.append((name, rest))
    return found


def test_image_target_is_the_documented_one():
    """In the Dockerfile's own head and beside the manifests."""
    stages = [rest.rpartition(" AS ")[2] for name, rest in instructions() if name == "FROM"]
    reported = (BASE / "kustomization.yaml").read_text() + DOCKERFILE.read_text()
    targets = re.findall(r"--target (\S+)", reported)
    assert sorted(targets) == ["builtin", "builtin", "vllm"]
    assert set(targets) <= set(stages)
    assert str(DOCKERFILE.relative_to(REPOSITORY)) in reported


def test_image_has_the_pinned_versions_and_the_pods_user():
    """Torch first, as it is installed everywhere; nobody is root in it."""
    installs = re.findall(r"pip install ([^&]+)", "&".join(rest for _, rest in instructions()))
    assert len(installs) >= 3
    with_vllm = [line for line in installs if "vllm" in line]
    assert with_vllm == ["-c scripts/constraints-vllm.txt '.[vllm]' "]
    ours = [line for line in installs if line not in with_vllm]
    assert all(line.startswith("-c scripts/constraints.txt ") for line in ours)
    assert installs[0].split()[-1] == "torch"
    (user,) = {rest for name, rest in instructions() if name == "USER"}
    assert instructions("builtin")[-2] == instructions("vllm")[-2] == ("USER", user)
    cluster = yaml.safe_load((BASE / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert str(group["template"]["spec"]["securityContext"]["runAsUser"]) == user
    (version,) = re.findall(r"FROM python:(\d+\.\d+)-", DOCKERFILE.read_text())
    assert tuple(map(int, version.split("."))) >= (3, 11)


def test_image_holds_the_whole_package(tmp_path):
    """What is copied is enough to build it, with the files that are no Python."""
    for name, rest in instructions():
        if name != "COPY":
            continue
        *sources, target = rest.split()
        for source in sources:
            at = tmp_path / target / ("" if target.endswith("/") else ".")
            (shutil.copytree if (REPOSITORY / source).is_dir() else copy_into)(
                REPOSITORY / source, at
            )
    built_at = tmp_path / "wheel"
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*build, "--wheel-dir", str(built_at), str(tmp_path)],
        capture_output=True,
        check=True,
        timeout=120,
    )
    (wheel,) = built_at.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = REPOSITORY / "serve_app"
    wanted = {
        str(path.relative_to(REPOSITORY))
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert wanted <= inside


def copy_into(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def test_image_context_is_what_it_copies():
    """No token file, cache or environment of whoever builds it is sent to Docker."""
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    copied = {
        source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]
    }
    assert rules[0] == "*"
    assert {line.removeprefix("!") for line in rules if line.startswith("!")} == copied
