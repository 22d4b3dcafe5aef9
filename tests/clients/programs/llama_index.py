"""LlamaIndex OpenAILike: chat, stream, tools, structured output, completions, async."""

import asyncio
import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

OPTIONS = {"model": "tiny", "api_base": sys.argv[1], "api_key": "none", "max_retries": 0}
HI = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="hi")]


class City(BaseModel):
    """A city."""

    city: str
    count: int


def weather(city: str) -> str:
    """Return the weather of a city."""
    return f"12 C in {city}"


def done(name: str) -> None:
    print("done", name, flush=True)


chat = OpenAILike(**OPTIONS, is_chat_model=True, is_function_calling_model=True)
assert chat.chat(HI).message.content == "Hello from Bern."
assert "".join(part.delta or "" for part in chat.stream_chat(HI)) == "Hello from Bern."
done("chat")

tool = FunctionTool.from_defaults(fn=weather)
called = chat.chat_with_tools([tool], user_msg="weather?")
(call,) = chat.get_tool_calls_from_response(called)
assert call.tool_kwargs == {"city": "Bern"}, call
said = chat.predict_and_call([tool], "weather?")
assert "12 C in Bern" in str(said), said
done("tools")

found = chat.as_structured_llm(City).chat(HI)
assert found.raw == City(city="Bern", count=7), found
done("structured")

text = OpenAILike(**OPTIONS, is_chat_model=False)
assert text.complete("The capital is").text == " Bern."
assert "".join(part.delta or "" for part in text.stream_complete("The capital is")) == " Bern."
done("completions")

assert asyncio.run(chat.achat(HI)).message.content == "Hello from Bern."
done("async")
