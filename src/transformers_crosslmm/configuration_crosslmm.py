"""CrossLMM configuration: the numbers of the network, what derives from them, and the paper's sizes."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig

POOLING_MODES = ("bilinear", "average")
TEXT_TYPES = ("crosslmm_text", "qwen2")
V2V_SCOPES = ("video", "frame", "causal")
CROSS_ATTENTION_CACHES = ("kv", "features")
VISUAL_NORMS = ("none", "layernorm")
VISUAL_TIMES = ("none", "sinusoidal")
WEIGHT_LAYOUT = 1


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")


@strict
class CrossLMMTextConfig(Qwen2Config):
    """Qwen2 with dual cross-attention in some of its layers. The defaults are Qwen2.5-1.5B's.

    cross_attention_interval (`int`, *optional*): K of the paper: every K-th layer, from layer 0 on, looks at the
        original tokens. 4 when neither this nor `cross_attention_layers` is given.
    cross_attention_layers (`list[int]`, *optional*): the layers by index, instead of an interval.
    cross_attention_hidden_size (`int`, *optional*): D, the width of the original tokens. `CrossLMMConfig` fills it
        from its vision config; 1152 alone.
    cross_attention_cache (`str`): what generation keeps per video: "kv" (T2V keys and values of every layer) or
        "features" (the original tokens, once for all layers).
    use_v2v, use_t2v (`bool`): whether the branch exists.
    v2v_scope (`str`): what a pooled token sees: its whole "video" (Eq. 6), its own "frame", or, "causal", the frames
        up to its own.
    visual_norm (`str`): "layernorm" normalises the original tokens, without parameters, before K and V.
    visual_time (`str`): "sinusoidal" adds a code of the frame's number to the normalised tokens.
    gate_init (`float`): value of every gate before tanh in a newly initialised model.
    """

    model_type = "crosslmm_text"
    base_config_key = "text_config"
    default_theta = 1_000_000.0
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        **Qwen2Config.base_model_tp_plan,
        **{
            f"layers.*.cross_attention.{branch}.{name}_proj": "rowwise" if name == "o" else "colwise"
            for branch in ("v2v", "t2v")
            for name in "qkvo"
        },
    }

    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int | None = 2
    tie_word_embeddings: bool = True
    cross_attention_interval: int | None = None
    cross_attention_layers: list[int] | None = None
    cross_attention_hidden_size: int | None = None
    cross_attention_cache: str = "kv"
    use_v2v: bool = True
    use_t2v: bool = True
    v2v_scope: str = "video"
    visual_norm: str = "none"
    visual_time: str = "none"
    gate_init: float | int = 0.0

    def __post_init__(self, **kwargs):
        if self.cross_attention_hidden_size is None:
            self.cross_attention_hidden_size = 1152
        super().__post_init__(**kwargs)

    def validate_cross_attention(self) -> None:
        """Checks the fields of the cross-attention against each other and the depth of the network."""
        _check_choice("cross_attention_cache", self.cross_attention_cache, CROSS_ATTENTION_CACHES)
        _check_choice("v2v_scope", self.v2v_scope, V2V_SCOPES)
        _check_choice("visual_norm", self.visual_norm, VISUAL_NORMS)
        _check_choice("visual_time", self.visual_time, VISUAL_TIMES)
        interval, layers, depth = self.cross_attention_interval, self.cross_attention_layers, self.num_hidden_layers
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
        heads, key_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % key_heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size` and be a multiple of `num_key_value_heads`; got "
                f"{heads} heads, {key_heads} key/value heads and width {self.hidden_size}."
            )
        if not math.isfinite(self.gate_init):
            raise ValueError(f"`gate_init` must be finite; got {self.gate_init}.")
        if self.cross_attention_hidden_size < 1:
            raise ValueError(
                f"`cross_attention_hidden_size` must be at least 1; got {self.cross_attention_hidden_size}."
            )
        if self.visual_time == "sinusoidal":
            if self.visual_norm == "none":
                raise ValueError(
                    '`visual_time="sinusoidal"` is added to normalised tokens: set `visual_norm="layernorm"` too.'
                )
            if self.cross_attention_hidden_size % 2:
                raise ValueError(
                    '`visual_time="sinusoidal"` needs an even `cross_attention_hidden_size`; '
                    f"got {self.cross_attention_hidden_size}."
                )

    @property
    def cross_attention_layer_indices(self) -> list[int]:
        """The layers that hold a dual cross-attention block, whichever way they were given."""
        if self.cross_attention_layers is not None:
            return self.cross_attention_layers
        return list(range(0, self.num_hidden_layers, self.cross_attention_interval or 4))

    @property
    def max_sequence_length(self) -> int:
        """Most positions a sequence may have: `max_position_embeddings`, or what rope scaling stretches it to."""
        rope = self.rope_parameters
        original = rope.get("original_max_position_embeddings") or self.max_position_embeddings
        if rope.get("rope_type", "default") in ("yarn", "linear", "dynamic"):
            return max(self.max_position_embeddings, int(original * rope["factor"]))
        return self.max_position_embeddings


@strict
class CrossLMMConfig(PreTrainedConfig):
    """A SigLIP encoder, a token merge, a projector and a Qwen2 with dual cross-attention. The defaults are the 2B's.

    vision_config (`SiglipVisionConfig` or `dict`, *optional*): SigLIP2-so400m/14 at 384 px when not given. Its pooling
        head is never built.
    text_config (`CrossLMMTextConfig` or `dict`, *optional*)
    image_token_id, video_token_id (`int`): the placeholders in `input_ids`; Qwen2.5's own.
    vision_feature_layer (`int`): the SigLIP hidden state that is V of the paper, as an index into `hidden_states`.
        Later blocks are not built.
    vision_chunk_size (`int`): frames per run of the vision encoder.
    pooled_grid_size (`int`): s; a frame becomes s x s pooled tokens.
    pooling_mode (`str`): "bilinear" or "average".
    projector_hidden_size (`int`, *optional*): the LLM's width when not given.
    tie_word_embeddings (`bool`, *optional*): the text config's value.
    untrained (`bool`): whether the weights were put together or converted, and never trained as a CrossLMM since.
    weight_layout (`int`): which names and shapes the checkpoint's tensors have; there is one layout so far.
    """

    model_type = "crosslmm"
    sub_configs: ClassVar[dict[str, type]] = {"vision_config": SiglipVisionConfig, "text_config": CrossLMMTextConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "image_hidden_states",
        "video_hidden_states",
    ]
    # The classes to load a config with. In the files of a checkpoint only when the code lies beside them.
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
            # What a folder says of the code beside it is no concern of the installed package, and is not saved by it.
            kwargs = {name: value for name, value in kwargs.items() if name not in ("auto_map", "custom_pipelines")}
        if not isinstance(self.vision_config, PreTrainedConfig):
            given = SO400M_384 if self.vision_config is None else self.vision_config
            self._check_vision_type(given.get("model_type", SiglipVisionConfig.model_type))
            self.vision_config = SiglipVisionConfig(**given)
        self._check_vision_type(self.vision_config.model_type)
        self.vision_config.vision_use_head = False

        width = self.vision_config.hidden_size
        if isinstance(self.text_config, CrossLMMTextConfig):
            # 1152 is what a text config says that was built alone; any other width was asked for.
            if self.text_config.cross_attention_hidden_size == 1152:
                self.text_config.cross_attention_hidden_size = width
        elif isinstance(self.text_config, PreTrainedConfig):
            raise ValueError(
                f"`text_config` must be a `CrossLMMTextConfig` or a dict of its fields; "
                f"got {type(self.text_config).__name__}."
            )
        else:
            given = {"cross_attention_hidden_size": width, **(self.text_config or {})}
            if (kind := given.pop("model_type", CrossLMMTextConfig.model_type)) not in TEXT_TYPES:
                raise ValueError(f"`text_config` must describe a Qwen2 ({' or '.join(TEXT_TYPES)}); got {kind!r}.")
            self.text_config = CrossLMMTextConfig(**given)

        tied = self.text_config.tie_word_embeddings
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = tied
        elif self.tie_word_embeddings != tied:
            raise ValueError(
                f"`tie_word_embeddings={self.tie_word_embeddings}` contradicts the text config's {tied}; "
                "set it in the text config only."
            )
        super().__post_init__(**kwargs)

    @staticmethod
    def _check_vision_type(model_type: str) -> None:
        if model_type != SiglipVisionConfig.model_type:
            raise ValueError(
                "`vision_config` must describe a fixed-resolution SigLIP or SigLIP2 encoder "
                f"({SiglipVisionConfig.model_type!r}); got {model_type!r}."
            )

    def validate_vision(self) -> None:
        """Checks the fields that concern the encoder, the token merge and the projector."""
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
        if self.text_config.cross_attention_hidden_size != self.vision_config.hidden_size:
            raise ValueError(
                f"`text_config.cross_attention_hidden_size` must be the vision encoder's width "
                f"({self.vision_config.hidden_size}); got {self.text_config.cross_attention_hidden_size}. "
                "Leave it out and it is filled in."
            )
        if self.weight_layout != WEIGHT_LAYOUT:
            raise ValueError(
                f"`weight_layout` must be {WEIGHT_LAYOUT}, the one this version reads; got {self.weight_layout}. "
                "Upgrade transformers_crosslmm to read a checkpoint written by a newer one."
            )
        if self.image_token_id == self.video_token_id:
            raise ValueError(
                f"`image_token_id` and `video_token_id` must differ; both are {self.image_token_id}. "
                "The tokens tell images from videos."
            )

    @property
    def patch_grid_size(self) -> int:
        """g: patches along one side of a frame."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """Pooled tokens, and so placeholders, of one frame or image: s x s."""
        return self.pooled_grid_size**2

    @property
    def num_vision_blocks(self) -> int:
        """Blocks of the encoder that are built: those that `vision_feature_layer` needs."""
        depth = self.vision_config.num_hidden_layers
        return self.vision_feature_layer % (depth + 1)

    @classmethod
    def from_preset(
        cls, name: str, *, flavour: str = "paper", tokens_per_frame: int | None = None, long_context: bool = False
    ) -> "CrossLMMConfig":
        """The paper's sizes.

        name: "2B" (9 tokens a frame), "7B" (9) or "7B-16" (16).
        flavour: "paper" has none of the options that the paper does not name; "recommended" turns on what our
            experiments on synthetic video at tiny scale support (docs/decisions.md).
        tokens_per_frame: the preset's own, or 1.
        long_context: with the YaRN setting that Qwen2.5 documents (131,072 positions instead of 32,768).
        """
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(map(repr, PRESETS))}; got {name!r}.")
        if flavour not in FLAVOURS:
            raise ValueError(f"`flavour` must be one of {', '.join(map(repr, FLAVOURS))}; got {flavour!r}.")
        preset = PRESETS[name]
        own_tokens = preset["pooled_grid_size"] ** 2
        if tokens_per_frame not in (None, 1, own_tokens):
            raise ValueError(f"`tokens_per_frame` of {name!r} must be 1 or {own_tokens}; got {tokens_per_frame}.")
        text_config: dict[str, Any] = {**preset["text_config"], **FLAVOURS[flavour]}
        if long_context:
            text_config |= {"rope_parameters": dict(YARN_131072), "max_position_embeddings": 131_072}
        return cls(
            vision_config=dict(preset["vision_config"]),
            text_config=text_config,
            pooled_grid_size=1 if tokens_per_frame == 1 else preset["pooled_grid_size"],
        )


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
QWEN2_5_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "2B": {"vision_config": SO400M_384, "text_config": {}, "pooled_grid_size": 3},
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

__all__ = ["CrossLMMConfig", "CrossLMMTextConfig"]
