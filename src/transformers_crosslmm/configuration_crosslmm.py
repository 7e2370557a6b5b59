"""CrossLMM configuration: the sizes and options of the network, values derived from them, and the paper's presets."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig

POOLING_MODES = ("bilinear", "average")
V2V_SCOPES = ("video", "frame", "causal")
CROSS_ATTENTION_CACHES = ("kv", "features")
VISUAL_NORMS = ("none", "layernorm")
VISUAL_TIMES = ("none", "sinusoidal")
VISION_TYPES = ("siglip_vision_model", "clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit")
WEIGHT_LAYOUT = 1

OLD_TEXT_TYPE = "crosslmm_text"
"""`model_type` of text configs in earlier checkpoints, which also held the fields of the cross-attention."""

CROSS_ATTENTION_FIELDS = (
    "cross_attention_interval",
    "cross_attention_layers",
    "cross_attention_cache",
    "use_v2v",
    "use_t2v",
    "v2v_scope",
    "visual_norm",
    "visual_time",
    "gate_init",
)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")


@strict
class CrossLMMConfig(PreTrainedConfig):
    """Configures a vision encoder, token merge, projector and language model with dual cross-attention in some layers.

    The defaults are those of the 2B model.

    vision_config (`PreTrainedConfig` or `dict`, *optional*): a SigLIP (SigLIP2-so400m/14 at 384 px when not given),
        CLIP, DINOv2 or DINOv3 ViT encoder with one square image size. A dict names its type by `model_type`.
    text_config (`PreTrainedConfig` or `dict`, *optional*): any decoder of Transformers whose layers the
        cross-attention fits into; Qwen2.5-1.5B's numbers when not given. A dict names its type by `model_type`.
    image_token_id, video_token_id (`int`): the placeholders in `input_ids`; by default Qwen2.5's.
    cross_attention_interval (`int`, *optional*): K of the paper: every K-th layer, from layer 0 on, has a dual
        cross-attention block. 4 if neither this nor `cross_attention_layers` is given.
    cross_attention_layers (`list[int]`, *optional*): the layers by index, instead of an interval.
    cross_attention_cache (`str`): tensors that generation keeps per video: "kv" (T2V keys and values of every layer)
        or "features" (the original tokens, once for all layers).
    use_v2v, use_t2v (`bool`): whether the branch exists.
    v2v_scope (`str`): the patches that a pooled token attends to: "video" (its whole video, Eq. 6), "frame" (its own
        frame) or "causal" (the frames up to its own).
    visual_norm (`str`): "layernorm" normalises the original tokens, without parameters, before K and V.
    visual_time (`str`): "sinusoidal" adds a code of the frame number to the normalised tokens.
    gate_init (`float`): value of every gate before tanh in a newly initialised model.
    vision_feature_layer (`int`): index in the encoder's `hidden_states` of V of the paper; later blocks are not built.
    vision_chunk_size (`int`): frames per run of the vision encoder.
    pooled_grid_size (`int`): s; a frame becomes s x s pooled tokens.
    pooling_mode (`str`): "bilinear" or "average".
    projector_hidden_size (`int`, *optional*): by default the language model's width.
    tie_word_embeddings (`bool`, *optional*): the text config's value; setting either of the two changes both.
    untrained (`bool`): whether the weights were composed or converted and never trained as a CrossLMM.
    weight_layout (`int`): version of the names and shapes of the checkpoint's tensors; only 1 exists.
    """

    model_type = "crosslmm"
    sub_configs: ClassVar[dict[str, type]] = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache",
        "past_key_values",
        "image_hidden_states",
        "video_hidden_states",
    ]
    # Classes for loading. Written to a checkpoint only if its folder contains the code.
    auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_crosslmm.CrossLMMConfig",
        "AutoModel": "modeling_crosslmm.CrossLMMModel",
        "AutoModelForImageTextToText": "modeling_crosslmm.CrossLMMForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_crosslmm.CrossLMMForConditionalGeneration",
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    cross_attention_interval: int | None = None
    cross_attention_layers: list[int] | None = None
    cross_attention_cache: str = "kv"
    use_v2v: bool = True
    use_t2v: bool = True
    v2v_scope: str = "video"
    visual_norm: str = "none"
    visual_time: str = "none"
    gate_init: float | int = 0.0
    vision_feature_layer: int = -2
    vision_chunk_size: int = 16
    pooled_grid_size: int = 3
    pooling_mode: str = "bilinear"
    projector_hidden_size: int | None = None
    tie_word_embeddings: bool | None = None
    untrained: bool = False
    weight_layout: int = WEIGHT_LAYOUT

    def __post_init__(self, **kwargs):
        if not self.is_remote_code():
            # The installed package provides the code, so `auto_map` from disk is ignored and not saved again.
            kwargs = {name: value for name, value in kwargs.items() if name not in ("auto_map", "custom_pipelines")}
        self.vision_config = self._vision_config(self.vision_config)
        self.text_config = self._text_config(self.text_config)
        self.tie_word_embeddings = self.__dict__.pop("_tie_word_embeddings", None)
        super().__post_init__(**kwargs)

    @staticmethod
    def _vision_config(given: dict | PreTrainedConfig | None) -> PreTrainedConfig:
        if not isinstance(given, PreTrainedConfig):
            fields = dict(SO400M_384 if given is None else given)
            model_type = fields.pop("model_type", SiglipVisionConfig.model_type)
            _check_choice("vision_config.model_type", model_type, VISION_TYPES)
            given = AutoConfig.for_model(model_type, **fields)
        _check_choice("vision_config.model_type", given.model_type, VISION_TYPES)
        if given.model_type == SiglipVisionConfig.model_type:
            given.vision_use_head = False
        return given

    def _text_config(self, given: dict | PreTrainedConfig | None) -> PreTrainedConfig:
        """Builds the language model's config. Cross-attention fields of an earlier checkpoint move to this config, and
        fields missing there have Qwen2.5-1.5B's values."""
        if isinstance(given, PreTrainedConfig):
            return given
        fields = dict(given or {})
        model_type = fields.pop("model_type", None)
        for name in CROSS_ATTENTION_FIELDS:
            if name in fields:
                setattr(self, name, fields.pop(name))
        width = fields.pop("cross_attention_hidden_size", None)
        if width is not None and width != self.vision_config.hidden_size:
            raise ValueError(
                f"`text_config.cross_attention_hidden_size` must be the vision encoder's width "
                f"({self.vision_config.hidden_size}); got {width}. Leave it out: the encoder's width is used."
            )
        if model_type in (None, OLD_TEXT_TYPE):
            return Qwen2Config(**{**QWEN2_5_1_5B, **fields})
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`text_config.model_type` must be a model type of Transformers, such as 'qwen2' or 'llama'; got "
                f"{model_type!r}."
            )
        return AutoConfig.for_model(model_type, **fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, including `tie_word_embeddings`."""
        return super().to_dict() | {"tie_word_embeddings": self.tie_word_embeddings}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields for config.json; `tie_word_embeddings` is left out, because the text config has it."""
        return {name: value for name, value in super().to_diff_dict().items() if name != "tie_word_embeddings"}

    def validate_cross_attention(self) -> None:
        """Checks the fields of the cross-attention against each other and the depth of the language model."""
        _check_choice("cross_attention_cache", self.cross_attention_cache, CROSS_ATTENTION_CACHES)
        _check_choice("v2v_scope", self.v2v_scope, V2V_SCOPES)
        _check_choice("visual_norm", self.visual_norm, VISUAL_NORMS)
        _check_choice("visual_time", self.visual_time, VISUAL_TIMES)
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        if missing := [name for name in needed if getattr(self.text_config, name, None) is None]:
            raise ValueError(
                f"`text_config` must be the config of a decoder; a {type(self.text_config).__name__} has no "
                f"{', '.join(missing)}. Pass the language model's own config (`config.get_text_config()` of a "
                "composite one)."
            )
        interval, layers = self.cross_attention_interval, self.cross_attention_layers
        depth = self.text_config.num_hidden_layers
        if interval is not None and interval < 1:
            raise ValueError(f"`cross_attention_interval` must be at least 1; got {interval}.")
        if layers is not None:
            if sorted(set(layers)) != layers:
                raise ValueError(f"`cross_attention_layers` must be ascending and without repeats; got {layers}.")
            if any(not 0 <= layer < depth for layer in layers):
                raise ValueError(
                    f"`cross_attention_layers` must lie between 0 and {depth - 1} (`num_hidden_layers` is {depth}); "
                    f"got {layers}."
                )
            if interval is not None and layers != list(range(0, depth, interval)):
                raise ValueError(
                    f"`cross_attention_layers` {layers} contradicts `cross_attention_interval` {interval}, which "
                    f"means {list(range(0, depth, interval))}; give one of the two."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`text_config.num_attention_heads` must be a multiple of `num_key_value_heads`; got "
                f"{self.num_attention_heads} heads and {self.num_key_value_heads} key/value heads."
            )
        if not math.isfinite(self.gate_init):
            raise ValueError(f"`gate_init` must be finite; got {self.gate_init}.")
        if self.visual_time == "sinusoidal":
            if self.visual_norm == "none":
                raise ValueError(
                    '`visual_time="sinusoidal"` needs normalised tokens: set `visual_norm="layernorm"` too.'
                )
            if self.vision_config.hidden_size % 2:
                raise ValueError(
                    '`visual_time="sinusoidal"` needs a vision encoder of even width; '
                    f"got `vision_config.hidden_size` {self.vision_config.hidden_size}."
                )

    def validate_vision(self) -> None:
        """Checks the fields of the encoder, the token merge and the projector."""
        _check_choice("pooling_mode", self.pooling_mode, POOLING_MODES)
        depth = self.vision_config.num_hidden_layers
        if not -depth - 1 <= self.vision_feature_layer <= depth:
            raise ValueError(
                f"`vision_feature_layer` must lie between {-depth - 1} and {depth} (the encoder has {depth} blocks); "
                f"got {self.vision_feature_layer}."
            )
        if self.vision_config.hidden_size % self.vision_config.num_attention_heads:
            raise ValueError(
                f"`vision_config.num_attention_heads` must divide its width {self.vision_config.hidden_size}; "
                f"got {self.vision_config.num_attention_heads}."
            )
        if self.vision_chunk_size < 1:
            raise ValueError(f"`vision_chunk_size` must be at least 1 frame; got {self.vision_chunk_size}.")
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(self.vision_config, name), int):
                raise ValueError(
                    f"`vision_config.{name}` must be one number (frames are square); "
                    f"got {getattr(self.vision_config, name)}."
                )
        if not 1 <= self.pooled_grid_size <= self.patch_grid_size:
            raise ValueError(
                f"`pooled_grid_size` must lie between 1 and the encoder's patch grid ({self.patch_grid_size}); "
                f"got {self.pooled_grid_size}."
            )
        if self.projector_hidden_size is not None and self.projector_hidden_size < 1:
            raise ValueError(f"`projector_hidden_size` must be at least 1; got {self.projector_hidden_size}.")
        if self.weight_layout != WEIGHT_LAYOUT:
            raise ValueError(
                f"`weight_layout` must be {WEIGHT_LAYOUT}, the one this version reads; got {self.weight_layout}. "
                "Upgrade transformers_crosslmm: a newer version wrote this checkpoint."
            )
        if self.image_token_id == self.video_token_id:
            raise ValueError(
                f"`image_token_id` and `video_token_id` must differ; both are {self.image_token_id}. "
                "The model uses them to distinguish images from videos."
            )

    @property
    def cross_attention_layer_indices(self) -> list[int]:
        """The layers that have a dual cross-attention block, given by list or by interval."""
        if not (self.use_v2v or self.use_t2v):
            return []
        if self.cross_attention_layers is not None:
            return self.cross_attention_layers
        return list(range(0, self.text_config.num_hidden_layers, self.cross_attention_interval or 4))

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the language model and of the cross-attention."""
        return self.text_config.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads of the language model and of the cross-attention."""
        return getattr(self.text_config, "num_key_value_heads", None) or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Head width of the language model and of the cross-attention."""
        own = getattr(self.text_config, "head_dim", None)
        return own or self.text_config.hidden_size // self.num_attention_heads

    @property
    def max_sequence_length(self) -> int:
        """The most positions of a sequence: `max_position_embeddings`, or more with rope scaling."""
        longest = self.text_config.max_position_embeddings
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)  # some models have one setting per kind of layer
        if rope.get("rope_type") in ("yarn", "linear", "dynamic"):
            original = rope.get("original_max_position_embeddings") or longest
            return max(longest, int(original * rope["factor"]))
        return longest

    @property
    def patch_grid_size(self) -> int:
        """Patches along one side of a frame: g."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """Pooled tokens (and placeholders) of one frame or image: s x s."""
        return self.pooled_grid_size**2

    @property
    def num_vision_blocks(self) -> int:
        """Number of encoder blocks to build: those that `vision_feature_layer` needs."""
        depth = self.vision_config.num_hidden_layers
        return self.vision_feature_layer % (depth + 1)

    @classmethod
    def from_preset(
        cls, name: str, *, flavour: str = "paper", tokens_per_frame: int | None = None, long_context: bool = False
    ) -> "CrossLMMConfig":
        """Creates a config of the paper's sizes.

        name: "2B" (9 tokens per frame), "7B" (9) or "7B-16" (16).
        flavour: "paper" has no options that the paper does not name; "recommended" turns on those that our experiments
            on synthetic video at tiny scale support (docs/decisions.md).
        tokens_per_frame: the preset's own, or 1.
        long_context: whether to use the YaRN setting that Qwen2.5 documents (131,072 positions instead of 32,768).
        """
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(map(repr, PRESETS))}; got {name!r}.")
        if flavour not in FLAVOURS:
            raise ValueError(f"`flavour` must be one of {', '.join(map(repr, FLAVOURS))}; got {flavour!r}.")
        preset = PRESETS[name]
        own_tokens = preset["pooled_grid_size"] ** 2
        if tokens_per_frame not in (None, 1, own_tokens):
            raise ValueError(f"`tokens_per_frame` of {name!r} must be 1 or {own_tokens}; got {tokens_per_frame}.")
        text_config = dict(preset["text_config"])
        if long_context:
            text_config |= {"rope_parameters": dict(YARN_131072), "max_position_embeddings": 131_072}
        return cls(
            vision_config=dict(preset["vision_config"]),
            text_config=text_config,
            pooled_grid_size=1 if tokens_per_frame == 1 else preset["pooled_grid_size"],
            **FLAVOURS[flavour],
        )


def _tie_word_embeddings(config: CrossLMMConfig) -> bool | None:
    """Whether input and output embeddings are one tensor; the text config holds the value."""
    if isinstance(config.text_config, PreTrainedConfig):
        return config.text_config.tie_word_embeddings
    return config.__dict__.get("_tie_word_embeddings")


def _set_tie_word_embeddings(config: CrossLMMConfig, value: bool | None) -> None:
    if not isinstance(config.__dict__.get("text_config"), PreTrainedConfig):
        config.__dict__["_tie_word_embeddings"] = value
    elif value is not None:
        config.text_config.tie_word_embeddings = value


# Set after the class is created: inside the class, the property would become the field's default.
CrossLMMConfig.tie_word_embeddings = property(_tie_word_embeddings, _set_tie_word_embeddings)  # type: ignore

SO400M_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
GIANT_384 = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
}
QWEN2_5_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
QWEN2_5_7B = {
    **QWEN2_5_1_5B,
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "2B": {"vision_config": SO400M_384, "text_config": QWEN2_5_1_5B, "pooled_grid_size": 3},
    "7B": {"vision_config": SO400M_384, "text_config": QWEN2_5_7B, "pooled_grid_size": 3},
    "7B-16": {"vision_config": GIANT_384, "text_config": QWEN2_5_7B, "pooled_grid_size": 4},
}
FLAVOURS: dict[str, dict[str, Any]] = {
    "paper": {},
    "recommended": {"visual_norm": "layernorm", "visual_time": "sinusoidal"},
}
YARN_131072 = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32_768,
}

__all__ = ["CrossLMMConfig"]
