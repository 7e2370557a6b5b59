"""Counts a checkpoint's parameters and its memory per frame from its config; no weights are loaded.

Shapes: T frames, N patches per frame, D vision width, G key/value heads, E head width.
"""

import os

import torch
from torch import nn
from transformers import AutoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from ..configuration_crosslmm import CROSS_ATTENTION_CACHES, CrossLMMConfig
from ..quantization_crosslmm import NOT_QUANTIZED
from .costs import CheckpointCosts
from .network import network_of

QUANTIZATIONS = {"nf4": (0.5 + 4 / 64, 0), "int8": (1.0, 4), "fp8": (1.0, 4)}
"""Bytes per weight, and additional bytes per matrix row. Scales are float32: one per row, or in nf4 per 64 weights."""


def load_config(name: str | os.PathLike) -> CrossLMMConfig:
    """The config of a folder or of a model on the Hub.

    Raises OSError if there is no such checkpoint, ValueError if it is another model's.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # a field of another type raises any class, such as ZeroDivisionError for a 0
        if os.path.isdir(name):
            raise ValueError(
                f"{os.fspath(name)!r} must be a CrossLMM checkpoint; this folder's config.json is missing or broken: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        raise OSError(
            f"A model must be a checkpoint folder or a name on the Hub; {os.fspath(name)!r} is not a folder, and "
            "the Hub has no such model or cannot be reached. Check the name, the connection and, for a private model, "
            "your token."
        ) from error
    if not isinstance(config, CrossLMMConfig):
        raise ValueError(f"{os.fspath(name)!r} must be a CrossLMM checkpoint; got a {config.model_type!r}.")
    return config


def count_costs(
    config: CrossLMMConfig, *, quantization: str | None = None, timestamp_tokens: int = 0
) -> CheckpointCosts:
    """Builds the network on the meta device and counts.

    timestamp_tokens: tokens of the time before each frame, where `add_timestamps` writes one.
    quantization: one of `QUANTIZATIONS`, for all linear layers except `NOT_QUANTIZED`.
    """
    text = config.text_config
    tokens_per_frame = config.tokens_per_frame + timestamp_tokens
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    model = network_of(config)
    parts = dict.fromkeys(
        ("vision tower", "projector", "language model", "V2V cross-attention", "T2V cross-attention", "head"), 0
    )
    num_gates = 0
    for name, parameter in model.named_parameters():
        parts[_part_of(name)] += parameter.numel()
        num_gates += parameter.numel() * name.endswith("2v.gate.weight")
    size = dtype.itemsize
    saved_bytes = 0.0
    per_weight, per_row = QUANTIZATIONS[quantization] if quantization else (size, 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and should_convert_module(name, list(NOT_QUANTIZED)):
            saved_bytes += module.weight.numel() * (size - per_weight) - module.out_features * per_row
    key_value = 2 * config.num_key_value_heads * config.head_dim * size
    num_patches, num_layers = config.patch_grid_size**2, len(config.cross_attention_layer_indices)
    original = num_patches * config.vision_config.hidden_size * size
    keys_values = num_layers * num_patches * key_value if config.use_t2v else 0
    normalised = 0 if config.visual_norm == "none" else original
    return CheckpointCosts(
        dtype=str(dtype).removeprefix("torch."),
        parts=parts,
        weight_bytes=sum(parts.values()) * size + num_gates * (torch.float32.itemsize - size) - round(saved_bytes),
        tokens_per_frame=tokens_per_frame,
        max_positions=config.max_sequence_length,
        cache_bytes_per_frame=dict(zip(CROSS_ATTENTION_CACHES, (keys_values, original), strict=True)),
        language_bytes_per_frame=tokens_per_frame * text.num_hidden_layers * key_value,
        prefill_bytes_per_frame=dict(zip(CROSS_ATTENTION_CACHES, (original + normalised, 0), strict=True)),
    )


def _part_of(name: str) -> str:
    """The part that a parameter belongs to; norms before the branches are counted with the language model."""
    for mark, part in (
        ("vision_tower.", "vision tower"),
        ("multi_modal_projector.", "projector"),
        (".v2v.", "V2V cross-attention"),
        (".t2v.", "T2V cross-attention"),
        ("lm_head.", "head"),
    ):
        if mark in name:
            return part
    return "language model"


__all__ = ["count_costs", "load_config"]
