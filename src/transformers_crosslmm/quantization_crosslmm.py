"""Which modules a quantisation leaves as they are, unless it names some itself."""

import copy
from typing import Any

from transformers.quantizers import AutoQuantizationConfig

NOT_QUANTIZED = (r"(model\.)?vision_tower", r"(model\.)?multi_modal_projector", r".*\.cross_attention", "lm_head")
"""Patterns of names: encoder, projector, cross-attention and head are a small part of the weights, and everything that
the model knows of a video goes through the first three. (Gates and norms are no linear layers.)"""


def leave_vision_unquantized(quantization_config: Any) -> Any:
    """What `from_pretrained` was given, a config object or a dict or None, as a config that skips `NOT_QUANTIZED`.

    A config that names modules to skip is obeyed. The caller's own object is not changed.
    """
    if quantization_config is None:
        return None
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    else:
        quantization_config = copy.copy(quantization_config)
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):  # the latter is bitsandbytes'
        if vars(quantization_config).get(name, ()) is None:
            setattr(quantization_config, name, list(NOT_QUANTIZED))
    return quantization_config
