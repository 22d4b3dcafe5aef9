"""A sequence to what vLLM samples by."""

from __future__ import annotations

from vllm import SamplingParams as VllmParams
from vllm.sampling_params import RequestOutputKind

from serve_app.engine.sequence import SamplingPlan
from serve_app.engine.vllm.structures import constraint_of


def params_of(plan: SamplingPlan, max_tokens: int) -> VllmParams:
    """Return vLLM's parameters of one completion.

    The plan's stop ids have the model's own among them where they count, so that vLLM's idea of
    an end is switched off; stop strings are the reader's. Without a seed of the client's rows of a
    batch are drawn together.

    Args:
        plan: with every default resolved.
        max_tokens: of the completion.

    Raises:
        ValueError: vLLM cannot do it; one of its own exceptions is the cause.
    """
    return VllmParams(
        max_tokens=max_tokens,
        temperature=plan.temperature,
        top_p=plan.top_p,
        top_k=plan.top_k,
        min_p=plan.min_p,
        seed=plan.seed % 2**63 if plan.is_seeded else None,
        frequency_penalty=plan.frequency_penalty,
        presence_penalty=plan.presence_penalty,
        repetition_penalty=plan.repetition_penalty,
        logit_bias=dict(plan.logit_bias) or None,
        min_tokens=plan.min_tokens,
        logprobs=plan.logprobs,
        prompt_logprobs=plan.prompt_logprobs,
        stop_token_ids=sorted(plan.stop_token_ids),
        ignore_eos=True,
        structured_outputs=None if plan.structure is None else constraint_of(plan.structure),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
