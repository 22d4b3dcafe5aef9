"""Conversations to text by the model's chat template, and what the template is like.

A conversation that the template refuses is brought into another form (`history.py`) and
rendered again; one that it takes is rendered as it came, to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from serve_app.engine.text import history
from serve_app.engine.text.chat_template import Budget, TemplateLimit, TemplateRefusal, render
from serve_app.errors import InvalidRequest, UnsupportedParameter
from serve_app.protocol import ChatPrompt

# Arguments of transformers' `apply_chat_template` that steer it, and what is given otherwise;
# the rest of `chat_template_kwargs` goes to the template.
RESERVED = frozenset({
    "conversation", "messages", "chat_template", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "tools",
})  # fmt: skip
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    },
}
PROBE = ChatPrompt(({"role": "user", "content": "Hello"},))


class ChatRenderer:
    """Renders conversations for one tokenizer.

    Args:
        tokenizer: transformers' tokenizer; its template and the texts of its special tokens.
        trust_templates: take a template that comes with a request.
    """

    def __init__(self, tokenizer: Any, *, trust_templates: bool = False) -> None:
        self._tokenizer = tokenizer
        self._trust_templates = trust_templates

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template at all."""
        return bool(self._tokenizer.chat_template)

    def render(self, prompt: ChatPrompt) -> str:
        """Return a conversation's text.

        Raises:
            InvalidRequest: there is no template, or it refuses each form of the conversation,
                with its own words about the first; or it takes too long.
            UnsupportedParameter: a template comes with the request and is not trusted.
        """
        source = self._source(prompt)
        if reserved := RESERVED & prompt.template_kwargs.keys():
            raise InvalidRequest(
                f"{min(reserved)} cannot be set for the chat template.",
                param="chat_template_kwargs",
            )
        variables = self._variables(prompt)
        if prompt.continue_final_message and variables["add_generation_prompt"]:
            raise InvalidRequest(
                "continue_final_message cannot be combined with add_generation_prompt.",
                param="continue_final_message",
            )
        return _render_some_form(source, prompt, variables)

    def shows_tools(self) -> bool:
        """Return whether the template shows a request's tools to the model."""
        try:
            without = self.render(PROBE)
            with_tool = self.render(ChatPrompt(PROBE.messages, tools=(PROBE_TOOL,)))
        except InvalidRequest:
            return False
        return with_tool != without

    def _source(self, prompt: ChatPrompt) -> str:
        if not prompt.messages:
            raise InvalidRequest("The conversation is empty.", param="messages")
        if prompt.chat_template is not None:
            if not self._trust_templates:
                raise UnsupportedParameter(
                    "`chat_template` is refused: a template is a program. Set "
                    "api.trust_request_chat_template in the service's config to run it, or "
                    "model.chat_template to replace the model's for all requests.",
                    param="chat_template",
                )
            return prompt.chat_template
        template = self._tokenizer.chat_template
        if isinstance(template, Mapping):  # several, by name
            names = ("tool_use", "default") if prompt.tools else ("default",)
            template = next((template[name] for name in names if name in template), None)
        if not template:
            raise InvalidRequest(
                "This model has no chat template; use /v1/completions instead.", param="messages"
            )
        return str(template)

    def _variables(self, prompt: ChatPrompt) -> dict[str, Any]:
        return {
            **self._tokenizer.special_tokens_map,
            "documents": None,
            "add_generation_prompt": not prompt.continue_final_message,
            **prompt.template_kwargs,
            "tools": list(prompt.tools) or None,
        }


def _render_some_form(source: str, prompt: ChatPrompt, variables: Mapping[str, Any]) -> str:
    budget = Budget()
    first: TemplateRefusal | None = None
    for messages in chain([list(prompt.messages)], history.forms(prompt.messages)):
        try:
            return render(
                source,
                messages,
                variables,
                continue_final=prompt.continue_final_message,
                budget=budget,
            )
        except TemplateLimit as error:
            raise InvalidRequest(f"Too much: {error}.", param="messages") from error
        except TemplateRefusal as error:
            first = first or error
    raise InvalidRequest(
        f"The model's chat template refuses this conversation: {first}", param="messages"
    ) from first
