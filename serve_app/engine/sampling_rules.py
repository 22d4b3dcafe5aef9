"""Which sampling parameters mean something: what no result could honour is refused."""

from __future__ import annotations

import math

from serve_app.errors import InvalidRequest
from serve_app.protocol import SamplingParams

MAX_LOGPROBS = 20  # as OpenAI has it


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Refuse parameters that no result could honour.

    Raises:
        InvalidRequest: names the parameter and its range.
    """
    rules = (
        ("max_tokens", params.max_tokens is None or params.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= params.temperature < math.inf, "a number, 0 or above"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("top_k", params.top_k >= 0, "0 (off) or above"),
        ("stop", all(params.stop), "strings of at least one character"),
        ("min_p", 0 <= params.min_p <= 1, "from 0 to 1"),
        ("frequency_penalty", math.isfinite(params.frequency_penalty), "a number"),
        ("presence_penalty", math.isfinite(params.presence_penalty), "a number"),
        ("repetition_penalty", 0.01 <= params.repetition_penalty <= 100, "from 0.01 to 100"),
        (
            "min_tokens",
            0 <= params.min_tokens <= (params.max_tokens or math.inf),
            "0 or above, and not above max_tokens",
        ),
        ("logprobs", 0 <= (params.logprobs or 0) <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        (
            "prompt_logprobs",
            0 <= (params.prompt_logprobs or 0) <= MAX_LOGPROBS,
            f"0 to {MAX_LOGPROBS}",
        ),
        (
            "logit_bias",
            all(0 <= token < vocab_size and math.isfinite(v) for token, v in params.logit_bias),
            f"numbers for token ids from 0 to {vocab_size - 1}",
        ),
        (
            "stop_token_ids",
            all(0 <= token < vocab_size for token in params.stop_token_ids),
            f"token ids from 0 to {vocab_size - 1}",
        ),
    )
    for name, holds, words in rules:
        if not holds:
            raise InvalidRequest(f"{name} must be {words}.", param=name)
