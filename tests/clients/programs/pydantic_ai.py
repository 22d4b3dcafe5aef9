"""pydantic-ai: an agent with tools, all ways of output, stream, history; chat and responses."""

import asyncio
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=sys.argv[1], api_key="none")


class City(BaseModel):
    city: str
    count: int


def done(name: str) -> None:
    print("done", name, flush=True)


async def main() -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind("tiny", provider=PROVIDER)
        agent = Agent(model, instructions="Be brief.")
        first = await agent.run("hi")
        assert first.output == "Hello from Bern."
        again = await agent.run("hi", message_history=first.all_messages())
        assert again.output == "Hello from Bern."
        thinking = await agent.run("hi", model_settings={"openai_reasoning_effort": "low"})
        assert thinking.output == "Hello from Bern."

        looking = Agent(model)

        @looking.tool_plain
        def weather(city: str) -> str:
            """Return the weather of a city."""
            return f"12 C in {city}"

        said = await looking.run("weather?")
        assert said.output == "The tool says 12 C in Bern.", said.output
        again = await looking.run("and now?", message_history=said.all_messages())
        assert "12 C" in again.output

        for output in (City, ToolOutput(City), NativeOutput(City)):
            found = await Agent(model, output_type=output).run("Which city?")
            assert found.output == City(city="Bern", count=7), output

        async with agent.run_stream("hi") as stream:
            assert await stream.get_output() == "Hello from Bern."
        done(kind.__name__)


asyncio.run(main())
