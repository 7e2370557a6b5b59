"""What a video costs: CrossLMM beside video models of Transformers, counted at their real sizes and timed on a device.

    crosslmm bench --output cost.json                 # counted everywhere; timed too where there is a GPU
    crosslmm bench --size toy --output cost.json      # timed on a CPU, small models

*Counted* are multiply-accumulates, by running the models on PyTorch's meta device, and bytes: they hold anywhere.
*Timed* figures are of one run on one device, the models in turn: only their ratios mean something elsewhere. Weights
are random: no time here depends on their values.

Shapes: T frames, N patches per frame, D vision width, s x s pooled tokens per frame, L language tokens, C language
        width, H query heads, G key/value heads, E head width.
"""

import copy
import json
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from .configuration_crosslmm import PRESETS, CrossLMMConfig
from .inspection_crosslmm import CheckpointCosts, count_costs
from .modeling_crosslmm import CrossLMMForConditionalGeneration

FRAMES = (32, 64, 128, 256)
"""What the paper's Figure 4 has."""
LONG = (512, 1024, 3600)
"""Counted for CrossLMM alone; the last is an hour at one frame per second."""
TEXT_TOKENS = 64
"""Of the first question. They stand behind the video."""
QUESTION_TOKENS = 32
"""Of the second."""
NEW_TOKENS = 16
"""Over which decoding is timed."""

PAPER = {
    # Figure 4 and Table 6, at `FRAMES`: multiply-accumulates in T (there "TFLOPs"), memory in MB and prefill in ms on
    # an H800.
    "CrossLMM-2B": {
        "macs": (10.93, 21.77, 43.46, 86.82),
        "memory": (715.61, 825.21, 1046.68, 1490.25),
        "prefill": (264.06, 505.50, 909.77, 1698.12),
    },
    "CrossLMM-7B": {
        "macs": (13.17, 25.92, 51.43, 102.42),
        "memory": (1753, 1864, 2087, 2530),
        "prefill": (335, 578, 1063, 1975),
    },
    "LLaVA-OneVision-7B": {
        "macs": (57, 113.56, 226.67, 316.88),
        "memory": (4858, 8640, 16206, 20208),
        "prefill": (554, 1129, 2504, 3978),
    },
}
NOT_COUNTED_BY_THE_PAPER = ("self-attention scores", "V2V scores")
"""Its figures grow linearly with the number of frames, and leave no room for what does not."""


# --- the closed form ------------------------------------------------------------------------------------------------


def multiply_accumulates(config: CrossLMMConfig, frames: int, *, text_tokens: int = TEXT_TOKENS) -> dict[str, int]:
    """Multiply-accumulates of the matrix products of one prefill, part by part, as docs/cost.md derives them: a video
    and then text, logits of the last position only.

    Causal self-attention is counted in full, as kernels without a mask for it compute it.
    """
    vision, text = config.vision_config, config.text_config
    num_patches, patch_values = config.patch_grid_size**2, vision.num_channels * vision.patch_size**2
    visual = frames * config.tokens_per_frame
    length = visual + text_tokens
    head_dim = text.hidden_size // text.num_attention_heads
    query_width, key_width = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    num_cross = len(text.cross_attention_layer_indices)
    v2v, t2v = num_cross * text.use_v2v, num_cross * text.use_t2v
    block = (
        num_patches * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
        + 2 * num_patches**2 * vision.hidden_size
    )
    hidden_size = config.projector_hidden_size or text.hidden_size
    frames_seen = {"video": frames * frames, "frame": frames, "causal": frames * (frames + 1) // 2}[text.v2v_scope]
    return {
        "vision": frames * (num_patches * patch_values * vision.hidden_size + config.num_vision_blocks * block),
        "projector": visual * hidden_size * (vision.hidden_size + text.hidden_size),
        "language model": length
        * text.num_hidden_layers
        * text.hidden_size
        * (2 * query_width + 2 * key_width + 3 * text.intermediate_size),
        "self-attention scores": text.num_hidden_layers * 2 * length**2 * query_width,
        "keys and values": (v2v + t2v) * 2 * frames * num_patches * vision.hidden_size * key_width,
        "queries and outputs": (v2v * visual + t2v * text_tokens) * 2 * text.hidden_size * query_width,
        "T2V scores": t2v * 2 * text_tokens * frames * num_patches * query_width,
        "folding": t2v * 2 * vision.hidden_size**2 * key_width * (text.cross_attention_cache == "features"),
        "V2V scores": v2v * 2 * config.tokens_per_frame * frames_seen * num_patches * query_width,
        "head": text.hidden_size * text.vocab_size,
    }


def paper_macs(config: CrossLMMConfig, frames: int) -> int:
    """The same, counted as the paper's own figures are."""
    parts = multiply_accumulates(config, frames)
    return sum(macs for part, macs in parts.items() if part not in NOT_COUNTED_BY_THE_PAPER)


# --- the models -----------------------------------------------------------------------------------------------------

TOY_VISION = {"hidden_size": 192, "intermediate_size": 720, "num_attention_heads": 4, "image_size": 384}
TOY_TEXT = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 2688,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}
"""About a seventh of the widths and a quarter of the depth of a 7B; patches and tokens per frame are the real ones."""
TOY_IMAGE_TOKEN, TOY_VIDEO_TOKEN = 4094, 4095


class CrossLMM:
    """A preset. scope: `v2v_scope`. form: `cross_attention_cache`."""

    model_class: Any = CrossLMMForConditionalGeneration
    video_token = "video_token_id"
    frames_at_once = 1
    parts = {
        "vision": r"model\.vision_tower",
        "projector": r"model\.multi_modal_projector",
        "V2V": r".*\.cross_attention\.v2v",
        "T2V": r".*\.cross_attention",  # what V2V leaves of it: T2V, its K and V, and the norm before both
        "language model": r"model\.language_model",
    }

    def __init__(self, preset: str, *, scope: str = "video", form: str = "features") -> None:
        self.model_name, self.preset, self.scope, self.form = f"CrossLMM-{preset}", preset, scope, form
        self.name = f"{self.model_name}, {scope}, {form}"

    def config(self, size: str) -> CrossLMMConfig:
        if size == "full":
            config = CrossLMMConfig.from_preset(self.preset, long_context=True)
        else:
            config = CrossLMMConfig(
                vision_config=TOY_VISION
                | {"num_hidden_layers": 7, "patch_size": PRESETS[self.preset]["vision_config"]["patch_size"]},
                text_config=dict(TOY_TEXT),
                pooled_grid_size=PRESETS[self.preset]["pooled_grid_size"],
                image_token_id=TOY_IMAGE_TOKEN,
                video_token_id=TOY_VIDEO_TOKEN,
            )
        return config

    def num_tokens(self, config: Any, frames: int) -> int:
        return frames * config.tokens_per_frame

    def video(self, config: Any, frames: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Random pixels, as the model takes them."""
        size = config.vision_config.image_size
        return {"pixel_values_videos": torch.rand(frames, 3, size, size, device=device, dtype=dtype)}

    def prepare(self, model: Any) -> None:
        """Variants share a model; before it runs, it is made this one."""
        model.config.text_config.v2v_scope = self.scope
        model.config.text_config.cross_attention_cache = self.form


class LlavaOneVision:
    """26 blocks of the same SigLIP; 14 x 14 tokens per frame, and one behind the video."""

    model_class: Any = LlavaOnevisionForConditionalGeneration
    video_token = "video_token_index"
    frames_at_once = 1
    parts = {
        "vision": r"model\.vision_tower",
        "projector": r"model\.multi_modal_projector",
        "language model": r"model\.language_model",
    }

    def __init__(self, name: str, text_config: dict[str, Any]) -> None:
        self.name = self.model_name = name
        self.text_config = text_config

    def config(self, size: str) -> LlavaOnevisionConfig:
        full = size == "full"
        vision = PRESETS["7B"]["vision_config"] if full else TOY_VISION | {"patch_size": 14}
        text = self.text_config if full else TOY_TEXT
        return LlavaOnevisionConfig(
            vision_config={
                **vision,
                "model_type": "siglip_vision_model",
                "num_hidden_layers": 26 if full else 6,
                "vision_use_head": False,
            },
            text_config={**text, "model_type": "qwen2"},
            tie_word_embeddings=text["tie_word_embeddings"],
            **({} if full else {"image_token_index": TOY_IMAGE_TOKEN, "video_token_index": TOY_VIDEO_TOKEN}),
        )

    def num_tokens(self, config: Any, frames: int) -> int:
        grid = config.vision_config.image_size // config.vision_config.patch_size
        return frames * ((grid + 1) // 2) ** 2 + 1

    def video(self, config: Any, frames: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        size = config.vision_config.image_size
        return {"pixel_values_videos": torch.rand(1, frames, 3, size, size, device=device, dtype=dtype)}

    def prepare(self, model: Any) -> None:
        """There are no variants."""


class QwenVL:
    """Qwen2.5-VL or Qwen3-VL: two frames are one grid of patches, of which each 2 x 2 are a token. Frames of 384 x 384
    pixels, which Qwen2.5-VL makes 392 x 392 to divide them. The words for the time of each frame that Qwen3-VL's
    processor adds are left out."""

    video_token = "video_token_id"
    frames_at_once = 2
    parts = {
        "vision": r"model\.visual",
        "projector": r"model\.visual\.(merger|deepstack_merger_list\.\d+)",
        "language model": r"model\.language_model",
    }

    def __init__(self, name: str, model_class: Any, config_class: Any, grid: int, **configs: dict[str, Any]) -> None:
        self.name = self.model_name = name
        self.model_class, self.config_class, self.grid, self.configs = model_class, config_class, grid, configs

    def config(self, size: str) -> Any:
        tokens = {} if size == "full" else {"image_token_id": TOY_IMAGE_TOKEN, "video_token_id": TOY_VIDEO_TOKEN}
        vision, text = (dict(self.configs[f"{size}_{part}"]) for part in ("vision", "text"))
        return self.config_class(vision_config=vision, text_config=text, tie_word_embeddings=False, **tokens)

    def num_tokens(self, config: Any, frames: int) -> int:
        return -(-frames // 2) * (self.grid // 2) ** 2

    def video(self, config: Any, frames: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        pairs = -(-frames // 2)
        num_patches, patch_values = pairs * self.grid**2, 3 * 2 * config.vision_config.patch_size**2
        inputs = {
            "pixel_values_videos": torch.rand(num_patches, patch_values, device=device, dtype=dtype),
            "video_grid_thw": torch.tensor([[pairs, self.grid, self.grid]]),
        }
        if device.type == "meta":  # what the model would make of the grid, whose numbers it must be able to read
            inputs["position_ids"] = torch.empty(num_patches, 2, dtype=torch.long, device=device)
            if self.config_class is Qwen3VLConfig:
                inputs["interp_indices"] = torch.empty(num_patches, 4, dtype=torch.long, device=device)
                inputs["interp_weights"] = torch.empty(num_patches, 4, device=device)
        else:
            inputs["video_grid_thw"] = inputs["video_grid_thw"].to(device)
        return inputs

    def prepare(self, model: Any) -> None:
        """There are no variants."""


def contenders() -> list[Any]:
    """CrossLMM in its variants, each of which changes one thing, and the models that it is compared with."""
    qwen2_7b = PRESETS["7B"]["text_config"] | {"num_hidden_layers": 28}
    qwen2_half = {
        "vocab_size": 152_000,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    qwen3_8b = {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    toy_vision = {"hidden_size": 192, "num_heads": 4, "out_hidden_size": 512}
    return [
        CrossLMM("2B"),
        CrossLMM("2B", scope="frame"),
        CrossLMM("7B"),
        CrossLMM("7B", scope="frame"),
        CrossLMM("7B", form="kv"),
        CrossLMM("7B-16"),
        LlavaOneVision("LLaVA-OneVision-0.5B", qwen2_half),
        LlavaOneVision("LLaVA-OneVision-7B", qwen2_7b),
        QwenVL(
            "Qwen2.5-VL-7B",
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLConfig,
            28,
            full_vision={"hidden_size": 1280, "out_hidden_size": 3584},
            full_text=qwen2_7b,
            toy_vision=toy_vision | {"depth": 8, "intermediate_size": 576, "fullatt_block_indexes": [7]},
            toy_text=TOY_TEXT | {"bos_token_id": None, "eos_token_id": None},
        ),
        QwenVL(
            "Qwen3-VL-8B",
            Qwen3VLForConditionalGeneration,
            Qwen3VLConfig,
            24,
            full_vision={"out_hidden_size": 4096},
            full_text=qwen3_8b,
            toy_vision=toy_vision | {"depth": 7, "intermediate_size": 720, "deepstack_visual_indexes": [2, 4, 6]},
            toy_text=TOY_TEXT | {"intermediate_size": 1792, "num_hidden_layers": 10, "head_dim": 128},
        ),
    ]


# --- counted --------------------------------------------------------------------------------------------------------


_META_MODELS: dict[tuple[str, str], Any] = {}


def _meta_model(contender: Any, size: str) -> Any:
    key = (contender.model_name, size)
    if key not in _META_MODELS:
        with torch.device("meta"):
            model = contender.model_class(contender.config(size)).eval()
        model.set_attn_implementation("eager")  # the counter knows matrix products; not every fused kernel
        _META_MODELS[key] = model
    return _META_MODELS[key]


@cache
def _costs(preset: str, size: str) -> CheckpointCosts:
    return count_costs(CrossLMM(preset).config(size))


def _counted(function: Callable[[], Any]) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = function()
    return counter.get_total_flops() // 2, result


def count(contender: Any, frames: int, *, size: str = "full") -> dict[str, Any]:
    """Counts a prefill and what it leaves in memory, in bfloat16, without computing anything.

    CrossLMM's forward runs as it is. The others look at values on the way, which a tensor without values does not
    have: their encoder, language model and head run one after the other; the encoder on as many frames as it takes at
    once, since no frame sees another there.
    """
    model = _meta_model(contender, size)
    config, meta = model.config, torch.device("meta")
    text = config.get_text_config()
    tokens = contender.num_tokens(config, frames)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    position_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * torch.bfloat16.itemsize
    row: dict[str, Any] = {"model": contender.name, "frames": frames, "video_tokens": tokens}
    if isinstance(contender, CrossLMM):
        contender.prepare(model)
        config.vision_chunk_size = frames
        ids = torch.full((1, tokens + TEXT_TOKENS), 1)
        ids[:, :tokens] = config.video_token_id
        video = contender.video(config, frames, meta, torch.float32)
        total, _ = _counted(lambda: model(input_ids=ids, **video, use_cache=True, logits_to_keep=1))
        costs = _costs(contender.preset, size)
        row["macs"] = {"total": total}
        row["closed_form"] = multiply_accumulates(config, frames)
        row["weight_bytes"] = costs.weight_bytes
        row["cache_bytes"] = frames * (costs.cache_bytes_per_frame[contender.form] + costs.language_bytes_per_frame)
        return row
    step = contender.frames_at_once
    video = contender.video(config, step, meta, torch.float32)
    vision, _ = _counted(lambda: model.get_video_features(**video))
    embeds = torch.empty(1, tokens + TEXT_TOKENS, text.hidden_size, device=meta)
    language, states = _counted(lambda: model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    head, _ = _counted(lambda: model.lm_head(states[:, -1:]))
    vision = vision * -(-frames // step)
    row["macs"] = {"vision": vision, "language model": language + head, "total": vision + language + head}
    row["weight_bytes"] = sum(parameter.numel() for parameter in model.parameters()) * torch.bfloat16.itemsize
    row["cache_bytes"] = tokens * position_bytes
    return row
