"""Builds a config's network on the meta device, and maps tensor names on disk to names in the class.

For some encoders these differ: `from_pretrained` renames as it loads, `save_pretrained` renames back.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from ..configuration_crosslmm import CrossLMMConfig
from ..modeling_crosslmm import CrossLMMForConditionalGeneration


def network_of(config: CrossLMMConfig) -> CrossLMMForConditionalGeneration:
    """The network on the meta device. Raises ValueError if the cross-attention does not fit the language model."""
    with torch.device("meta"):
        return CrossLMMForConditionalGeneration(deepcopy(config))


def expected_shapes(config: CrossLMMConfig) -> dict[str, tuple[int, ...]]:
    """Names on disk and shapes of all tensors of a checkpoint with this config. Allocates nothing."""
    model = network_of(config)
    on_disk = revert_weight_conversion(model, model.state_dict())
    return {
        name: tuple(tensor.shape)
        for name, tensor in on_disk.items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }


def names_in_class(model: CrossLMMForConditionalGeneration) -> Callable[[str], str | None]:
    """A function from names on disk to names in the class, or None if loading merges or splits the tensor."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    def name_in_class(name: str) -> str | None:
        renamed, converted_by = rename_source_key(name, renamings, converters)
        return renamed if converted_by is None else None

    return name_in_class
