"""From other checkpoints to CrossLMM: composed of two backbones, warm-started from LLaVA, or renamed; and back.

Each conversion is planned as a whole before anything is written: every tensor of the new checkpoint, by name and
shape, and every tensor of the old one that it has no place for. One name-table mechanism and one writer serve all.
"""

import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    SiglipConfig,
    SiglipVisionConfig,
)

from .._version import __version__
from ..configuration_crosslmm import FLAVOURS, PRESETS, YARN_131072, CrossLMMConfig
from ..cross_attention_crosslmm import CrossLMMCrossAttentionBranch
from ..modeling_crosslmm import CrossLMMForConditionalGeneration, CrossLMMModel
from ..processing_crosslmm import CHAT_TEMPLATE, IMAGE_TOKEN, MARKS, VIDEO_TOKEN, CrossLMMProcessor
from .folder import (
    SHARD_BYTES,
    UNUSED_WEIGHTS,
    StoredTensor,
    find_folder,
    new_folder,
    read_json,
    safetensors_of,
    save_tensors,
    split_into_shards,
    stored_tensors,
    write_weights,
)
from .name_tables import (
    BACKBONES,
    LLAVA_NEXT,
    LLAVA_NEXT_POOLING_MODES,
    LLAVA_ONEVISION,
    QWEN2,
    SIGLIP,
    VISION_TOWERS,
)

NameTable = Mapping[str, str | None]

INIT_STD = 0.02
REPORT = "conversion_report.json"
LLAVA_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", "\\n")
"""Ours without the marks around media, which LLaVA never saw: a medium is followed by a line break instead."""

NEW_IN_LAYER = re.compile(r"(model\.language_model\.layers\.\d+)\.cross_attention\.(.+)")
VISION_BLOCK = re.compile(r"model\.vision_tower\.encoder\.layers\.(\d+)\..*")
TOP_FIELDS = {f.name for f in fields(CrossLMMConfig)} - {f.name for f in fields(PreTrainedConfig)}
TOP_FIELDS -= {"vision_config", "text_config", "tie_word_embeddings", "untrained", "weight_layout"}
CONFIG_FIELDS = sorted(TOP_FIELDS | {"rope_parameters", "max_position_embeddings"})
"""What a conversion leaves to its user; everything else follows from the weights."""


class ConversionError(ValueError):
    """A checkpoint does not fit: the message lists every name and shape that is in the way."""


@dataclass
class Conversion:
    """A new checkpoint, complete on paper.

    tensors: ours, in the order of the model. initialised: those of them that no checkpoint gave a value.
    left_out: the old checkpoint's tensors that CrossLMM has no place for, by their old names.
    sources: where the parts come from, as the user named them.
    """

    config: CrossLMMConfig
    tensors: dict[str, StoredTensor]
    sources: dict[str, str]
    initialised: list[str] = field(default_factory=list)
    left_out: dict[str, StoredTensor] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    chat_template: str | None = None
    generation_config: GenerationConfig = field(default_factory=GenerationConfig)
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def peak_bytes(self, shard_bytes: int = SHARD_BYTES) -> int:
        """The largest shard: what writing holds in memory, besides what importing the libraries takes."""
        shards = split_into_shards(self.tensors, shard_bytes)
        return max(sum(self.tensors[name].num_bytes for name in shard) for shard in shards)

    def report(self) -> dict[str, Any]:
        """What was done, for people and for the model card."""
        return {
            "sources": self.sources,
            "versions": {"transformers_crosslmm": __version__, "transformers": transformers.__version__},
            "parameters": sum(math.prod(tensor.shape) for tensor in self.tensors.values()),
            "bytes": self.num_bytes,
            "largest_shard_bytes": self.peak_bytes(),
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}),
            "tensors_taken_over": len(self.tensors) - len(self.initialised),
            "tensors_initialised": len(self.initialised),
            "left_out": sorted(self.left_out),
            "notes": self.notes,
        }


# Names


def rename(name: str, table: NameTable) -> str | None:
    """Our name of a tensor, None for one that CrossLMM has no place for. Raises KeyError for a name in no row."""
    for pattern, target in table.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\*", "(.*)"), name)
        if match:
            return target and target.replace("*", "{}").format(*match.groups())
    raise KeyError(name)


def reversed_table(table: NameTable) -> NameTable:
    """The table that leads from our names back."""
    reverse: dict[str, str | None] = {}
    for pattern, target in table.items():
        if target is not None:
            reverse.setdefault(target, pattern)
    return reverse


def read_name_table(path: str | os.PathLike) -> NameTable:
    """Rows that go before those of `name_tables.LLAVA_NEXT`, from a JSON object {their name: our name or null}.

    Raises ValueError unless every row has as many `*` on the right as on the left.
    """
    table = read_json(Path(path))
    for pattern, target in table.items():
        if not (target is None or (isinstance(target, str) and target.count("*") == pattern.count("*"))):
            raise ValueError(
                f"A row of a name table leads to null or to a name with as many `*` as its own; "
                f"{path} has {pattern!r}: {target!r}."
            )
    return table


def transformers_key_mapping(folder: str | os.PathLike, table: NameTable) -> dict[str, str]:
    """A table as `from_pretrained(folder, config=..., key_mapping=...)` takes it, for the names in this folder.

    Such a model starts with Transformers' initialisation where the folder has no weights, not with the one of a
    conversion, and `save_pretrained` writes the folder's own names again.
    """
    mapping = {}
    for name in stored_tensors(Path(folder)):
        target = rename(name, table)
        if target not in (None, name):
            mapping[f"^{re.escape(name)}$"] = str(target)
    return mapping


def expected_shapes(config: CrossLMMConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with this config. Nothing is allocated."""
    with torch.device("meta"):
        model = CrossLMMForConditionalGeneration(deepcopy(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def renamed_tensors(
    theirs: Mapping[str, StoredTensor], table: NameTable, config: CrossLMMConfig
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Their tensors under our names, and those without a place, under theirs.

    Raises ConversionError with all names that no row knows, for two tensors of one name, and for an `lm_head` that
    differs from the embeddings it is said to be tied to.
    """
    ours: dict[str, StoredTensor] = {}
    left_out: dict[str, StoredTensor] = {}
    tied: list[str] = []
    unknown: list[str] = []
    for name, tensor in theirs.items():
        try:
            target = rename(name, table)
        except KeyError:
            unknown.append(name)
            continue
        block = target and VISION_BLOCK.fullmatch(target)
        if target == "lm_head.weight" and config.tie_word_embeddings:
            tied.append(name)
        elif target is None or (block and int(block[1]) >= config.num_vision_blocks):
            left_out[name] = tensor
        elif target in ours:
            raise ConversionError(f"Two tensors lead to {target}; the second one is {name}. Correct the name table.")
        else:
            ours[target] = tensor
    if unknown:
        raise ConversionError(
            _listed("No row of the name table knows these tensors of the checkpoint:", unknown)
            + "\nName what they are with --name-table, or null for what CrossLMM has no place for."
        )
    embeddings = ours.get("model.language_model.embed_tokens.weight")
    for name in tied:
        if embeddings is not None and not torch.equal(theirs[name].read(), embeddings.read()):
            raise ConversionError(
                f"The config ties {name} to the embeddings, and they differ. Set `tie_word_embeddings` to false there."
            )
        left_out[name] = theirs[name]
    return ours, left_out


def check_complete(tensors: Mapping[str, StoredTensor], config: CrossLMMConfig) -> None:
    """Raises ConversionError with every name that is missing or too many and every shape that is wrong."""
    expected = expected_shapes(config)
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(_listed("The model has these tensors, the checkpoint does not:", missing))
    if superfluous := [name for name in tensors if name not in expected]:
        problems.append(_listed("The checkpoint has these tensors, the model does not:", superfluous))
    if wrong := [
        f"{name}: {tensors[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]:
        problems.append(_listed("These shapes contradict the config:", wrong))
    if problems:
        raise ConversionError("\n".join(problems) + "\nCheck the config fields and the name table.")


def _listed(title: str, names: list[str]) -> str:
    return "\n  ".join([title, *names])


# New weights


def initial_tensors(
    config: CrossLMMConfig, taken_over: Mapping[str, StoredTensor], *, dtype: torch.dtype, seed: int
) -> dict[str, StoredTensor]:
    """Values for whatever the backbones do not have (docs/decisions.md).

    Queries, output projection and norm of the cross-attention are those of the same layer's self-attention, without
    its bias; keys, values and projector are drawn from a normal distribution with deviation 0.02, biases are 0; gates
    are `gate_init`, in float32.
    """
    initial = {}
    for name, shape in expected_shapes(config).items():
        if name in taken_over:
            continue
        block = NEW_IN_LAYER.fullmatch(name)
        layer, part = block.groups() if block else ("", "")
        projection = part.split(".")[-2] if block else ""
        origin = {
            "input_layernorm": f"{layer}.input_layernorm.weight",
            "q_proj": f"{layer}.self_attn.q_proj.weight",
            "o_proj": f"{layer}.self_attn.o_proj.weight",
        }.get(projection)
        if origin is not None:
            if origin in taken_over:
                initial[name] = taken_over[origin]
        elif projection == "gate":
            gate = partial(torch.full, shape, config.gate_init, dtype=torch.float32)
            initial[name] = StoredTensor(shape, torch.float32, gate)
        elif block or (name.startswith("model.multi_modal_projector.") and name.endswith(".weight")):
            initial[name] = StoredTensor(shape, dtype, partial(_drawn, shape, dtype, f"{seed} {name}"))
        elif name.startswith("model.multi_modal_projector."):
            initial[name] = StoredTensor(shape, dtype, partial(torch.zeros, shape, dtype=dtype))
    return initial


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, key: str) -> Tensor:
    """Normal numbers that depend on the seed and the tensor's name alone, not on what else is drawn."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.empty(shape).normal_(0.0, INIT_STD, generator=generator).to(dtype)


def _in_dtype(tensor: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    return StoredTensor(tensor.shape, dtype, lambda: tensor.read().to(dtype))


def _with_new_weights(
    config: CrossLMMConfig, taken_over: dict[str, StoredTensor], *, dtype: str | None, seed: int
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The whole checkpoint in the model's order and one type (gates apart), and the names that are new."""
    if dtype is None:
        stored_dtype = taken_over["model.language_model.embed_tokens.weight"].dtype
    else:
        stored_dtype = getattr(torch, dtype)
    taken_over = {name: _in_dtype(tensor, stored_dtype) for name, tensor in taken_over.items()}
    initial = initial_tensors(config, taken_over, dtype=stored_dtype, seed=seed)
    tensors = {**taken_over, **initial}
    check_complete(tensors, config)
    config.dtype = stored_dtype
    config.untrained = True
    return {name: tensors[name] for name in expected_shapes(config)}, list(initial)


# Configs


def config_overrides(
    overrides: Mapping[str, Any], *, preset: str | None = None, flavour: str = "paper", long_context: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields for `CrossLMMConfig` and for its text config, from a preset and from fields by name, which win."""
    top: dict[str, Any] = dict(FLAVOURS[flavour])
    text: dict[str, Any] = {}
    if preset is not None:
        top["pooled_grid_size"] = PRESETS[preset]["pooled_grid_size"]
    if long_context:
        text |= {"rope_parameters": dict(YARN_131072), "max_position_embeddings": 131_072}
    for name, value in overrides.items():
        if name not in CONFIG_FIELDS:
            raise ValueError(f"A config field that can be set is one of {', '.join(CONFIG_FIELDS)}; got {name!r}.")
        (top if name in TOP_FIELDS else text)[name] = value
    return top, text


def siglip_vision_config(folder: Path) -> dict[str, Any]:
    """The fields of a fixed-resolution SigLIP or SigLIP2 encoder. Raises ConversionError for any other model."""
    config = AutoConfig.from_pretrained(folder)
    if isinstance(config, SiglipConfig):
        config = config.vision_config
    if not isinstance(config, SiglipVisionConfig):
        raise ConversionError(
            "The vision encoder must be a fixed-resolution SigLIP or SigLIP2, such as "
            f"google/siglip2-so400m-patch14-384 (not -naflex); {folder} holds a {config.model_type!r}."
        )
    return network_fields(config)


def network_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says of the network, without what it says of its file and of how it is called."""
    other = {f.name for f in fields(PreTrainedConfig)} | {"transformers_version", "_name_or_path"}
    return {name: value for name, value in config.to_dict().items() if name not in other}


def llava_onevision_config(folder: Path, overrides: Mapping[str, Any]) -> CrossLMMConfig:
    """The CrossLMM that has the parts of a LLaVA-OneVision in Transformers' format."""
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
            f"Its parts must be a SigLIP and a Qwen2; {folder} holds {theirs.vision_config.model_type!r} and "
            f"{theirs.text_config.model_type!r}."
        )
    vision = network_fields(theirs.vision_config)
    text = network_fields(theirs.text_config) | {"tie_word_embeddings": theirs.tie_word_embeddings}
    top_overrides, text_overrides = config_overrides(overrides)
    top = {
        "vision_feature_layer": theirs.vision_feature_layer,
        "pooling_mode": "bilinear",  # the only one its class knows
        "pooled_grid_size": math.ceil(vision["image_size"] // vision["patch_size"] / 2),
    }
    return CrossLMMConfig(vision_config=vision, text_config=text | text_overrides, **top | top_overrides)


def llava_next_config(
    folder: Path, overrides: Mapping[str, Any], *, vision: str | os.PathLike | None, in_weights: Mapping[str, Any]
) -> CrossLMMConfig:
    """The CrossLMM that has the parts of a checkpoint in LLaVA-NeXT's layout.

    vision: where to read the sizes of the encoder, which that layout only names; None to go by the name. in_weights:
    fields read from the weights. What config.json says under our names, as one written by `crosslmm_to_llava_next`
    does, goes before them, and `overrides` before both.
    """
    raw = read_json(folder / "config.json")
    if vision is not None:
        encoder = siglip_vision_config(find_folder(vision))
    else:
        encoder = raw.get("vision_config") or _named_vision_tower(raw["mm_vision_tower"])
    if raw["mm_projector_type"] != "mlp2x_gelu":
        raise ConversionError(f"`mm_projector_type` must be 'mlp2x_gelu'; {folder} has {raw['mm_projector_type']!r}.")
    # LLaVA-NeXT's own defaults where an older config.json is silent.
    mode, stride = raw.get("mm_spatial_pool_mode") or "bilinear", raw.get("mm_spatial_pool_stride") or 2
    if mode not in LLAVA_NEXT_POOLING_MODES and "pooling_mode" not in overrides:
        raise ConversionError(
            f"`mm_spatial_pool_mode` must be one of {', '.join(map(repr, LLAVA_NEXT_POOLING_MODES))}; {folder} has "
            f"{mode!r}. Choose one with --pooling-mode, and expect to train."
        )
    grid = encoder["image_size"] // encoder["patch_size"]
    top = {
        "vision_feature_layer": raw["mm_vision_select_layer"],
        "pooling_mode": LLAVA_NEXT_POOLING_MODES.get(mode),
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
        return siglip_vision_config(Path(name))
    short_name = name.rstrip("/").split("/")[-1]
    if short_name not in VISION_TOWERS:
        raise ConversionError(
            f"The sizes of `mm_vision_tower` {name!r} are not known here ({', '.join(VISION_TOWERS)} are). Give the "
            "encoder's folder or Hub name with --vision."
        )
    return dict(VISION_TOWERS[short_name])


# Tokenizers and the rest of a checkpoint


def find_tokenizer(folder: Path, vocabulary_size: int) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer with all marks that the processor needs, or None if there is none.

    Qwen2.5's has them. To an older one they are added, in rows of the embedding that Qwen leaves free. Raises
    ConversionError if there is no such row.
    """
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [AddedToken(mark, special=True, normalized=False) for mark in MARKS if mark not in special]
    tokenizer.add_tokens(missing, special_tokens=True)
    last = max(tokenizer.get_vocab()[mark] for mark in MARKS)
    if last >= vocabulary_size:
        raise ConversionError(
            f"The marks of media need {last + 1} rows of embeddings; the language model has {vocabulary_size}. Resize "
            "its embeddings first."
        )
    return tokenizer


def _set_placeholders(
    config: CrossLMMConfig, tokenizer: PreTrainedTokenizerBase | None, overrides: Mapping[str, Any]
) -> None:
    if tokenizer is not None:
        for name, mark in (("image_token_id", IMAGE_TOKEN), ("video_token_id", VIDEO_TOKEN)):
            if name not in overrides:
                setattr(config, name, tokenizer.convert_tokens_to_ids(mark))


def _generation_config(folder: Path) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig()


# The conversions


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
    """Plans a trainable CrossLMM of a SigLIP or SigLIP2 and a Qwen2 or Qwen2.5. Its gates are 0: it is the LLM.

    vision, text: folders or names on the Hub; with a preset, the paper's unless given. Sizes always come from them.
    tokenizer: where it lies, if not with the language model. dtype: None for that of the language model.
    overrides: config fields by name.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(map(repr, PRESETS))}; got {preset!r}.")
    defaults = BACKBONES[preset] if preset is not None else (None, None)
    vision, text = vision or defaults[0], text or defaults[1]
    if vision is None or text is None:
        raise ValueError("A composition needs a vision encoder and a language model. Name both, or a preset.")
    vision_folder, text_folder = find_folder(vision), find_folder(text)
    vision_fields, text_config = siglip_vision_config(vision_folder), AutoConfig.from_pretrained(text_folder)
    if not isinstance(text_config, Qwen2Config):
        raise ConversionError(
            f"The language model must be a Qwen2 or Qwen2.5, such as Qwen/Qwen2.5-1.5B-Instruct; {text_folder} holds "
            f"a {text_config.model_type!r}."
        )
    tokenizer_folder = text_folder if tokenizer is None else find_folder(tokenizer)
    own_tokenizer = find_tokenizer(tokenizer_folder, text_config.vocab_size)
    top, text_overrides = config_overrides(overrides, preset=preset, flavour=flavour, long_context=long_context)
    config = CrossLMMConfig(
        vision_config=vision_fields, text_config=network_fields(text_config) | text_overrides, **top
    )
    _set_placeholders(config, own_tokenizer, overrides)
    vision_tensors, left_out = renamed_tensors(stored_tensors(vision_folder), SIGLIP, config)
    text_tensors, also_left_out = renamed_tensors(stored_tensors(text_folder), QWEN2, config)
    tensors, initialised = _with_new_weights(config, {**vision_tensors, **text_tensors}, dtype=dtype, seed=seed)
    notes = []
    if preset is not None:
        notes = _differences_from_preset(config, preset)
    return Conversion(
        config=config,
        tensors=tensors,
        sources={"vision": str(vision), "text": str(text)},
        initialised=initialised,
        left_out=left_out | also_left_out,
        tokenizer=own_tokenizer,
        generation_config=_generation_config(text_folder),
        notes=notes,
    )


def _differences_from_preset(config: CrossLMMConfig, preset: str) -> list[str]:
    wanted = CrossLMMConfig.from_preset(preset)
    return [
        f"preset {preset} has {part}.{name} {theirs}, this backbone {ours}"
        for part in ("vision_config", "text_config")
        for name in ("hidden_size", "num_hidden_layers")
        if (theirs := getattr(getattr(wanted, part), name)) != (ours := getattr(getattr(config, part), name))
    ]


def convert_llava(
    source: str | os.PathLike,
    *,
    vision: str | os.PathLike | None = None,
    dtype: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Conversion:
    """Plans a CrossLMM that begins as a LLaVA-OneVision or LLaVA-Video: same encoder, projector and language model.

    source: a folder or Hub name, in Transformers' format or in LLaVA-NeXT's layout. vision: where to read the sizes of
    the encoder if the layout only names it. Unless overridden, frames are pooled to LLaVA's own grid: with gates at 0
    it answers as LLaVA does, up to the order of pooling and projection.
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
            f"{folder} holds a {raw.get('model_type')!r}."
        )
    tokenizer = find_tokenizer(folder, config.text_config.vocab_size)
    _set_placeholders(config, tokenizer, overrides)
    taken_over, left_out = renamed_tensors(stored_tensors(folder), table, config)
    tensors, initialised = _with_new_weights(config, taken_over, dtype=dtype, seed=seed)
    return Conversion(
        config=config,
        tensors=tensors,
        sources={"llava": str(source)},
        initialised=initialised,
        left_out=left_out,
        tokenizer=tokenizer,
        chat_template=LLAVA_CHAT_TEMPLATE,
        generation_config=_generation_config(folder),
    )


def convert_crosslmm_weights(
    source: str | os.PathLike,
    *,
    name_table: NameTable | None = None,
    vision: str | os.PathLike | None = None,
    **overrides: Any,
) -> Conversion:
    """Plans our form of a CrossLMM that was trained in LLaVA-NeXT's layout. Every tensor keeps its bits and type.

    name_table: rows that go before `name_tables.LLAVA_NEXT`. Which layers have a cross-attention, with which
    branches, and the projector's width are read from the weights; what is not in them, from config.json and
    `overrides`.
    """
    folder = find_folder(source)
    table = {**(name_table or {}), **LLAVA_NEXT}
    theirs = stored_tensors(folder)
    in_weights = fields_in_weights(theirs, table)
    config = llava_next_config(folder, overrides, vision=vision, in_weights=in_weights)
    tokenizer = find_tokenizer(folder, config.text_config.vocab_size)
    _set_placeholders(config, tokenizer, overrides)
    tensors, left_out = renamed_tensors(theirs, table, config)
    check_complete(tensors, config)
    config.dtype = tensors["model.language_model.embed_tokens.weight"].dtype
    return Conversion(
        config=config,
        tensors={name: tensors[name] for name in expected_shapes(config)},
        sources={"llava_next": str(source)},
        left_out=left_out,
        tokenizer=tokenizer,
        generation_config=_generation_config(folder),
    )


def fields_in_weights(theirs: Mapping[str, StoredTensor], table: NameTable) -> dict[str, Any]:
    """Config fields that names and shapes alone decide."""
    layers: set[int] = set()
    branches: set[str] = set()
    found: dict[str, Any] = {}
    for name, tensor in theirs.items():
        try:
            ours = rename(name, table) or ""
        except KeyError:  # `renamed_tensors` names them all
            continue
        if block := NEW_IN_LAYER.fullmatch(ours):
            layers.add(int(block[1].rsplit(".", 1)[1]))
            branches.add(block[2].split(".")[0])
        elif ours == "model.multi_modal_projector.linear_2.weight" and tensor.shape[0] != tensor.shape[1]:
            found["projector_hidden_size"] = tensor.shape[1]
    if layers:
        found |= {"cross_attention_layers": sorted(layers), "use_v2v": "v2v" in branches, "use_t2v": "t2v" in branches}
    return found


def write_checkpoint(
    conversion: Conversion,
    out: str | os.PathLike,
    *,
    force: bool = False,
    keep_left_out: bool = False,
    measure_entropy: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes model, processor and report, one shard in memory at a time; returns the report.

    `out` appears when everything is written, and not at all otherwise. keep_left_out: in a file beside the weights, so
    that the way back is exact. measure_entropy: of the attention, see `attention_entropy`.
    """
    config = conversion.config
    config.architectures = ["CrossLMMForConditionalGeneration"]
    report = conversion.report()
    with new_folder(out, force=force, num_bytes=conversion.num_bytes) as folder:
        if conversion.tokenizer is not None:
            processor = CrossLMMProcessor.from_config(
                config, conversion.tokenizer, chat_template=conversion.chat_template
            )
            processor.save_pretrained(folder)
        else:
            report["notes"].append("no tokenizer was found, so there is no processor: name one with --tokenizer")
        conversion.generation_config.suppress_tokens = [config.image_token_id, config.video_token_id]
        conversion.generation_config.save_pretrained(folder)
        config.save_pretrained(folder)
        if keep_left_out and conversion.left_out:
            save_tensors(
                {name: tensor.read() for name, tensor in conversion.left_out.items()}, folder / UNUSED_WEIGHTS
            )
        write_weights(folder, conversion.tensors, shard_bytes)
        if measure_entropy:
            # Behind the weights, because the allocator keeps for itself what the network's run has used.
            report["attention_entropy"] = attention_entropy(config, conversion.tensors)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


def crosslmm_to_llava_next(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    name_table: NameTable | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes our checkpoint in LLaVA-NeXT's layout, bit for bit, with what its conversion had left out.

    The fields that LLaVA-NeXT has no name for go into its config.json under ours.
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
        tokenizer = find_tokenizer(folder, config.text_config.vocab_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if (folder / "generation_config.json").is_file():
            shutil.copy(folder / "generation_config.json", new)
        (new / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        (new / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        write_weights(new, theirs, shard_bytes)
    return report


# The entropy of a new attention


@torch.no_grad()
def attention_entropy(config: CrossLMMConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, float]]:
    """How evenly each branch looks at one synthetic frame: entropy of its attention over that of a uniform one.

    By layer and branch, the mean over queries and heads; 1.0 is uniform. The network runs in float32 with one module's
    weights in memory at a time.
    """
    config = deepcopy(config)
    text_config: Any = config.text_config
    config.dtype = config.vision_config.dtype = text_config.dtype = torch.float32
    with torch.device("meta"):
        model = CrossLMMModel(config).eval()
    # Made of the config, not of weights, so there is nothing on the disk to fill them from.
    embeddings = model.vision_tower.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    model.language_model.rotary_emb = type(model.language_model.rotary_emb)(config=text_config)
    for name, module in model.named_modules():
        parameters = [key for key, _ in module.named_parameters(recurse=False)]
        if parameters:
            stored = {key: tensors[f"model.{name}.{key}"] for key in parameters}
            module.register_forward_pre_hook(partial(_fetch_weights, stored))
            module.register_forward_hook(_drop_weights)
    entropies: dict[str, dict[str, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, CrossLMMCrossAttentionBranch):
            seen: dict[str, Tensor] = {}
            module.q_proj.register_forward_hook(partial(_keep_output, seen, "query"))
            module.k_proj.register_forward_hook(partial(_keep_output, seen, "key"))
            layer, branch = name.split(".")[2], name.split(".")[-1]
            module.register_forward_hook(partial(_keep_entropy, seen, entropies.setdefault(layer, {}), branch))
    size = config.vision_config.image_size
    shades = torch.rand(1, config.vision_config.num_channels, 6, 6, generator=torch.Generator().manual_seed(0))
    frame = nn.functional.interpolate(shades * 2 - 1, (size, size), mode="bicubic").clamp(-1, 1)
    text = torch.arange(8) % min(config.image_token_id, config.video_token_id)
    ids = torch.cat([torch.full((config.tokens_per_frame,), config.video_token_id), text])[None]
    model(input_ids=ids, pixel_values_videos=frame, use_cache=False)
    return entropies


def _fetch_weights(stored: dict[str, StoredTensor], module: nn.Module, args: Any) -> None:
    for key, tensor in stored.items():
        # An embedding is read in a few rows only; turning all of it to float32 would take as much again, twice.
        value = tensor.read() if isinstance(module, nn.Embedding) else tensor.read().float()
        setattr(module, key, nn.Parameter(value, requires_grad=False))


def _drop_weights(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    for key, parameter in list(module.named_parameters(recurse=False)):
        placeholder = torch.empty_like(parameter, device="meta", dtype=torch.float32)
        setattr(module, key, nn.Parameter(placeholder, requires_grad=False))
    return output.float()


def _keep_output(seen: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    seen[name] = output


def _keep_entropy(
    seen: dict[str, Tensor],
    entropies: dict[str, float],
    name: str,
    branch: CrossLMMCrossAttentionBranch,
    args: Any,
    output: Tensor,
) -> None:
    query = branch.split_heads(seen["query"]).transpose(0, 1)  # (H, Q, E)
    key = branch.split_heads(seen["key"]).transpose(0, 1)
    key = key.repeat_interleave(len(query) // len(key), 0)
    log_weights = (query @ key.mT * branch.scaling).log_softmax(-1)
    entropy = -(log_weights.exp() * log_weights).sum(-1).mean()
    entropies[name] = round(float(entropy) / math.log(key.shape[1]), 4)
