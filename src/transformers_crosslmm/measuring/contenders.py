"""The models that `crosslmm bench` compares: their configs, prompts and inputs.

At "full" size they have the dimensions of the published checkpoints, at "toy" size dimensions that a CPU can run. All
get frames of 384 x 384 pixels.
"""

from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from ..configuration_crosslmm import PRESETS, CrossLMMConfig
from ..modeling_crosslmm import CrossLMMForConditionalGeneration

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


class Contender:
    """A model to compare. model_name: name of the weights; name: the same with settings.

    frames_at_once: frames that the encoder processes together. parts: patterns of the module names of each part.
    """

    model_class: Any
    name: str
    model_name: str
    frames_at_once = 1
    parts = {
        "vision": r"model\.vision_tower",
        "projector": r"model\.multi_modal_projector",
        "language model": r"model\.language_model",
    }

    def config(self, size: str) -> Any:
        """The model's config at "full" or "toy" size."""
        raise NotImplementedError

    def prompt(self, config: Any, frames: int) -> list[int]:
        """Token ids of a video."""
        raise NotImplementedError

    def video(self, config: Any, frames: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Random pixels in the model's input format."""
        size = config.vision_config.image_size
        return {"pixel_values_videos": torch.rand(frames, 3, size, size, device=device, dtype=dtype)}

    def prepare(self, model: Any) -> None:
        """Applies the settings to a model, before each run: contenders may share its weights."""


class CrossLMM(Contender):
    """A preset of CrossLMM. scope: `v2v_scope`. form: `cross_attention_cache`."""

    model_class = CrossLMMForConditionalGeneration
    parts = {
        "V2V": r".*\.cross_attention\.v2v",
        "T2V": r".*\.cross_attention",  # without V2V: T2V with its K and V, and the norm that both share
        **Contender.parts,
    }

    def __init__(self, preset: str, *, scope: str = "video", form: str = "features") -> None:
        self.model_name, self.preset, self.scope, self.form = f"CrossLMM-{preset}", preset, scope, form
        self.name = f"{self.model_name} {scope} {form}"

    def config(self, size: str) -> CrossLMMConfig:
        if size == "full":
            return CrossLMMConfig.from_preset(self.preset, long_context=True)
        preset = PRESETS[self.preset]
        vision = TOY_VISION | {"num_hidden_layers": 7, "patch_size": preset["vision_config"]["patch_size"]}
        return CrossLMMConfig(
            vision_config=vision,
            text_config=dict(TOY_TEXT),
            pooled_grid_size=preset["pooled_grid_size"],
            image_token_id=TOY_IMAGE_TOKEN,
            video_token_id=TOY_VIDEO_TOKEN,
        )

    def prompt(self, config: Any, frames: int) -> list[int]:
        return [config.video_token_id] * config.tokens_per_frame * frames

    def prepare(self, model: Any) -> None:
        model.config.v2v_scope = self.scope
        model.config.cross_attention_cache = self.form


class LlavaOneVision(Contender):
    """LLaVA-OneVision: 26 SigLIP blocks, 14 x 14 pooled tokens per frame, and one token after the video."""

    model_class = LlavaOnevisionForConditionalGeneration

    def __init__(self, name: str, text_config: dict[str, Any]) -> None:
        self.name = self.model_name = name
        self.text_config = text_config

    def config(self, size: str) -> LlavaOnevisionConfig:
        vision: dict[str, Any] = {"model_type": "siglip_vision_model", "vision_use_head": False}
        tokens: dict[str, Any] = {}
        if size == "full":
            vision |= PRESETS["7B"]["vision_config"] | {"num_hidden_layers": 26}
            text = self.text_config
        else:
            vision |= TOY_VISION | {"num_hidden_layers": 6, "patch_size": 14}
            text, tokens = TOY_TEXT, {"image_token_index": TOY_IMAGE_TOKEN, "video_token_index": TOY_VIDEO_TOKEN}
        text = text | {"model_type": "qwen2"}
        tied = text["tie_word_embeddings"]
        return LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied, **tokens)

    def prompt(self, config: Any, frames: int) -> list[int]:
        pooled_grid = (config.vision_config.image_size // config.vision_config.patch_size + 1) // 2
        return [config.video_token_id] * (frames * pooled_grid**2 + 1)

    def video(self, config: Any, frames: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: pixels[None] for name, pixels in super().video(config, frames, device, dtype).items()}


class QwenVL(Contender):
    """Qwen-VL: two frames form one grid of patches, and each 2 x 2 patches one token.

    grid: patches along a side of a 384 x 384 frame, which Qwen2.5-VL resizes to 392 x 392.
    time_tokens: approximate length of the time stamp that Qwen3-VL's processor writes before each two frames.
    """

    frames_at_once = 2
    parts = {
        "vision": r"model\.visual",
        "projector": r"model\.visual\.(merger|deepstack_merger_list\.\d+)",
        "language model": r"model\.language_model",
    }

    def __init__(
        self, name: str, model_class: Any, *, grid: int, time_tokens: int, **configs: dict[str, dict[str, Any]]
    ) -> None:
        self.name = self.model_name = name
        self.model_class, self.grid, self.time_tokens, self.configs = model_class, grid, time_tokens, configs

    def config(self, size: str) -> Any:
        tokens = {} if size == "full" else {"image_token_id": TOY_IMAGE_TOKEN, "video_token_id": TOY_VIDEO_TOKEN}
        parts = {part: dict(config) for part, config in self.configs[size].items()}
        return self.model_class.config_class(**parts, **tokens, tie_word_embeddings=False)

    def prompt(self, config: Any, frames: int) -> list[int]:
        pair = [1] * self.time_tokens + [config.video_token_id] * (self.grid // 2) ** 2
        return pair * -(-frames // 2)

    def video(self, config: Any, frames: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        pairs = -(-frames // 2)
        num_patches, patch_values = pairs * self.grid**2, 3 * 2 * config.vision_config.patch_size**2
        inputs = {"pixel_values_videos": torch.rand(num_patches, patch_values, device=device, dtype=dtype)}
        grids = torch.tensor([[pairs, self.grid, self.grid]])
        if device.type != "meta":
            return inputs | {"video_grid_thw": grids.to(device)}
        # The model reads the grid's values, so it stays on the CPU; tensors derived from it must be given on `device`.
        inputs["position_ids"] = torch.empty(num_patches, 2, dtype=torch.long, device=device)
        if self.time_tokens:  # Qwen3-VL interpolates its table of positions
            inputs["interp_indices"] = torch.empty(num_patches, 4, dtype=torch.long, device=device)
            inputs["interp_weights"] = torch.empty(num_patches, 4, device=device)
        return inputs | {"video_grid_thw": grids}


def contenders() -> list[Contender]:
    """All models to compare: variants of CrossLMM, each with one change, and other video models."""
    qwen2_7b = PRESETS["7B"]["text_config"]
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
    toy_text = TOY_TEXT | {"bos_token_id": None, "eos_token_id": None}
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
            grid=28,
            time_tokens=0,
            full={"vision_config": {"hidden_size": 1280, "out_hidden_size": 3584}, "text_config": qwen2_7b},
            toy={
                "vision_config": toy_vision | {"depth": 8, "intermediate_size": 576, "fullatt_block_indexes": [7]},
                "text_config": toy_text,
            },
        ),
        QwenVL(
            "Qwen3-VL-8B",
            Qwen3VLForConditionalGeneration,
            grid=24,
            time_tokens=8,
            full={"vision_config": {"out_hidden_size": 4096}, "text_config": qwen3_8b},
            toy={
                "vision_config": toy_vision
                | {"depth": 7, "intermediate_size": 720, "deepstack_visual_indexes": [2, 4, 6]},
                "text_config": toy_text | {"intermediate_size": 1792, "num_hidden_layers": 10, "head_dim": 128},
            },
        ),
    ]


__all__ = ["Contender", "CrossLMM", "LlavaOneVision", "QwenVL", "contenders"]
