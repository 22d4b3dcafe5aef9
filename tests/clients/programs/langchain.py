"""LangChain: invoke, stream, batch, tools, structured output in all methods, and responses."""

import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL = sys.argv[1]
OPTIONS = {"base_url": URL, "api_key": "none", "model": "tiny", "max_retries": 0}


class City(BaseModel):
    """A city."""

    city: str
    count: int


@tool
def weather(city: str) -> str:
    """Return the weather of a city."""
    return f"12 C in {city}"


def done(name: str) -> None:
    print("done", name, flush=True)


chat = ChatOpenAI(**OPTIONS)
answer = chat.invoke([SystemMessage("Be brief."), HumanMessage("hi")])
assert answer.content == "Hello from Bern.", answer
assert answer.usage_metadata["total_tokens"] > 0
done("invoke")

chunks = list(ChatOpenAI(**OPTIONS, stream_usage=True).stream("hi"))
assert "".join(chunk.content for chunk in chunks) == "Hello from Bern."
assert any(chunk.usage_metadata for chunk in chunks)
done("stream")

assert len(chat.batch(["a", "b"])) == 2
done("batch")

for choice in ("auto", "any", "weather"):
    bound = chat.bind_tools([weather], tool_choice=choice)
    called = bound.invoke("weather in Bern?")
    assert called.tool_calls[0]["args"] == {"city": "Bern"}, called
    result = weather.invoke(called.tool_calls[0])
    history = [HumanMessage("weather in Bern?"), called, result]
    assert isinstance(result, ToolMessage)
    said = chat.bind_tools([weather]).invoke(history)
    assert said.content == "The tool says 12 C in Bern.", said
    total = None
    for chunk in bound.stream("weather in Bern?"):
        total = chunk if total is None else total + chunk
    assert total.tool_calls[0]["args"] == {"city": "Bern"}, total
done("bind_tools")

for method in ("json_schema", "function_calling", "json_mode"):
    city = chat.with_structured_output(City, method=method).invoke("Which city? Answer in JSON.")
    assert city == City(city="Bern", count=7), (method, city)
done("with_structured_output")

history = [
    HumanMessage("a"),
    AIMessage("", tool_calls=[{"id": "x", "name": "weather", "args": {"city": "Bern"}}]),
    ToolMessage("12 C", tool_call_id="x"),
]
assert chat.invoke(history).content == "The tool says 12 C."
done("history")

many = ChatOpenAI(**OPTIONS, n=2, logprobs=True, top_logprobs=2).generate([[HumanMessage("hi")]])
assert len(many.generations[0]) == 2
assert many.generations[0][0].message.response_metadata["logprobs"]["content"]
done("n and logprobs")

assert OpenAI(**OPTIONS).invoke("The capital is") == " Bern."
done("completions")

responses = ChatOpenAI(**OPTIONS, use_responses_api=True)
first = responses.bind_tools([weather]).invoke("weather in Bern?")
result = weather.invoke(first.tool_calls[0])
said = responses.bind_tools([weather]).invoke([HumanMessage("weather in Bern?"), first, result])
assert said.text == "The tool says 12 C in Bern.", said
thinking = ChatOpenAI(**OPTIONS, use_responses_api=True, reasoning={"effort": "low"})
assert thinking.invoke("hi").text == "Hello from Bern."
assert "".join(chunk.text for chunk in responses.stream("hi")) == "Hello from Bern."
done("responses")

assert ChatOpenAI(**OPTIONS, reasoning_effort="low").invoke("hi").content == "Hello from Bern."
done("reasoning_effort")
