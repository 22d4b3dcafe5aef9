"""LiteLLM, as `openai/` and as `hosted_vllm/`: completion, stream, tools, schema, responses."""

import sys

import litellm
from pydantic import BaseModel

URL = sys.argv[1]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
HI = [{"role": "user", "content": "hi"}]


class City(BaseModel):
    city: str
    count: int


def done(name: str) -> None:
    print("done", name, flush=True)


for provider in ("openai", "hosted_vllm"):
    options = {"model": f"{provider}/tiny", "api_base": URL, "api_key": "none", "num_retries": 0}
    answer = litellm.completion(messages=HI, **options)
    assert answer.choices[0].message.content == "Hello from Bern."
    chunks = litellm.completion(
        messages=HI, stream=True, stream_options={"include_usage": True}, **options
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello from Bern."
    called = litellm.completion(messages=HI, tools=[TOOL], tool_choice="required", **options)
    call = called.choices[0].message.tool_calls[0]
    assert call.function.arguments == '{"city": "Bern"}', call
    result = {"role": "tool", "tool_call_id": call.id, "content": "12 C"}
    said = litellm.completion(
        messages=[*HI, called.choices[0].message, result], tools=[TOOL], **options
    )
    assert said.choices[0].message.content == "The tool says 12 C."
    form = litellm.completion(messages=HI, response_format=City, **options)
    assert City.model_validate_json(form.choices[0].message.content) == City(city="Bern", count=7)
    # A leftover of a stream, and hints that change nothing here.
    litellm.completion(messages=HI, stream_options={"include_usage": True}, **options)
    litellm.completion(messages=HI, reasoning_effort="low", **options)
    litellm.completion(messages=HI, service_tier="flex", store=True, **options)
    done(provider)

litellm.completion(
    messages=HI,
    model="hosted_vllm/tiny",
    api_base=URL,
    api_key="none",
    thinking={"type": "enabled", "budget_tokens": 1024},
)
done("thinking")

options = {"model": "openai/tiny", "api_base": URL, "api_key": "none"}
answer = litellm.responses(input="hi", **options)
assert answer.output[0].content[0].text == "Hello from Bern."
done("responses")

text = litellm.text_completion(prompt="The capital is", model="text-completion-openai/tiny",
                               api_base=URL, api_key="none")  # fmt: skip
assert text.choices[0].text == " Bern."
done("text_completion")

try:
    litellm.completion(messages=HI, **{**options, "model": "openai/another"}, num_retries=0)
except litellm.NotFoundError:
    done("not found")
