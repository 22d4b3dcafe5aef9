"""Unmodified clients against the real application, each in its own environment and process.

`scripts/clients` makes the environments (`scripts/test --all` does, too); a client without one is
skipped, and pytest says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENTS = ROOT / ".venv-clients"
PROGRAMS = Path(__file__).parent / "programs"
LIMIT_S = 120  # a few seconds on a quiet machine

CLIENTS = {
    "langchain": [
        "invoke",
        "stream",
        "batch",
        "bind_tools",
        "with_structured_output",
        "history",
        "n and logprobs",
        "completions",
        "responses",
        "reasoning_effort",
    ],
    "litellm": ["openai", "hosted_vllm", "thinking", "responses", "text_completion", "not found"],
    "instructor": [
        "FUNCTIONS",
        "TOOLS",
        "TOOLS_STRICT",
        "JSON",
        "JSON_SCHEMA",
        "RESPONSES_TOOLS",
        "partial",
    ],
    "pydantic_ai": ["OpenAIChatModel", "OpenAIResponsesModel"],
    "openai_agents": ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"],
    "llama_index": ["chat", "tools", "structured", "completions", "async"],
    "openai_node": [
        "chat",
        "stream",
        "parse",
        "runTools",
        "functions",
        "allowed_tools",
        "responses",
        "responses.stream",
        "abort",
        "models",
    ],
    "ai_sdk": ["chat", "responses", "compatible", "completion"],
}


def command(client: str, scratch: Path) -> list[str]:
    """Return how a client's program is run, or skip where its environment is missing."""
    script = PROGRAMS / f"{client}.mjs"
    if script.exists():
        packages, node = ENVIRONMENTS / "node" / "node_modules", shutil.which("node")
        if node is None or not packages.is_dir():
            pytest.skip("no environment; scripts/clients makes it (and needs node, npm)")
        # Modules are looked for beside the program.
        (scratch / "node_modules").symlink_to(packages)
        return [node, shutil.copy(script, scratch)]
    python = ENVIRONMENTS / client.replace("_", "-") / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment; scripts/clients makes it")
    return [str(python), "-P", str(PROGRAMS / f"{client}.py")]  # one bears its library's name


@pytest.mark.parametrize("client", CLIENTS)
def test_client_works_as_it_is(client, url, tmp_path):
    """Every step of its program, in order."""
    environment = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "OPENAI_API_KEY": "none",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [*command(client, tmp_path), url],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    steps = [
        line.removeprefix("done ") for line in done.stdout.splitlines() if line.startswith("done ")
    ]
    assert (done.returncode, steps) == (0, CLIENTS[client]), done.stdout + done.stderr


def test_programs_are_all_run():
    """And every environment has one."""
    assert {path.stem for path in PROGRAMS.iterdir() if path.is_file()} == CLIENTS.keys()
    listed = {path.stem for path in (Path(__file__).parent / "environments").glob("*.txt")}
    assert listed == {name.replace("_", "-") for name in CLIENTS} - {"openai-node", "ai-sdk"}
