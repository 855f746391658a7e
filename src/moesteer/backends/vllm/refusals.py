"""What a steered engine does not do: features of vLLM that would go round the routers, or that no test here covers.

Each is refused when the engine starts, with the reason; nothing is switched off behind the operator's back.
"""

from __future__ import annotations

from typing import Any

from moesteer.backends.vllm.settings import Settings
from moesteer.errors import InputError


def require_steerable_engine(config: Any, settings: Settings) -> None:
    """Raise InputError for an engine (a VllmConfig) whose features a mask could not be trusted with."""
    for found, reason, do in _findings(config, settings):
        if found:
            raise InputError(
                f"a steered engine does not do this: {reason}",
                where="the engine's settings",
                expected="features of vLLM with which every token meets its own mask (docs/serving.md lists them)",
                do=do,
            )


def _findings(config: Any, settings: Settings) -> list[tuple[bool, str, str]]:
    parallel, model, speculative = config.parallel_config, config.model_config, config.speculative_config
    allowed = set(settings.untested)
    untested = "leave it out, or name {!r} in the settings' `untested` and test your deployment yourself"
    method = str(getattr(speculative, "method", "") or "")
    drafts = speculative is not None and "ngram" not in method
    return [
        (bool(config.use_v2_model_runner), "vLLM's V2 model runner, which needs Triton and is not tested here",
         "set VLLM_USE_V2_MODEL_RUNNER=0 (`moesteer serve` does)"),
        (config.kv_transfer_config is not None, "a KV connector: caches outside the engine do not know of masks",
         "leave out --kv-transfer-config"),
        (getattr(config, "ec_transfer_config", None) is not None, "an encoder-cache connector", "leave it out"),
        (bool(getattr(model, "enable_return_routed_experts", False)) and settings.capture is not None,
         "vLLM's own record of routed experts beside ours", "use one of the two"),
        (getattr(model, "runner_type", "generate") != "generate", "a pooling model: there is no answer to steer",
         "serve it unsteered"),
        (bool(getattr(model, "enable_prompt_embeds", False)), "prompts given as embeddings: no gate can read them",
         "leave out --enable-prompt-embeds"),
        (bool(getattr(model, "enable_sleep_mode", False)), "sleep mode: tables would be thrown away with the weights",
         "leave out --enable-sleep-mode"),
        (parallel.data_parallel_size > 1 and "data-parallel" not in allowed, "data parallelism is not tested here",
         untested.format("data-parallel")),
        (bool(parallel.enable_expert_parallel) and "expert-parallel" not in allowed,
         "expert parallelism is not tested here", untested.format("expert-parallel")),
        (bool(getattr(parallel, "use_sequence_parallel_moe", False)),
         "sequence-parallel MoE: a rank sees a part of the tokens", "set tensor parallelism without it"),
        (bool(parallel.enable_eplb), "expert load balancing moves experts while it runs", "leave out --enable-eplb"),
        (bool(getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False)),
         "dual batch overlap and micro-batches split a step", "leave out --enable-dbo and --ubatch-size"),
        (bool(getattr(getattr(config, "cache_config", None), "kv_sharing_fast_prefill", False)),
         "fast prefill runs later layers on some of the tokens only", "leave out --kv-sharing-fast-prefill"),
        (int(getattr(parallel, "prefill_context_parallel_size", 1) or 1) > 1,
         "prefill context parallelism: a rank sees a part of the tokens", "leave it out"),
        (config.lora_config is not None, "LoRA adapters: a mask is made for one set of weights",
         "merge the adapter into the model, and make the mask on that"),
        (drafts and "draft-model" not in allowed, f"a draft model ({method}) is not tested here",
         untested.format("draft-model") + "; n-gram drafts are tested"),
    ]  # fmt: skip
