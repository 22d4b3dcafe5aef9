"""instructor: every mode that asks a service for a structure."""

import sys

import instructor
import openai
from pydantic import BaseModel

URL = sys.argv[1]
HI = [{"role": "user", "content": "Which city?"}]


class City(BaseModel):
    city: str
    count: int


def done(name: str) -> None:
    print("done", name, flush=True)


plain = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
MODES = ("FUNCTIONS", "TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "RESPONSES_TOOLS")
for mode in MODES:
    kind = getattr(instructor.Mode, mode, None)
    if kind is None:
        print("done", mode, "(gone)", flush=True)
        continue
    client = instructor.from_openai(plain, mode=kind)
    city = client.create(model="tiny", response_model=City, messages=HI, max_retries=0)
    assert (city.city, city.count) == ("Bern", 7), (mode, city)
    done(mode)

client = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
parts = list(client.create_partial(model="tiny", response_model=City, messages=HI))
assert parts[-1].city == "Bern"
done("partial")
