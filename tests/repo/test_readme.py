"""The README is true: its commands run, what it names exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from scripts import reference
from serve_app.config import AppConfig

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def commands():
    """Every command line of the README's sh blocks, continuation lines joined."""
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


# The commands that other tests run as a user would, and where.
RUN_ELSEWHERE = {
    ("scripts/quickstart",): "tests/integration/test_quickstart.py",
    ("scripts/test",): "this very run",
    ("curl",): "tests/integration/test_quickstart.py",
    ("serve-app", "check"): "tests/integration/test_check.py",
    ("serve-app", "receipt"): "tests/integration/test_preflight.py",
}
COMMANDS = list(commands())


def test_readme_is_short():
    """A newcomer reads it in one sitting."""
    assert len(README.splitlines()) <= 150


def test_reference_is_what_the_code_says():
    """Every key, metric and event with its meaning; `scripts/fix` writes them."""
    text = reference.TARGET.read_text(encoding="utf-8")
    assert reference.render(text) == text
    assert all(len(table.splitlines()) > 10 for table in reference.tables().values())


def test_reference_describes_every_config_field():
    """The table has no empty cell."""
    for info in AppConfig.model_fields.values():
        assert issubclass(info.annotation, BaseModel)
        assert all(field.description for field in info.annotation.model_fields.values())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_readme_commands_run(words):
    """A command of the README works as it stands, here or in the test that is named."""
    for prefix, place in RUN_ELSEWHERE.items():
        if tuple(words[: len(prefix)]) == prefix:
            assert place == "this very run" or (ROOT / place).is_file()
            return
    program = BIN / words[0] if (BIN / words[0]).exists() else words[0]
    done = subprocess.run(
        [program, *words[1:]], cwd=ROOT, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()


def test_readme_names_files_that_exist():
    """No path leads nowhere."""
    named = set(re.findall(r"`((?:serve_app|scripts|configs|tests)/[\w./-]+)`", README))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_contributing_names_files_that_exist():
    """Each file in back quotes is in the package, so that nobody looks for one that has moved."""
    text = (ROOT / "configs" / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text))
    assert len(named) > 30
    places = [ROOT, *(ROOT / "serve_app").rglob("*/"), ROOT / "serve_app"]
    lost = [name for name in named if not any((place / name).is_file() for place in places)]
    assert not lost


def test_docstrings_name_files_that_exist():
    """Each module in back quotes anywhere in the package is there, under some folder."""
    named = {
        name
        for path in (ROOT / "serve_app").rglob("*.py")
        for name in re.findall(r"`((?:\w+/)*\w+\.py)`", path.read_text())
    }
    assert len(named) > 10
    known = {str(path) for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts}
    assert [name for name in sorted(named) if not any(k.endswith(f"/{name}") for k in known)] == []


def test_packages_map_their_modules():
    """Its docstring names each of them, so that a newcomer knows where to look."""
    for package in sorted((ROOT / "serve_app").rglob("__init__.py"))[1:]:
        modules = {path.name for path in package.parent.glob("*.py")} - {"__init__.py"}
        text = package.read_text()
        folder = package.parent.relative_to(ROOT)
        lost = {name for name in modules if name not in text}
        assert not lost or len(modules) <= 2, f"{folder}: {sorted(lost)}"
