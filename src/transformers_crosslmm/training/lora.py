"""Adapters: what LoRA adapts in a CrossLMM, and what is trained whole and saved beside it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_TARGETS = r"(.*\.)?language_model\.layers\..+_proj"
"""Full names of the layers that get an adapter: every projection of Qwen2, of V2V and of T2V, none of the encoder."""

SAVED_WHOLE = ("v2v.gate", "t2v.gate", "multi_modal_projector")
"""Ends of the names of modules that are trained themselves: a gate is one number, the projector is what is new."""


def crosslmm_lora_config(**overrides: Any) -> "LoraConfig":
    """PEFT's `LoraConfig` for a CrossLMM.

    Adapters on every linear layer of the language model, its cross-attention included; the gates and the projector are
    trained and saved as they are; the vision tower stays what it was. Everything else is PEFT's default.

    overrides: fields of `LoraConfig` that are to differ, such as `r` and `lora_alpha`, or these two.
    Raises ImportError without PEFT.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('LoRA needs PEFT: `pip install -e ".[train]"` in your clone.') from error
    return LoraConfig(**{"target_modules": LORA_TARGETS, "modules_to_save": list(SAVED_WHOLE), **overrides})
