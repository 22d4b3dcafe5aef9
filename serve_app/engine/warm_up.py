"""One short generation before the first request: it must give numbers and text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

from serve_app.engine.sequence import Sequence, Update
from serve_app.engine.text.prompt import EncodedRequest, PromptEncoder
from serve_app.errors import ModelLoadError, RequestError
from serve_app.protocol import ChatPrompt, GenerationRequest, SamplingParams, TextPrompt

# Enough for one decode step; and for a text, where a model begins with tokens that have none.
TOKENS = (2, 8)
PROMPTS = (ChatPrompt(({"role": "user", "content": "Say hello."},)), TextPrompt("Hello"))


class Alone(Protocol):
    """A loop before its start."""

    def run_alone(self, sequence: Sequence) -> list[Update]:
        """Run one sequence to its end on the calling thread."""
        ...


def warm_up(loop: Alone, encoder: PromptEncoder, *, keys: Iterator[int], adapter: str = "") -> None:
    """Generate a few tokens on the calling thread, before the loop's own one starts.

    Args:
        loop: that computes them.
        encoder: of the model.
        keys: of sequences.
        adapter: that they are computed with; "" is none.

    Raises:
        ModelLoadError: NaN or infinite logits, an empty text, or a step that fails.
    """
    if not any(_says(loop, encoder, next(keys), adapter, tokens) for tokens in TOKENS):
        raise ModelLoadError("The model's first generation is an empty text.")


def _says(loop: Alone, encoder: PromptEncoder, key: int, adapter: str, tokens: int) -> bool:
    """Generate so many tokens; returns whether they are a text, where that is asked for."""
    encoded = _encode(encoder, tokens)
    sequence = Sequence(
        key=key,
        tokens=encoded.tokens,
        prompt_tokens=len(encoded.tokens),
        max_tokens=encoded.max_tokens,
        sampling=encoded.sampling,
        adapter=adapter,
    )
    what = f"The model with adapter {adapter}" if adapter else "The model"
    try:
        updates = loop.run_alone(sequence)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ModelLoadError(f"{what} fails its first step: {error}") from error
    if faults := [update.fault for update in updates if update.fault is not None]:
        raise ModelLoadError(f"{what} fails its first generation: {faults[0]}")
    if not all(math.isfinite(update.score.logprob) for update in updates if update.score):
        raise ModelLoadError(f"{what} fails its first generation: it computes no numbers (NaN).")
    if adapter:  # one that was made for labels, say, may have no words for this prompt
        return True
    return bool(encoder.decode([update.token for update in updates if update.token is not None]))


def _encode(encoder: PromptEncoder, tokens: int) -> EncodedRequest:
    """Encode the first prompt that the model can take: a base model has no chat template."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=0)
    for prompt in PROMPTS:
        request = GenerationRequest("warm-up", prompt, sampling)
        try:
            return encoder.encode_now(request)
        except RequestError as error:
            refusal = error
    raise ModelLoadError(f"The tokenizer cannot encode a greeting: {refusal}")
