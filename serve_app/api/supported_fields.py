"""One table of every known request field: done, ignored because it changes nothing, or refused.

It holds the fields of OpenAI (each of its specification), vLLM and llama.cpp, with a rule for
each of the three endpoints:

* `DONE`: the request's schema reads it.
* `HINT`: it cannot change the answer here (a name for somebody's bookkeeping, advice to a
  scheduler, a feature that there is nothing of); ignored, with a line at debug level.
* `refused(...)`: it would change the answer and is not done here, so that the request is a 400
  that names it, instead of an answer to something else. It passes at its neutral values,
  because clients send defaults explicitly: null, false, what is empty, and those given.

A field in no row is unknown and ignored, as load tools and proxies send their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from serve_app.errors import InvalidRequest, UnsupportedParameter

MAX_FIELDS = 1024  # of a body; the table has fewer than 200


class _Rule(Enum):
    DONE = "done"
    HINT = "hint"


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that is not done here.

    Args:
        neutral: values at which it asks for nothing, beside null, false and what is empty.
        instead: what to do instead, as the end of a sentence.
    """

    neutral: tuple[object, ...] = ()
    instead: str = ""

    def permits(self, value: object) -> bool:
        """Return whether a value asks for nothing."""
        return value is None or value is False or value in ("", [], {}) or value in self.neutral


Rule: TypeAlias = _Rule | Refused
DONE, HINT = _Rule.DONE, _Rule.HINT
NO = Refused()


def refused(*neutral: object, instead: str = "") -> Refused:
    """Return the rule of a field that passes at these values alone."""
    return Refused(neutral, instead)


_CHAT_ONLY = refused(instead="it belongs to /v1/chat/completions")
_RESPONSE_ONLY = refused(instead="it belongs to /v1/responses")
_TEXT_FORMAT = refused(instead="use `text.format`")
_LARK = refused(instead="write the grammar in Lark's syntax as `guided_grammar`")
_PROBS = refused(0, instead="use `top_logprobs`")
_PARSED = Refused(neutral=(True,))
_TOKENS = refused(-1, instead="use `max_output_tokens`")

# A field's rule, or its rules in chat, completions and responses.
_TABLE: dict[str, Rule | tuple[Rule, Rule, Rule]] = {
    # What to answer, and how.
    "model": DONE,
    "messages": (DONE, _CHAT_ONLY, refused(instead="use `input`")),
    "prompt": (HINT, DONE, NO),  # a chat answers its messages
    "input": (_RESPONSE_ONLY, _RESPONSE_ONLY, DONE),
    "instructions": (_RESPONSE_ONLY, _RESPONSE_ONLY, DONE),
    "n": (DONE, DONE, refused(1)),
    "n_cmpl": refused(1, instead="use `n`"),
    "best_of": (DONE, DONE, refused(1)),
    "echo": (NO, DONE, NO),
    "suffix": NO,
    "stream": DONE,
    "stream_options": DONE,
    # How long.
    "max_tokens": (DONE, DONE, _TOKENS),
    "max_completion_tokens": (DONE, DONE, _TOKENS),
    "max_output_tokens": (_RESPONSE_ONLY, _RESPONSE_ONLY, DONE),
    "n_predict": (DONE, DONE, _TOKENS),
    "min_tokens": DONE,
    "stop": DONE,
    "stop_token_ids": DONE,
    "include_stop_str_in_output": DONE,
    "ignore_eos": DONE,
    "t_max_predict_ms": refused(0, -1),
    "n_indent": refused(0),
    "repetition_detection": NO,
    # Sampling.
    "temperature": DONE,
    "top_p": DONE,
    "top_k": DONE,
    "min_p": DONE,
    "seed": DONE,
    "frequency_penalty": DONE,
    "presence_penalty": DONE,
    "repetition_penalty": DONE,
    "logit_bias": DONE,
    "allowed_token_ids": NO,
    "bad_words": NO,
    "length_penalty": refused(1),
    "use_beam_search": NO,
    "logits_processors": NO,
    "watermarking": NO,
    "vllm_xargs": NO,
    "samplers": NO,
    "min_keep": refused(0),
    "typical_p": refused(1),
    "tfs_z": refused(1),
    "top_n_sigma": refused(-1, 0),
    "dynatemp_range": refused(0),
    "dynatemp_exponent": HINT,  # of the range above, as the next are of theirs
    "mirostat": refused(0),
    "mirostat_eta": HINT,
    "mirostat_tau": HINT,
    "xtc_probability": refused(0),
    "xtc_threshold": HINT,
    "dry_multiplier": refused(0),
    "dry_allowed_length": HINT,
    "dry_base": HINT,
    "dry_penalty_last_n": HINT,
    "dry_sequence_breakers": HINT,
    # llama.cpp's penalty sees the last tokens only, `repetition_penalty` all of them.
    "repeat_penalty": refused(1, instead="use `repetition_penalty`"),
    "repeat_last_n": refused(-1, 64),
    "lora": NO,
    # What the text must look like.
    "response_format": (DONE, DONE, _TEXT_FORMAT),
    "structured_outputs": DONE,
    "guided_choice": DONE,
    "guided_grammar": DONE,
    "guided_json": DONE,
    "guided_regex": DONE,
    "json_schema": (DONE, DONE, _TEXT_FORMAT),
    "regex": DONE,
    "grammar": _LARK,
    "ebnf": _LARK,
    "structural_tag": NO,
    "guided_whitespace_pattern": NO,
    "guided_decoding_backend": HINT,
    "text": (_RESPONSE_ONLY, _RESPONSE_ONLY, DONE),
    # Tools.
    "tools": (DONE, _CHAT_ONLY, DONE),
    "tool_choice": (DONE, refused("none", "auto", instead=_CHAT_ONLY.instead), DONE),
    "parallel_tool_calls": (DONE, HINT, DONE),
    "functions": (DONE, _CHAT_ONLY, refused(instead="use `tools`")),
    "function_call": (DONE, refused("none", "auto"), refused(instead="use `tool_choice`")),
    "parse_tool_calls": _PARSED,
    "max_tool_calls": HINT,  # of tools that OpenAI itself runs
    "web_search_options": NO,
    # Probabilities and ids.
    "logprobs": (DONE, DONE, refused(instead="use `include` and `top_logprobs`")),
    "top_logprobs": (DONE, refused(0, instead="use `logprobs`"), DONE),
    "prompt_logprobs": (NO, refused(instead="use `echo` with `logprobs`"), NO),
    "logprob_token_ids": NO,
    "n_probs": (_PROBS, refused(0, instead="use `logprobs`"), _PROBS),
    "post_sampling_probs": NO,
    "return_token_ids": (DONE, DONE, NO),
    "return_tokens": refused(instead="use `return_token_ids`"),
    "return_tokens_as_token_ids": NO,
    "return_prompt_text": NO,
    "return_token_offsets": HINT,  # vLLM's generation ignores it as well
    "response_fields": NO,
    # The prompt.
    "skip_special_tokens": DONE,
    "spaces_between_special_tokens": HINT,  # of tokenizers that are not served
    "add_special_tokens": (DONE, DONE, NO),
    "truncate_prompt_tokens": (DONE, DONE, NO),
    "truncation_side": refused("left"),
    "truncation": HINT,  # what does not fit is refused, never cut
    "add_generation_prompt": (DONE, HINT, DONE),
    "continue_final_message": (DONE, _CHAT_ONLY, DONE),
    "chat_template": (DONE, _CHAT_ONLY, NO),
    "chat_template_kwargs": (DONE, _CHAT_ONLY, DONE),
    "documents": NO,
    "prompt_embeds": NO,
    # Thinking.
    "enable_thinking": (DONE, HINT, DONE),
    "reasoning_effort": (DONE, HINT, refused("none", instead="use `reasoning.effort`")),
    "reasoning": (HINT, HINT, DONE),
    "thinking_token_budget": refused(-1),
    "include_reasoning": (DONE, HINT, DONE),
    "reasoning_format": (DONE, HINT, DONE),
    "separate_reasoning": (DONE, HINT, DONE),
    "stream_reasoning": HINT,  # when thoughts come, not what they are
    "verbosity": HINT,
    # Pictures and sound, of which there are none.
    "audio": NO,
    "modalities": refused(["text"]),
    "media_io_kwargs": HINT,
    "mm_processor_kwargs": HINT,
    "return_mm_kwargs": HINT,
    # What a service would have to remember.
    "include": (HINT, HINT, DONE),
    "store": HINT,  # nothing is kept, and a response says so
    "previous_response_id": (NO, NO, refused(instead="send the whole conversation as `input`")),
    "previous_input_messages": NO,
    "previous_response": NO,
    "conversation": (NO, NO, refused(instead="send the whole conversation as `input`")),
    "background": NO,
    "context_management": NO,
    "enable_response_messages": NO,
    # How the work is done, and for whom.
    "metadata": (HINT, HINT, DONE),
    "user": (HINT, HINT, DONE),
    "moderation": NO,
    "prediction": HINT,  # a guess makes an answer faster, not another one
    "service_tier": HINT,
    "priority": HINT,
    "safety_identifier": HINT,
    "prompt_cache_key": HINT,
    "prompt_cache_options": HINT,
    "prompt_cache_retention": HINT,
    "cache_salt": NO,  # a promise of isolation that is not kept here
    "cache_prompt": HINT,
    "id_slot": HINT,
    "slot_id": HINT,
    "n_cache_reuse": HINT,
    "n_discard": HINT,
    "n_keep": HINT,
    "kv_transfer_params": NO,
    "ec_transfer_params": NO,
    "request_id": HINT,
    "session_id": HINT,
    "routed_experts_prompt_start": HINT,
    "stream_interval": HINT,
    "sse_ping_interval": HINT,
    "timings_per_token": HINT,
    "return_progress": HINT,
}


@dataclass(frozen=True, slots=True)
class Fields:
    """The rules of one endpoint.

    Args:
        rules: of each known field.
    """

    rules: Mapping[str, Rule]

    @property
    def done(self) -> frozenset[str]:
        """Fields that the request's schema reads."""
        return frozenset(name for name, rule in self.rules.items() if rule is DONE)

    @property
    def hints(self) -> frozenset[str]:
        """Fields that cannot change an answer."""
        return frozenset(name for name, rule in self.rules.items() if rule is HINT)

    @property
    def refused(self) -> dict[str, tuple[object, ...]]:
        """Fields that are not done here, with the values at which they pass."""
        return {
            name: rule.neutral for name, rule in self.rules.items() if isinstance(rule, Refused)
        }

    def check(self, body: Mapping[str, Any]) -> list[str]:
        """Refuse the first field that asks for something that is not done here.

        Returns:
            The names of what was sent and changes nothing: hints and unknown fields, sorted.

        Raises:
            InvalidRequest: more fields than any API has.
            UnsupportedParameter: names the field.
        """
        if len(body) > MAX_FIELDS:
            raise InvalidRequest(f"the body has more than {MAX_FIELDS} fields")
        ignored = []
        for name, value in body.items():
            rule = self.rules.get(name, HINT)
            if isinstance(rule, Refused) and not rule.permits(value):
                instead = f"; {rule.instead}" if rule.instead else ""
                raise UnsupportedParameter(f"`{name}` is not supported here{instead}", param=name)
            if rule is HINT:
                ignored.append(name)
        return sorted(ignored)


CHAT, COMPLETION, RESPONSES = (
    Fields(
        {name: rule[place] if isinstance(rule, tuple) else rule for name, rule in _TABLE.items()}
    )
    for place in range(3)
)
