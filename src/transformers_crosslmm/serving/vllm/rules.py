"""What vLLM may be asked for with a CrossLMM, and what it is told before it starts."""

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

ARCHITECTURE = "CrossLMMForConditionalGeneration"
CROSS_ATTENTION_OP = "crosslmm::cross_attention"

LANGUAGE_MODELS = ("qwen2", "qwen3", "llama", "mistral")
"""Types whose layers in vLLM call `post_attention_layernorm` with what self-attention gives and what to add it to."""


class CrossLMMRules(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Raises ValueError for language models and inputs that the plugin does not know."""
        text_type = model_config.hf_config.text_config.model_type
        if text_type not in LANGUAGE_MODELS:
            raise ValueError(
                f"In vLLM, `text_config.model_type` of a CrossLMM must be one of {', '.join(LANGUAGE_MODELS)}; got "
                f"{text_type!r}. Serve it with `crosslmm serve`."
            )
        from .media import serve_media_safely

        serve_media_safely(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises ValueError for settings under which answers would be wrong."""
        multimodal = vllm_config.model_config.multimodal_config
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        speculative, transfer = vllm_config.speculative_config, vllm_config.kv_transfer_config
        method = speculative.method if speculative else None
        own_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        refused = {
            "LoRA (`enable_lora`)": vllm_config.lora_config is not None,
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "context parallelism": parallel.decode_context_parallel_size > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "dual batch overlap (`enable_dbo`)": parallel.use_ubatching,
            f"`kv_cache_dtype={cache.cache_dtype!r}`": cache.cache_dtype not in ("auto", own_dtype),
            "KV transfer (`kv_transfer_config`)": transfer is not None,
            "encoder transfer (`ec_transfer_config`)": vllm_config.ec_transfer_config is not None,
            f"speculation by {method!r}": method not in (None, "ngram", "ngram_gpu", "suffix"),
            "encoded media (`enable_mm_embeds`)": bool(multimodal and multimodal.enable_mm_embeds),
            "embedded prompts (`enable_prompt_embeds`)": vllm_config.model_config.enable_prompt_embeds,
        }
        for setting, is_asked in refused.items():
            if is_asked:
                raise ValueError(f"A CrossLMM in vLLM does not work with {setting}. Leave it out.")
        # Cross-attention stays out of CUDA graphs, as self-attention does.
        compilation = vllm_config.compilation_config
        compilation._attention_ops = [*compilation._attention_ops, CROSS_ATTENTION_OP]
