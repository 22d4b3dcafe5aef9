"""Which request fields are honoured, which are labels, which are refused.

Every field of OpenAI's specification stands in exactly one of the three tables of its
endpoint. A refused field passes at its neutral values, because clients send defaults
explicitly; set to anything else it is a 400 that names it. The sampling extensions that
other servers made popular are refused in the same way instead of being ignored, because
ignoring them would change what a client gets. Everything else is unknown and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.errors import UnsupportedParameter

# Beyond OpenAI, in every endpoint that generates.
SAMPLING_EXTENSIONS = frozenset(
    {
        "top_k",
        "stop_token_ids",
        "ignore_eos",
        "min_p",
        "min_tokens",
        "repetition_penalty",
        "structured_outputs",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
    }
)
_SAMPLING = SAMPLING_EXTENSIONS | frozenset(
    {
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "n",
        "stream",
        "stream_options",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
    }
)

# Neutral values of what is not done, over the implied None.
_REFUSED_SAMPLING: dict[str, tuple[object, ...]] = {
    # beyond OpenAI
    "allowed_token_ids": (),
    "bad_words": ([],),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
}


@dataclass(frozen=True, slots=True)
class Fields:
    """The tables of one endpoint.

    Args:
        honoured: fields of the request's schema.
        labels: fields that ask for nothing: names and hints for somebody's own bookkeeping.
        refused: fields that are not done here, with the values at which they ask for nothing.
    """

    honoured: frozenset[str]
    labels: frozenset[str]
    refused: Mapping[str, tuple[object, ...]]

    def refuse_unsupported(self, body: Mapping[str, Any]) -> None:
        """Refuse the first field that asks for something that is not done here.

        Raises:
            UnsupportedParameter: names the field.
        """
        for name, neutral in self.refused.items():
            value = body.get(name)
            if value is not None and value not in neutral:
                raise UnsupportedParameter(f"`{name}` is not supported here", param=name)

    def unknown(self, body: Mapping[str, Any]) -> list[str]:
        """Return the names that stand in no table, sorted."""
        return sorted(set(body) - self.honoured - self.labels - set(self.refused))


CHAT = Fields(
    honoured=_SAMPLING
    | {
        "messages",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "response_format",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        # beyond OpenAI
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
    },
    labels=frozenset(
        {
            "metadata",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "user",
        }
    ),
    refused={
        **_REFUSED_SAMPLING,
        "audio": (),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    },
)

COMPLETION = Fields(
    honoured=_SAMPLING | {"prompt", "echo", "logprobs", "best_of"},
    labels=frozenset({"user"}),
    refused={
        **_REFUSED_SAMPLING,
        "suffix": ("",),
    },
)

RESPONSES = Fields(
    honoured=SAMPLING_EXTENSIONS
    | {
        "input",
        "instructions",
        "max_output_tokens",
        "metadata",
        "model",
        "parallel_tool_calls",
        "stream",
        "stream_options",
        "temperature",
        "text",
        "tool_choice",
        "tools",
        "top_p",
        "user",
    },
    labels=frozenset(
        {
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
        }
    ),
    refused={
        **_REFUSED_SAMPLING,
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    },
)
