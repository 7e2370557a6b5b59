"""LoRA for a CrossLMM: which layers get adapters, and which modules are trained and saved whole."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_TARGETS = r"(.*\.)?language_model\.layers\..+_proj"
"""Pattern of the layers with an adapter: every projection of the language model, V2V and T2V; none of the encoder."""

SAVED_WHOLE = ("v2v.gate", "t2v.gate", "multi_modal_projector")
"""Name endings of modules that are trained whole: a gate is a single number, and the projector starts untrained."""


def crosslmm_lora_config(**overrides: Any) -> "LoraConfig":
    """PEFT's `LoraConfig` for a CrossLMM.

    Every linear layer of the language model and its cross-attention gets an adapter. Gates and projector are trained
    and saved whole, the vision tower is frozen, everything else is PEFT's default.

    overrides: fields of `LoraConfig`, such as `r` and `lora_alpha`. Raises ImportError without PEFT.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('LoRA needs PEFT: `pip install -e ".[train]"` in your clone.') from error
    return LoraConfig(**{"target_modules": LORA_TARGETS, "modules_to_save": list(SAVED_WHOLE), **overrides})
