"""Modules that are not quantised by default."""

import copy
from typing import Any

from transformers.quantizers import AutoQuantizationConfig

NOT_QUANTIZED = (r"(model\.)?vision_tower", r"(model\.)?multi_modal_projector", r".*\.cross_attention", "lm_head")
"""Name patterns of encoder, projector, cross-attention and head: a small part of the weights, and the first three
carry all information about a video. (Gates and norms are not linear layers.)"""


def leave_vision_unquantized(quantization_config: Any) -> Any:
    """Copies a quantisation config (an object, a dict or None) and makes it skip `NOT_QUANTIZED`.

    A config that itself names modules to skip keeps them. The caller's object is not changed.
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
