"""Checks vLLM's settings for a CrossLMM, and sets its own before vLLM starts."""

from vllm.config import CompilationConfig, ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

ARCHITECTURE = "CrossLMMForConditionalGeneration"
CROSS_ATTENTION_OP = "crosslmm::cross_attention"

LANGUAGE_MODELS = ("qwen2", "qwen3", "llama", "mistral")
"""Types whose layers in vLLM call `post_attention_layernorm` with self-attention's output and the residual."""


class CrossLMMRules(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Raises ValueError for unsupported language models, and sets up the package's reading of media."""
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
        """Raises ValueError for settings that would give wrong answers."""
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
        # vLLM would ignore these, because the encoder is the package's.
        for option in ("mm_encoder_attn_backend", "mm_encoder_attn_dtype", "mm_encoder_only", "video_pruning_rate"):
            refused[f"`{option}`"] = bool(getattr(multimodal, option, None))
        for setting, is_asked in refused.items():
            if is_asked:
                raise ValueError(f"A CrossLMM in vLLM does not work with {setting}. Leave it out.")
        CrossLMMRules.keep_out_of_graphs(vllm_config.compilation_config)

    @staticmethod
    def keep_out_of_graphs(compilation: CompilationConfig) -> None:
        """Makes vLLM split its CUDA graphs at the cross-attention, as at self-attention (`splitting_ops`)."""
        compilation._attention_ops = [*compilation._attention_ops, CROSS_ATTENTION_OP]  # type: ignore[misc]
