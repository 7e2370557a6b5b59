"""CrossLMM in vLLM: the entry point that vLLM's processes call when they start. See docs/vllm.md."""


def register() -> None:
    """Makes vLLM know CrossLMM checkpoints. Called by vLLM in each of its processes, through the entry point group
    `vllm.general_plugins`."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import transformers_crosslmm  # noqa: F401  # the Auto classes know its config and processor

    from .rules import ARCHITECTURE, CrossLMMRules

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:CrossLMMForVllm")
    MODELS_CONFIG_MAP[ARCHITECTURE] = CrossLMMRules
