"""Composes an untrained CrossLMM from a vision encoder and a language model."""

import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ..configuration_crosslmm import FLAVOURS, PRESETS, VISION_TYPES, YARN_131072, CrossLMMConfig
from ..processing_crosslmm import IMAGE_TOKEN, VIDEO_TOKEN
from .chat import add_marks, find_tokenizer, media_template
from .conversion import Conversion, ConversionError, renamed_tensors
from .folder import StoredTensor, find_folder, read_json, stored_tensors
from .name_tables import BACKBONES, TEXT, VISION
from .new_weights import EMBEDDINGS, with_new_rows, with_new_weights

TOP_FIELDS = {f.name for f in fields(CrossLMMConfig)} - {f.name for f in fields(PreTrainedConfig)}
TOP_FIELDS -= {"vision_config", "text_config", "tie_word_embeddings", "untrained", "weight_layout"}
CONFIG_FIELDS = sorted(TOP_FIELDS | {"rope_parameters", "max_position_embeddings"})
"""Config fields that a user can set; all others follow from the weights."""

BICUBIC = 3
OF_IMAGENET = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD, "resample": BICUBIC}
IMAGE_STATISTICS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(VISION_TYPES, OF_IMAGENET),
    "siglip_vision_model": {
        "image_mean": IMAGENET_STANDARD_MEAN,
        "image_std": IMAGENET_STANDARD_STD,
        "resample": BICUBIC,
    },
    "clip_vision_model": {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD, "resample": BICUBIC},
}
"""Normalisation and resampling by kind of encoder, for folders without an image processor."""


def compose(
    vision: str | os.PathLike | None = None,
    text: str | os.PathLike | None = None,
    *,
    preset: str | None = None,
    flavour: str = "paper",
    long_context: bool = False,
    tokenizer: str | os.PathLike | None = None,
    dtype: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Conversion:
    """Plans an untrained CrossLMM. Its gates are 0, so its answers are the language model's own.

    vision: a SigLIP, SigLIP2 (fixed resolution), CLIP, DINOv2 or DINOv3 ViT. text: a decoder of Transformers that the
    cross-attention fits into. Both are folders or names on the Hub; default: the preset's. All sizes are theirs.
    tokenizer: a folder or a name on the Hub; None for the language model's. dtype: None for the language model's.
    overrides: config fields by name.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(map(repr, PRESETS))}; got {preset!r}.")
    defaults = BACKBONES[preset] if preset is not None else (None, None)
    vision, text = vision or defaults[0], text or defaults[1]
    if vision is None or text is None:
        raise ValueError("A CrossLMM needs a vision encoder and a language model. Name both, or a preset.")
    vision_folder, text_folder = find_folder(vision), find_folder(text)
    text_config = AutoConfig.from_pretrained(text_folder)
    if long_context and text_config.model_type != "qwen2":
        raise ValueError(
            f"`long_context` is a setting of Qwen2.5; {text_folder} has a {text_config.model_type!r}. Set what its "
            "model card says by --rope-parameters and --max-position-embeddings."
        )
    top, text_overrides = config_overrides(overrides, preset=preset, flavour=flavour, long_context=long_context)
    config = CrossLMMConfig(
        vision_config=encoder_fields(vision_folder), text_config=network_fields(text_config) | text_overrides, **top
    )
    vision_tensors, left_out = renamed_tensors(stored_tensors(vision_folder), VISION, config)
    text_tensors, also_left_out = renamed_tensors(stored_tensors(text_folder), TEXT, config)
    image_options, notes = image_options_of(vision_folder, config)
    if preset is not None:
        notes += _differences_from_preset(config, preset)
    own_tokenizer = find_tokenizer(text_folder if tokenizer is None else find_folder(tokenizer))
    generation_config, chat_template = generation_config_of(text_folder, text_config), None
    if own_tokenizer is not None:
        chat_template, why = media_template(own_tokenizer)
        text_tensors |= with_marks(config, own_tokenizer, text_tensors, overrides)
        own_tokenizer.chat_template = chat_template
        if why is not None:
            notes.append(why)
            end = own_tokenizer.convert_tokens_to_ids("<|im_end|>")
            ends = generation_config.eos_token_id or []
            generation_config.eos_token_id = sorted({end, *(ends if isinstance(ends, list) else [ends])})
    tensors, initialised = with_new_weights(config, {**vision_tensors, **text_tensors}, dtype=dtype, seed=seed)
    return Conversion(
        config=config,
        tensors=tensors,
        sources={"vision": str(vision), "text": str(text)},
        initialised=initialised,
        left_out=left_out | also_left_out,
        tokenizer=own_tokenizer,
        chat_template=chat_template,
        image_options=image_options,
        generation_config=generation_config,
        notes=notes,
    )


def with_marks(
    config: CrossLMMConfig,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Mapping[str, StoredTensor],
    overrides: Mapping[str, Any],
) -> dict[str, StoredTensor]:
    """Adds the marks that a tokenizer lacks, sets the placeholders' ids in the config, and returns the embedding
    tables with rows for the marks. A vocabulary with unused rows keeps its size; another one grows."""
    new_ids = add_marks(tokenizer)
    for name, mark in (("image_token_id", IMAGE_TOKEN), ("video_token_id", VIDEO_TOKEN)):
        if name not in overrides:
            setattr(config, name, tokenizer.convert_tokens_to_ids(mark))
    size = config.text_config.vocab_size
    config.text_config.vocab_size = max(size, 1 + max(tokenizer.get_vocab().values()))
    if not new_ids and config.text_config.vocab_size == size:
        return {}
    return {
        name: with_new_rows(tensors[name], config.text_config.vocab_size, new_ids, key=name)
        for name in (EMBEDDINGS, "lm_head.weight")
        if name in tensors and tensors[name].shape[0] == size
    }


def config_overrides(
    overrides: Mapping[str, Any], *, preset: str | None = None, flavour: str = "paper", long_context: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields for `CrossLMMConfig` and for its text config, from a preset and `overrides`, which take precedence."""
    top: dict[str, Any] = dict(FLAVOURS[flavour])
    text: dict[str, Any] = {}
    if preset is not None:
        top["pooled_grid_size"] = PRESETS[preset]["pooled_grid_size"]
    if long_context:
        text |= {"rope_parameters": dict(YARN_131072), "max_position_embeddings": 131_072}
    for name, value in overrides.items():
        if name not in CONFIG_FIELDS:
            raise ValueError(f"Config fields that can be set are {', '.join(CONFIG_FIELDS)}; got {name!r}.")
        (top if name in TOP_FIELDS else text)[name] = value
    return top, text


def encoder_fields(folder: Path) -> dict[str, Any]:
    """Config fields of the vision encoder in a folder, which may be a part of a larger model.

    Raises ConversionError for an unsupported encoder.
    """
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type not in VISION_TYPES:
        raise ConversionError(
            f"The vision encoder must be one of {', '.join(VISION_TYPES)}, such as google/siglip2-so400m-patch14-384 "
            f"(not -naflex); {folder} has a {config.model_type!r}."
        )
    return network_fields(config)


def network_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config that describe the network, without those of every `PreTrainedConfig`."""
    other = {f.name for f in fields(PreTrainedConfig)} | {"transformers_version", "_name_or_path"}
    return {name: value for name, value in config.to_dict().items() if name not in other} | {
        "model_type": config.model_type
    }


def image_options_of(folder: Path, config: CrossLMMConfig) -> tuple[dict[str, Any], list[str]]:
    """Resampling and normalisation of the encoder's own image processor, and a note if its size is not the encoder's,
    which frames are resized to. Without an image processor, the values of the encoder's kind."""
    files = [folder / name for name in ("processor_config.json", "preprocessor_config.json")]
    whole, alone = (read_json(file) if file.is_file() else {} for file in files)
    raw = whole.get("image_processor") or alone  # Transformers 5 saves a processor's parts in one file
    if off := [name for name in ("do_resize", "do_rescale", "do_normalize") if raw.get(name) is False]:
        raise ConversionError(
            f"The image processor in {folder} must have {', '.join(off)} on: frames are always resized and normalised."
        )
    if not math.isclose(factor := raw.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ConversionError(
            f"The image processor in {folder} must have a rescale_factor of 1/255; got {factor}. Set it to 1/255, and "
            "adapt image_mean and image_std."
        )
    statistics = IMAGE_STATISTICS[config.vision_config.model_type]
    options = {name: raw.get(name, default) for name, default in statistics.items()}
    size, own = config.vision_config.image_size, raw.get("crop_size") or raw.get("size") or {}
    own = own.get("height") or own.get("shortest_edge") if isinstance(own, dict) else own
    if own in (None, size):
        return options, []
    return options, [f"frames are resized to the encoder's {size} pixels; its own image processor gives {own}"]


def generation_config_of(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """The language model's generation config, from its own file or else from its config."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def _differences_from_preset(config: CrossLMMConfig, preset: str) -> list[str]:
    wanted = CrossLMMConfig.from_preset(preset)
    return [
        f"preset {preset} has {part}.{name} {theirs}, this backbone {ours}"
        for part in ("vision_config", "text_config")
        for name in ("hidden_size", "num_hidden_layers")
        if (theirs := getattr(getattr(wanted, part), name)) != (ours := getattr(getattr(config, part), name))
    ]
