"""The demo's chat template: the model's own, and it shows tools so that they are called."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from serve_app.api.tool_parser import CallArguments, CallBegun, ToolReader
from serve_app.config import ApiConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.text.conversation import ChatRenderer
from serve_app.protocol import ChatPrompt, SamplingParams
from tests.engine.conftest import run

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "configs" / "chat_template.jinja"


def function(name, description, **properties):
    schema = {"type": "object", "properties": {n: {"type": t} for n, t in properties.items()}}
    described = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": described}


WEATHER = function("get_weather", "Get the current weather in a city.", city="string")
ADD = function("add", "Add two numbers.", a="number", b="number")
CLOCK = function("get_time", "Get the current time in a time zone.", timezone="string")
EVERYTHING = function(
    "everything",
    "Take all kinds.",
    **{kind: kind for kind in ("string", "integer", "boolean", "array", "object", "null")},
)
CHATS = [
    [("user", "hi")],
    [("system", "be brief"), ("user", "hi"), ("assistant", " yes\n"), ("user", "so?")],
]


@pytest.fixture(scope="module")
def engine(demo_model_dir):
    """The demo model with its template."""
    config = ModelConfig(path=str(demo_model_dir), chat_template=str(TEMPLATE))
    settings = EngineConfig(max_context_tokens=4096)
    with closing(
        Engine.load(
            demo_model_dir, model=config, engine=settings, num_gpus=0, num_cpus=2, api=ApiConfig()
        )
    ) as running:
        yield running


def renderers(demo_model_dir):
    own, ours = (AutoTokenizer.from_pretrained(demo_model_dir) for _ in range(2))
    ours.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return ChatRenderer(own), ChatRenderer(ours)


@pytest.mark.parametrize("chat", CHATS)
def test_demo_template_without_tools_is_the_models_own(demo_model_dir, chat):
    """To the byte."""
    prompt = ChatPrompt(tuple({"role": role, "content": text} for role, text in chat))
    own, ours = renderers(demo_model_dir)
    assert ours.render(prompt) == own.render(prompt)


def test_demo_template_shows_tools(demo_model_dir):
    """The model's own does not, which is why there is another one."""
    own, ours = renderers(demo_model_dir)
    assert (own.shows_tools(), ours.shows_tools()) == (False, True)


@pytest.mark.parametrize("tool", [EVERYTHING, function("nothing", ""), WEATHER])
def test_demo_template_shows_calls_that_are_read_as_calls(demo_model_dir, tool):
    """Of any schema: the model repeats their form, and it has to be one that is read."""
    text = renderers(demo_model_dir)[1].render(
        ChatPrompt(({"role": "user", "content": "hi"},), tools=(tool,))
    )
    name = tool["function"]["name"]
    answers = [part.partition("<|im_end|>")[0] for part in text.split("assistant\n")[1:]]
    calls = [answer for answer in answers if answer.startswith("<tool_call>")]
    assert len(calls) == 3
    for call in calls:
        reader = ToolReader([name])
        begun, *arguments = reader.read(call) + reader.end()
        assert begun == CallBegun(name)
        given = json.loads("".join(part.text for part in arguments))
        assert set(given) == set(tool["function"]["parameters"]["properties"])


def test_demo_template_is_used_by_the_demo():
    """By its path from the repository's root, where the quickstart runs."""
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    model = config["applications"][0]["args"]["model"]
    assert ROOT / model["chat_template"] == TEMPLATE


@pytest.mark.parametrize(
    ("question", "tools", "name", "word"),
    [
        ("What is the weather in Paris?", [WEATHER], "get_weather", "Paris"),
        ("How is the weather in Berlin?", [WEATHER, ADD], "get_weather", "Berlin"),
        ("What is 12 plus 30?", [ADD], "add", "12"),
        ("What time is it in New York?", [CLOCK, WEATHER], "get_time", "New York"),
    ],
)
async def test_demo_model_calls_a_tool_at_first_try(engine, question, tools, name, word):
    """An agent's demo works with the smallest of models."""
    prompt = ChatPrompt(({"role": "user", "content": question},), tools=tuple(tools))
    text, *_ = await run(engine, prompt, SamplingParams(temperature=0, max_tokens=64))
    reader = ToolReader([tool["function"]["name"] for tool in tools])
    begun, *rest = reader.read(text) + reader.end()
    assert begun == CallBegun(name)
    assert all(isinstance(part, CallArguments) for part in rest)
    arguments = json.loads("".join(part.text for part in rest))
    assert set(arguments) == set(tools[0]["function"]["parameters"]["properties"])
    assert word in str(arguments)


async def test_demo_model_answers_a_result_in_words(engine):
    """And not by another call."""
    call = {"name": "get_weather", "arguments": {"city": "Paris"}}
    messages = (
        {"role": "user", "content": "What is the weather in Paris?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call00001", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call00001", "content": "18 degrees, sunny"},
    )
    prompt = ChatPrompt(messages, tools=(WEATHER,))
    text, *_ = await run(engine, prompt, SamplingParams(temperature=0, max_tokens=32))
    assert "18" in text
    assert "<tool_call>" not in text
