"""The forms in which models write tool calls; `api/tool_parser.py` reads a text with them.

buffer.py        text as it comes, and ways to read it that wait for more
json_calls.py    {"name": "f", "parameters": {…}}, or a list    Llama 3, Hermes, what is enforced
named_json.py    f{…}, f[ARGS]{…}                               Mistral
pythonic.py      [f(city="Paris")], f(city="Paris")             Llama 3.2 and 4
function_tag.py  <function=f>{…}</function>, <parameter=city>…  Llama 3.1, Qwen3-Coder
table.py         every form, and the tags around them; a new one is a module and a row there
"""
