"""openai-agents: run, tools, structure, stream and a second turn; chat and responses."""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from openai.types.shared import Reasoning
from pydantic import BaseModel

set_tracing_disabled(True)
CLIENT = AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)


class City(BaseModel):
    city: str
    count: int


@function_tool
def weather(city: str) -> str:
    """Return the weather of a city."""
    return f"12 C in {city}"


def done(name: str) -> None:
    print("done", name, flush=True)


async def main() -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model="tiny", openai_client=CLIENT)
        plain = Agent(name="a", instructions="Be brief.", model=model)
        first = await Runner.run(plain, "hi")
        assert first.final_output == "Hello from Bern."
        turn = [*first.to_input_list(), {"role": "user", "content": "again"}]
        assert (await Runner.run(plain, turn)).final_output == "Hello from Bern."

        looking = Agent(name="b", tools=[weather], model=model)
        said = await Runner.run(looking, "weather?")
        assert said.final_output == "The tool says 12 C in Bern.", said.final_output
        turn = [*said.to_input_list(), {"role": "user", "content": "and now?"}]
        assert "12 C" in (await Runner.run(looking, turn)).final_output

        found = await Runner.run(Agent(name="c", output_type=City, model=model), "Which city?")
        assert found.final_output == City(city="Bern", count=7)

        streamed = Runner.run_streamed(looking, "weather?")
        async for _ in streamed.stream_events():
            pass
        assert "12 C in Bern" in streamed.final_output

        settings = ModelSettings(
            top_logprobs=2, reasoning=Reasoning(effort="low"), verbosity="low", store=True
        )
        tuned = Agent(name="d", model=model, model_settings=settings)
        assert (await Runner.run(tuned, "hi")).final_output == "Hello from Bern."
        done(kind.__name__)


asyncio.run(main())
