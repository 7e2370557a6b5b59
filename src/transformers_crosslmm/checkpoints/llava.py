"""Converts LLaVA checkpoints, and CrossLMM checkpoints trained in LLaVA-NeXT's code base, to our format and back."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, Qwen2Config, SiglipVisionConfig

from ..configuration_crosslmm import POOLING_MODES, CrossLMMConfig
from ..processing_crosslmm import CHAT_TEMPLATE
from .chat import find_tokenizer
from .compose import (
    TOP_FIELDS,
    config_overrides,
    encoder_fields,
    generation_config_of,
    image_options_of,
    network_fields,
    with_marks,
)
from .conversion import REPORT, Conversion, ConversionError, check_complete, renamed_tensors
from .folder import (
    SHARD_BYTES,
    UNUSED_WEIGHTS,
    StoredTensor,
    find_folder,
    new_folder,
    read_json,
    safetensors_of,
    stored_tensors,
    write_weights,
)
from .name_tables import (
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    NEW_IN_LAYER,
    VISION_TOWERS,
    NameTable,
    rename,
    reversed_table,
)
from .network import expected_shapes
from .new_weights import EMBEDDINGS, with_new_weights

LLAVA_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", "\\n")
"""Our template with a line break after each medium, instead of marks around it that LLaVA was not trained with."""


def llava_onevision_config(folder: Path, overrides: Mapping[str, Any]) -> CrossLMMConfig:
    """The config of a CrossLMM with the parts of a LLaVA-OneVision in Transformers' format."""
    theirs: Any = AutoConfig.from_pretrained(folder)
    for name, has_to_be in (
        ("projector_hidden_act", "gelu"),
        ("multimodal_projector_bias", True),
        ("vision_feature_select_strategy", "full"),
    ):
        if getattr(theirs, name) != has_to_be:
            raise ConversionError(f"`{name}` must be {has_to_be!r}; {folder} has {getattr(theirs, name)!r}.")
    if not isinstance(theirs.vision_feature_layer, int):
        raise ConversionError(f"`vision_feature_layer` must be one layer; {folder} has {theirs.vision_feature_layer}.")
    if not isinstance(theirs.text_config, Qwen2Config) or not isinstance(theirs.vision_config, SiglipVisionConfig):
        raise ConversionError(
            f"Its parts must be a SigLIP and a Qwen2; {folder} has {theirs.vision_config.model_type!r} and "
            f"{theirs.text_config.model_type!r}."
        )
    vision = network_fields(theirs.vision_config)
    text = network_fields(theirs.text_config) | {"tie_word_embeddings": theirs.tie_word_embeddings}
    top_overrides, text_overrides = config_overrides(overrides)
    top = {
        "vision_feature_layer": theirs.vision_feature_layer,
        "pooling_mode": "bilinear",  # the only mode of its class
        "pooled_grid_size": math.ceil(vision["image_size"] // vision["patch_size"] / 2),
    }
    return CrossLMMConfig(vision_config=vision, text_config=text | text_overrides, **top | top_overrides)


def llava_next_config(
    folder: Path, overrides: Mapping[str, Any], *, vision: str | os.PathLike | None, in_weights: Mapping[str, Any]
) -> CrossLMMConfig:
    """The config of a CrossLMM with the parts of a checkpoint in LLaVA-NeXT's layout.

    vision: folder or name of the encoder, for its sizes; None for the known sizes of the encoder that config.json
    names. in_weights: fields read from the weights. Fields in config.json under our names, as `crosslmm_to_llava_next`
    writes them, override these, and `overrides` override both.
    """
    raw = read_json(folder / "config.json")
    if vision is not None:
        encoder = encoder_fields(find_folder(vision))
    else:
        encoder = raw.get("vision_config") or _named_vision_tower(raw["mm_vision_tower"])
    if raw["mm_projector_type"] != "mlp2x_gelu":
        raise ConversionError(f"`mm_projector_type` must be 'mlp2x_gelu'; {folder} has {raw['mm_projector_type']!r}.")
    # LLaVA-NeXT's own defaults, for an older config.json without these fields.
    mode, stride = raw.get("mm_spatial_pool_mode") or "bilinear", raw.get("mm_spatial_pool_stride") or 2
    if mode not in POOLING_MODES and "pooling_mode" not in overrides:
        raise ConversionError(
            f"`mm_spatial_pool_mode` must be one of {', '.join(map(repr, POOLING_MODES))}; {folder} has "
            f"{mode!r}. Choose one with --pooling-mode, and train the model with it."
        )
    grid = encoder["image_size"] // encoder["patch_size"]
    top = {
        "vision_feature_layer": raw["mm_vision_select_layer"],
        "pooling_mode": mode,
        "pooled_grid_size": grid // stride if mode == "average" else math.ceil(grid / stride),
    }
    known = {f.name for f in fields(Qwen2Config)} | {"rope_theta", "rope_scaling"}
    text = network_fields(Qwen2Config.from_dict({name: value for name, value in raw.items() if name in known}))
    said = {name for name, value in raw.items() if value is not None}
    if said & {"cross_attention_interval", "cross_attention_layers"}:
        in_weights = {name: value for name, value in in_weights.items() if name != "cross_attention_layers"}
    top |= config_overrides(in_weights)[0] | {name: raw[name] for name in (TOP_FIELDS | {"untrained"}) & said}
    top_overrides, text_overrides = config_overrides(overrides)
    return CrossLMMConfig(vision_config=encoder, text_config=text | text_overrides, **top | top_overrides)


def _named_vision_tower(name: str) -> dict[str, Any]:
    if Path(name).is_dir():
        return encoder_fields(Path(name))
    short_name = name.rstrip("/").split("/")[-1]
    if short_name not in VISION_TOWERS:
        raise ConversionError(
            f"`mm_vision_tower` must be one of {', '.join(VISION_TOWERS)}, whose sizes are known; got {name!r}. Give "
            "the encoder's folder or Hub name with --vision."
        )
    return dict(VISION_TOWERS[short_name])


def convert_llava(
    source: str | os.PathLike,
    *,
    vision: str | os.PathLike | None = None,
    dtype: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Conversion:
    """Plans a CrossLMM with the encoder, projector and language model of a LLaVA-OneVision or LLaVA-Video.

    source: a folder or Hub name, in Transformers' format or in LLaVA-NeXT's layout. vision: see `llava_next_config`.
    Unless overridden, frames are pooled to LLaVA's own grid: with gates at 0 the answers are LLaVA's, except for the
    order of pooling and projection.
    """
    folder = find_folder(source)
    raw = read_json(folder / "config.json")
    if "mm_vision_tower" in raw:
        table = LLAVA_NEXT
        config = llava_next_config(folder, overrides, vision=vision, in_weights={})
    elif raw.get("model_type") == "llava_onevision":
        table = LLAVA_ONEVISION
        config = llava_onevision_config(folder, overrides)
    else:
        raise ConversionError(
            "It must be a LLaVA-OneVision in Transformers' format or a LLaVA-NeXT checkpoint of Qwen2 and SigLIP; "
            f"{folder} has a {raw.get('model_type')!r}."
        )
    taken_over, left_out = renamed_tensors(stored_tensors(folder), table, config)
    tokenizer = find_tokenizer(folder)
    if tokenizer is not None:
        taken_over |= with_marks(config, tokenizer, taken_over, overrides)
    image_options, notes = image_options_of(folder, config)
    tensors, initialised = with_new_weights(config, taken_over, dtype=dtype, seed=seed)
    return Conversion(
        config=config,
        tensors=tensors,
        sources={"llava": str(source)},
        initialised=initialised,
        left_out=left_out,
        tokenizer=tokenizer,
        chat_template=LLAVA_CHAT_TEMPLATE,
        image_options=image_options,
        generation_config=generation_config_of(folder, config.text_config),
        notes=notes,
    )


def convert_crosslmm_weights(
    source: str | os.PathLike,
    *,
    name_table: NameTable | None = None,
    vision: str | os.PathLike | None = None,
    **overrides: Any,
) -> Conversion:
    """Plans the conversion of a CrossLMM trained in LLaVA-NeXT's layout. Every tensor keeps its bits and type.

    name_table: rows put before those of `name_tables.LLAVA_NEXT`. The layers with a cross-attention, its branches and
    the projector's width are read from the weights, everything else from config.json and `overrides`.
    """
    folder = find_folder(source)
    table = {**(name_table or {}), **LLAVA_NEXT}
    theirs = stored_tensors(folder)
    in_weights = fields_in_weights(theirs, table)
    config = llava_next_config(folder, overrides, vision=vision, in_weights=in_weights)
    tensors, left_out = renamed_tensors(theirs, table, config)
    tokenizer = find_tokenizer(folder)
    if tokenizer is not None:
        tensors |= with_marks(config, tokenizer, tensors, overrides)
    check_complete(tensors, config)
    config.dtype = tensors[EMBEDDINGS].dtype
    return Conversion(
        config=config,
        tensors={name: tensors[name] for name in expected_shapes(config)},
        sources={"llava_next": str(source)},
        left_out=left_out,
        tokenizer=tokenizer,
        generation_config=generation_config_of(folder, config.text_config),
    )


def fields_in_weights(theirs: Mapping[str, StoredTensor], table: NameTable) -> dict[str, Any]:
    """Config fields that follow from the tensors' names and shapes."""
    layers: set[int] = set()
    branches: set[str] = set()
    found: dict[str, Any] = {}
    for name, tensor in theirs.items():
        try:
            ours = rename(name, table) or ""
        except KeyError:  # `renamed_tensors` raises for these
            continue
        if block := NEW_IN_LAYER.fullmatch(ours):
            layers.add(int(block[1].rsplit(".", 1)[1]))
            branches.add(block[2].split(".")[0])
        elif ours == "model.multi_modal_projector.linear_2.weight" and tensor.shape[0] != tensor.shape[1]:
            found["projector_hidden_size"] = tensor.shape[1]
    if layers:
        found |= {"cross_attention_layers": sorted(layers), "use_v2v": "v2v" in branches, "use_t2v": "t2v" in branches}
    return found


def crosslmm_to_llava_next(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    name_table: NameTable | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes our checkpoint in LLaVA-NeXT's layout, bit for bit, with the tensors that its conversion left out.

    Fields without a name in LLaVA-NeXT are written to config.json under our names.
    """
    folder = find_folder(source)
    config = CrossLMMConfig.from_pretrained(folder)
    ours = stored_tensors(folder)
    check_complete(ours, config)
    table = reversed_table({**(name_table or {}), **LLAVA_NEXT})
    theirs: dict[str, StoredTensor] = {}
    for name, tensor in ours.items():
        theirs[str(rename(name, table))] = tensor
    if (folder / UNUSED_WEIGHTS).is_file():
        theirs |= safetensors_of(folder / UNUSED_WEIGHTS)
    raw = {
        **network_fields(config.text_config),
        **{name: getattr(config, name) for name in (*sorted(TOP_FIELDS), "untrained")},
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "dtype": str(theirs["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        "mm_vision_tower": "",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_spatial_pool_mode": config.pooling_mode,
        "vision_config": network_fields(config.vision_config),
    }
    conversion = Conversion(config=config, tensors=theirs, sources={"crosslmm": str(source)})
    report = conversion.report()
    with new_folder(out, force=force, num_bytes=conversion.num_bytes) as new:
        tokenizer = find_tokenizer(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if (folder / "generation_config.json").is_file():
            shutil.copy(folder / "generation_config.json", new)
        (new / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        (new / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        write_weights(new, theirs, shard_bytes)
    return report
