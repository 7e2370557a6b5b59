"""CrossLMM in vLLM: the plugin's entry point, which vLLM's processes call at their start. See docs/vllm.md."""


def register() -> None:
    """Registers CrossLMM with vLLM, which calls this in each of its processes (entry point group
    `vllm.general_plugins`)."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import transformers_crosslmm  # noqa: F401  # registers config and processor with the Auto classes

    from .rules import ARCHITECTURE, CrossLMMRules

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:CrossLMMForVllm")
    MODELS_CONFIG_MAP[ARCHITECTURE] = CrossLMMRules
