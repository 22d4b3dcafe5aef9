"""Chat templates that refuse what well-known ones refuse, in a few lines of their own.

Each keeps the conditions and the words of the model that it is named for; what it prints is as
short as can be.
"""

# ruff: noqa: E501 - a template's lines end where its text may

LLAMA_3 = """\
{%- set ns = namespace(tools=tools) -%}
{%- if messages and messages[0].role == 'system' -%}
<s>{{ messages[0].content | trim }}{% if tools %} {{ tools | tojson }}{% endif %}</s>
{%- set messages = messages[1:] -%}
{%- elif tools -%}
{%- if not messages -%}
{{ raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
{%- endif -%}
<s>{{ tools | tojson }}</s>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' or message.role == 'ipython' -%}
<r>{{ message.content | tojson }}</r>
{%- elif 'tool_calls' in message -%}
{%- if not message.tool_calls | length == 1 -%}
{{ raise_exception("This model only supports single tool-calls at once!") }}
{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
<c>{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}</c>
{%- else -%}
<{{ message.role }}>{{ message.content | trim }}</{{ message.role }}>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
"""

MISTRAL = """\
{{ '<s>' }}
{%- if messages[0]["role"] == "system" -%}
{%- set system = messages[0]["content"] -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- set ns = namespace(index=0) -%}
{%- for message in loop_messages -%}
{%- if message.role == "user" or (message.role == "assistant" and message.tool_calls is not defined) -%}
{%- if (message["role"] == "user") != (ns.index % 2 == 0) -%}
{{ raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
{%- endif -%}
{%- set ns.index = ns.index + 1 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in loop_messages -%}
{%- if message["role"] == "user" -%}
[INST]{% if loop.last and system is defined %}{{ system }} {% endif %}{{ message["content"] }}[/INST]
{%- elif message.tool_calls is defined and message.tool_calls -%}
[TOOL_CALLS]
{%- for call in message.tool_calls -%}
{%- if not call.id is defined or call.id | length != 9 -%}
{{ raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
{%- endif -%}
{{ call.function | tojson }}#{{ call.id }}
{%- endfor -%}
{%- elif message["role"] == "assistant" -%}
{{ message["content"] }}</s>
{%- elif message["role"] == "tool" -%}
{%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 -%}
{{ raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
{%- endif -%}
[TOOL_RESULTS]{{ message.content }}#{{ message.tool_call_id }}
{%- else -%}
{{ raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
{%- endif -%}
{%- endfor -%}
"""

GEMMA_2 = """\
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
<{{ message['role'] }}>{{ message['content'] | trim }}</>
{%- endfor -%}
{%- if add_generation_prompt -%}<model>{%- endif -%}
"""

GEMMA_3 = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set first = messages[0]['content'] + ' ' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
{%- endif -%}
<{{ message['role'] }}>{{ first if loop.first else '' }}{{ message['content'] | trim }}</>
{%- endfor -%}
{%- if add_generation_prompt -%}<model>{%- endif -%}
"""

QWEN_2 = """\
{%- if tools -%}<system>{{ messages[0].content if messages[0].role == 'system' }} {{ tools | tojson }}</>
{%- elif messages[0].role == 'system' -%}<system>{{ messages[0].content }}</>{%- endif -%}
{%- for message in messages -%}
{%- if message.role == "user" or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) -%}
<{{ message.role }}>{{ message.content }}</>
{%- elif message.role == "assistant" -%}
<assistant>{{ message.content }}{% for call in message.tool_calls %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>{% endfor %}</>
{%- elif message.role == "tool" -%}<user><tool_response>{{ message.content }}</tool_response></>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
"""

QWEN_3 = """\
{%- if not messages -%}{{ raise_exception('No messages provided.') }}{%- endif -%}
{%- if not messages | selectattr('role', 'equalto', 'user') | list -%}
{{ raise_exception('No user query found in messages.') }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- if not loop.first -%}{{ raise_exception('System message must be at the beginning.') }}{%- endif -%}
<system>{{ message.content }}</>
{%- elif message.role == 'assistant' -%}
<assistant>{% if message.reasoning_content is string %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<function={{ call.function.name }}>
{%- for name, value in call.function.arguments | items -%}<parameter={{ name }}>{{ value }}</parameter>{%- endfor -%}
</function>
{%- endfor -%}</>
{%- elif message.role in ('user', 'tool') -%}
<{{ message.role }}>{{ message.content }}</>
{%- else -%}
{{ raise_exception('Unexpected message role.') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{%- endif -%}
"""

DEEPSEEK = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' and 'tool_calls' in message -%}
{%- for call in message['tool_calls'] -%}
{{ '<call>' + call['type'] + ' ' + call['function']['name'] + ' ' + call['function']['arguments'] + '</call>' }}
{%- endfor -%}
{%- else -%}
{{ '<' + message['role'] + '>' + message['content'] + '</>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<assistant><think>\\n' }}{%- endif -%}
"""

TEMPLATES = {
    "llama-3": LLAMA_3,
    "mistral": MISTRAL,
    "gemma-2": GEMMA_2,
    "gemma-3": GEMMA_3,
    "qwen-2": QWEN_2,
    "qwen-3": QWEN_3,
    "deepseek": DEEPSEEK,
}
