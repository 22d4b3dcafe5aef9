"""START HERE: vLLM as an engine, below the front end of all engines.

What differs from the builtin one is in configs/README.md, and pinned by the conformance tests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig
from vllm import AsyncEngineArgs
from vllm.exceptions import VLLMClientError

from serve_app.checkpoint.directory import Checkpoint
from serve_app.checkpoint.runnable import Loader
from serve_app.config import TOKEN_VARIABLES, ApiConfig, EngineConfig, ModelConfig
from serve_app.engine.admission import Limits
from serve_app.engine.defaults import read_defaults
from serve_app.engine.front_end import Deliver, Died, FrontEnd
from serve_app.engine.grammar.matcher import Worker
from serve_app.engine.model.loading import (
    check_files,
    eos_token_ids,
    in_one_sentence,
    load_tokenizer,
    model_window,
)
from serve_app.engine.stats import LoadReport, peak_rss_bytes
from serve_app.engine.text.prompt import EncodedRequest, PromptEncoder
from serve_app.engine.text.reasoning import CLOSE, OPEN
from serve_app.engine.vllm.adapters import Loras, read_adapters
from serve_app.engine.vllm.arguments import engine_arguments
from serve_app.engine.vllm.environment import for_children
from serve_app.engine.vllm.loop import VllmLoop
from serve_app.engine.vllm.requests import params_of
from serve_app.engine.vllm.structures import constraint_of
from serve_app.engine.warm_up import warm_up
from serve_app.errors import InvalidRequest
from serve_app.protocol import Structure
from serve_app.redaction import sanitise


@dataclass(frozen=True, slots=True)
class _Files:
    """What the files say, before vLLM reads the weights."""

    text: Any  # transformers' config of the language model
    tokenizer: Any
    window: int
    eos_token_ids: frozenset[int]
    checkpoint: Checkpoint
    tokenizer_s: float


class VllmEngine(FrontEnd[VllmLoop]):
    """Continues prompts with vLLM; made by `VllmEngine.load`.

    Args:
        arguments: of vLLM, whose processes start here.
        encoder: the model's rules for prompts.
        max_context_tokens: prompt and completion together.
        limits: what is taken on before `Overloaded`.
        step_timeout_s: a step that takes longer hangs; the engine is dead then.
        loras: the adapters that requests may name.
    """

    def __init__(
        self,
        arguments: AsyncEngineArgs,
        encoder: PromptEncoder,
        *,
        max_context_tokens: int,
        limits: Limits,
        step_timeout_s: float,
        loras: Loras,
    ) -> None:
        def loop(deliver: Deliver, died: Died) -> VllmLoop:
            return VllmLoop(
                arguments,
                deliver=deliver,
                died=died,
                fail=self._fail,
                step_timeout_s=step_timeout_s,
                loras=loras,
            )

        super().__init__(loop, encoder, max_context_tokens=max_context_tokens, limits=limits)

    @classmethod
    def load(  # noqa: PLR0913 - the parts of the config, by keyword
        cls,
        model_dir: Path,
        *,
        model: ModelConfig,
        engine: EngineConfig,
        num_gpus: float,
        num_cpus: float,
        api: ApiConfig,
        adapters: Mapping[str, Path],
    ) -> VllmEngine:
        """Start vLLM over a model directory and warm up; blocks for seconds to minutes.

        Args:
            model_dir: config, tokenizer and safetensors, as a Hub repository holds them.
            model: which dtype.
            engine: window, batch and cache, and vLLM's own arguments.
            num_gpus: N is tensor parallel N; 0 computes on the CPU.
            num_cpus: threads of one step on the CPU.
            api: how much may wait before `Overloaded`.
            adapters: directories of LoRA adapters by name.

        Raises:
            ConfigError: `engine.vllm` has a name or a value that vLLM does not take.
            ModelLoadError: the files or the model's answers are unusable, or vLLM cannot load
                the model; one sentence says which.
        """
        files = _read(model_dir, model, engine, num_gpus)
        loras = read_adapters(adapters, files.checkpoint)
        peak_rss = {"load": peak_rss_bytes()}
        thinks = model.reasoning == "think"
        arguments = engine_arguments(
            model_dir,
            model,
            engine,
            num_gpus=num_gpus,
            window=files.window,
            splits_thoughts=thinks and {OPEN, CLOSE} <= set(files.tokenizer.get_vocab()),
            loras=loras,
        )
        encoder = PromptEncoder(
            files.tokenizer,
            vocab_size=files.text.vocab_size,
            max_context_tokens=files.window,
            eos_token_ids=files.eos_token_ids,
            defaults=read_defaults(model_dir) if engine.generation_config == "auto" else {},
            reasoning=thinks,
            trust_templates=api.trust_request_chat_template,
        )
        more = {"OMP_NUM_THREADS": str(max(1, int(num_cpus)))}
        if engine.deterministic:
            more["VLLM_BATCH_INVARIANT"] = "1"
        started = time.monotonic()
        with in_one_sentence("The model"), for_children(more, without=TOKEN_VARIABLES):
            self = cls(
                arguments,
                encoder,
                max_context_tokens=files.window,
                limits=Limits.of(engine, api),
                step_timeout_s=engine.step_timeout_s,
                loras=loras,
            )
        weights_s = time.monotonic() - started
        peak_rss["assemble"] = peak_rss_bytes()
        self.warn_of_template(model.source)
        self.adapters = frozenset(loras.names)
        started = time.monotonic()
        try:
            for name in ("", *loras.names):
                warm_up(self._loop, encoder, keys=self._keys, adapter=name)
        except BaseException:
            self.close()
            raise
        config = self._loop.llm.model_config
        self.load_report = LoadReport(
            device="cuda:0" if num_gpus else "cpu",
            dtype=str(config.dtype).removeprefix("torch."),
            attention="vllm",
            weights_bytes=files.checkpoint.weights_bytes(),
            kv_bytes=self._loop.kv_tokens * _bytes_per_token(config),
            kv_tokens=self._loop.kv_tokens,
            tokenizer_s=files.tokenizer_s,
            weights_s=weights_s,
            assemble_s=0.0,
            graphs_s=0.0,
            warm_up_s=time.monotonic() - started,
            peak_rss={**peak_rss, "warm_up": peak_rss_bytes()},
        )
        self._loop.start()
        return self

    async def _compile(self, structure: Structure, client: str) -> Worker | None:
        """Compile a structure where its cost hurts nobody; only what passes is given to vLLM."""
        await super()._compile(structure, client)
        try:
            await asyncio.to_thread(constraint_of, structure)
        except (ValueError, VLLMClientError) as error:
            words = f"The structure cannot be enforced: {error}."
            raise InvalidRequest(words, param="structure") from None
        return None

    def _check(self, encoded: EncodedRequest) -> None:
        """Refuse parameters that vLLM does not take; structures are looked at elsewhere."""
        try:
            params_of(replace(encoded.sampling, structure=None), encoded.max_tokens)
        except VLLMClientError as error:
            words = sanitise(str(error))
            param = getattr(error, "parameter", None)
            raise InvalidRequest(f"The engine does not take it: {words}", param=param) from None


def _read(model_dir: Path, model: ModelConfig, engine: EngineConfig, num_gpus: float) -> _Files:
    """Look at the files as the builtin engine does, but for the weights.

    Raises:
        ModelLoadError: one of them is missing, damaged or too large.
    """
    started = time.monotonic()
    checkpoint = check_files(
        model_dir, Loader(backend="vllm", dtype=model.dtype, num_gpus=num_gpus)
    )
    with in_one_sentence("The model"):
        config = AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    text = config.get_text_config()
    tokenizer = load_tokenizer(model_dir, model)
    try:
        generation = GenerationConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError):
        generation = None
    return _Files(
        text=text,
        tokenizer=tokenizer,
        window=min(engine.max_context_tokens, model_window(config)),
        eos_token_ids=eos_token_ids((generation, text, tokenizer), tokenizer, text.vocab_size),
        checkpoint=checkpoint,
        tokenizer_s=time.monotonic() - started,
    )


def _bytes_per_token(config: Any) -> int:
    """Return about how many bytes of KV cache a token takes, over all GPUs."""
    text = config.hf_text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * config.get_head_size() * config.dtype.itemsize)
