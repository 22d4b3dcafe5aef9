"""START HERE: the builtin engine, one engine thread below the front end of all engines."""

from __future__ import annotations

import time
from pathlib import Path

from serve_app.config import ApiConfig, EngineConfig, ModelConfig
from serve_app.engine.admission import Limits
from serve_app.engine.front_end import Deliver, Died, FrontEnd
from serve_app.engine.loop import EngineLoop
from serve_app.engine.model.build import assemble
from serve_app.engine.model.loading import load
from serve_app.engine.model.runner import Runner
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.stats import LoadReport, peak_rss_bytes
from serve_app.engine.text.prompt import PromptEncoder
from serve_app.engine.warm_up import warm_up


class Engine(FrontEnd[EngineLoop]):
    """Continues prompts with one model; made by `Engine.load`.

    Args:
        runner: the model and its cache.
        scheduler: sized for that cache.
        encoder: the model's rules for prompts.
        max_context_tokens: prompt and completion together.
        limits: what is taken on before `Overloaded`.
        step_timeout_s: a step that takes longer hangs; the engine is dead then.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        encoder: PromptEncoder,
        *,
        max_context_tokens: int,
        limits: Limits,
        step_timeout_s: float,
    ) -> None:
        def loop(deliver: Deliver, died: Died) -> EngineLoop:
            return EngineLoop(
                scheduler, runner, deliver=deliver, died=died, step_timeout_s=step_timeout_s
            )

        super().__init__(loop, encoder, max_context_tokens=max_context_tokens, limits=limits)

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        model: ModelConfig,
        engine: EngineConfig,
        num_gpus: float,
        num_cpus: float,
        api: ApiConfig,
    ) -> Engine:
        """Load a model directory, warm up and start; blocks for seconds to minutes.

        Args:
            model_dir: config, tokenizer and safetensors, as a Hub repository holds them.
            model: which dtype.
            engine: window, batch and cache.
            num_gpus: 0 computes on the CPU.
            num_cpus: threads of one step on the CPU.
            api: how much may wait before `Overloaded`.

        Raises:
            ModelLoadError: the files, the architecture, the device or the model's numbers are
                unusable; one sentence says which and what to do.
        """
        loaded = load(model_dir, model, num_gpus=num_gpus, num_cpus=num_cpus)
        peak_rss = {"load": peak_rss_bytes()}
        started = time.monotonic()
        assembly = assemble(loaded, engine, num_gpus=num_gpus)
        peak_rss["assemble"] = peak_rss_bytes()
        assemble_s = time.monotonic() - started
        runner = Runner(assembly.forward)
        self = cls(
            runner,
            Scheduler(
                kv_tokens=assembly.kv_tokens,
                max_batch_tokens=engine.max_batch_tokens,
                max_running_requests=engine.max_running_requests,
                prefill_chunk_tokens=assembly.prefill_chunk_tokens,
                prefix_cache=engine.prefix_cache,
                speculative_tokens=assembly.speculative_tokens,
            ),
            PromptEncoder(
                loaded.tokenizer,
                vocab_size=loaded.vocab_size,
                max_context_tokens=assembly.max_context_tokens,
                eos_token_ids=loaded.eos_token_ids,
                defaults=loaded.defaults if engine.generation_config == "auto" else {},
                reasoning=model.reasoning == "think",
                trust_templates=api.trust_request_chat_template,
            ),
            max_context_tokens=assembly.max_context_tokens,
            limits=Limits.of(engine, api),
            step_timeout_s=engine.step_timeout_s,
        )
        self.warn_of_template(model.source)
        started = time.monotonic()
        warm_up(self._loop, self._encoder, keys=self._keys)
        self.load_report = LoadReport(
            device=str(loaded.device),
            dtype=model.dtype,
            attention=assembly.attention,
            weights_bytes=loaded.weights_bytes,
            kv_bytes=assembly.kv_bytes,
            kv_tokens=assembly.kv_tokens,
            tokenizer_s=loaded.tokenizer_s,
            weights_s=loaded.weights_s,
            assemble_s=assemble_s - assembly.graphs_s,
            graphs_s=assembly.graphs_s,
            warm_up_s=time.monotonic() - started,
            peak_rss={**peak_rss, "warm_up": peak_rss_bytes()},
        )
        runner.leave_thread()
        self._loop.start()
        return self
