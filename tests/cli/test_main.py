"""The command line: exit codes, one clear sentence, no traceback."""

import json
from pathlib import Path

import pytest

from serve_app.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
TOKEN = "hf_" + "Qz7" * 12


def write(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return str(path)


def test_validate_says_what_is_valid(capsys):
    """A good file exits 0."""
    assert main(["validate", str(CONFIGS / "llama-3.2-1b.yaml")]) == 0
    assert "is valid: llm" in capsys.readouterr().out


def test_validate_says_what_it_could_not_check(capsys, monkeypatch):
    """Without vLLM its arguments' names are nobody's to judge, and the rest is."""
    monkeypatch.setattr("serve_app.engine.backends.has_vllm", lambda: False)
    assert main(["validate", str(CONFIGS / "llama-3.3-70b.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "vLLM is not installed here" in printed
    assert "is valid: llm" in printed


@pytest.mark.parametrize("command", ["validate", "check"])
def test_main_exits_2_for_a_config_error(tmp_path, capsys, command):
    """The fix is on stderr, nothing on stdout."""
    path = write(
        tmp_path, "applications: [{import_path: 'serve_app.app:build_app', args: {modl: 1}}]"
    )
    assert main([command, path]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "args.modl: unknown key; did you mean model?" in err


def test_main_prints_no_token_of_the_yaml(tmp_path, capsys):
    """The fault is reported, the value is not."""
    path = write(tmp_path, f"applications: [{{args: {{access: {{token: {TOKEN}}}}}}}]")
    assert main(["validate", path]) == 2
    assert TOKEN not in "".join(capsys.readouterr())


def test_schema_is_json_schema(capsys):
    """The printed schema describes every part of args."""
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {"model", "access", "replica", "engine", "api", "logging"}


def test_main_without_a_command_is_a_usage_error():
    """Argparse's own exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_check_refuses_a_revision_without_its_repository(capsys):
    """A flag that would do nothing is an error."""
    assert main(["check", str(CONFIGS / "llama-3.2-1b.yaml"), "--revision", "v1"]) == 2
    assert "--revision goes with --repo-id" in capsys.readouterr().err
