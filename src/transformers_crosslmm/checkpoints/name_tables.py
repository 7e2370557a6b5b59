"""Names of tensors in other checkpoints, and ours. Data: `convert.py` says what is done with it.

A table is read from top to bottom and the first row that fits a name wins. `*` stands for any part of a name and is
carried over. A row that leads to None names what CrossLMM has no place for; it is reported, never lost in silence.
Read from right to left, the rows of a layout that can be written lead back.
"""

from typing import Any

from ..configuration_crosslmm import GIANT_384, SO400M_384

SIGLIP: dict[str, str | None] = {
    # `SiglipModel`, the form in which SigLIP and fixed-resolution SigLIP2 are published
    "vision_model.embeddings.*": "model.vision_tower.embeddings.*",
    "vision_model.encoder.*": "model.vision_tower.encoder.*",
    "vision_model.post_layernorm.*": None,
    "vision_model.head.*": None,
    "text_model.*": None,
    "logit_scale": None,
    "logit_bias": None,
    # `SiglipVisionModel` alone
    "embeddings.*": "model.vision_tower.embeddings.*",
    "encoder.*": "model.vision_tower.encoder.*",
    "post_layernorm.*": None,
    "head.*": None,
}

QWEN2: dict[str, str | None] = {
    # `Qwen2ForCausalLM`
    "lm_head.weight": "lm_head.weight",
    "*.rotary_emb.inv_freq": None,
    "model.*": "model.language_model.*",
    # `Qwen2Model` alone
    "embed_tokens.*": "model.language_model.embed_tokens.*",
    "layers.*": "model.language_model.layers.*",
    "norm.*": "model.language_model.norm.*",
}

LLAVA_ONEVISION: dict[str, str | None] = {
    # `LlavaOnevisionForConditionalGeneration` as on the Hub, and as today's Transformers writes it
    "vision_tower.vision_model.post_layernorm.*": None,
    "vision_tower.vision_model.head.*": None,
    "vision_tower.vision_model.*": "model.vision_tower.*",
    "vision_tower.post_layernorm.*": None,
    "vision_tower.head.*": None,
    "vision_tower.*": "model.vision_tower.*",
    "multi_modal_projector.*": "model.multi_modal_projector.*",
    "image_newline": None,
    "language_model.lm_head.*": "lm_head.*",
    "language_model.model.*": "model.language_model.*",
    # the names inside the class
    "model.vision_tower.post_layernorm.*": None,
    "model.vision_tower.head.*": None,
    "model.vision_tower.*": "model.vision_tower.*",
    "model.multi_modal_projector.*": "model.multi_modal_projector.*",
    "model.image_newline": None,
    "model.language_model.*": "model.language_model.*",
    "lm_head.weight": "lm_head.weight",
}

LLAVA_NEXT: dict[str, str | None] = {
    # LLaVA-NeXT's own files (lmms-lab's LLaVA-OneVision and LLaVA-Video): SigLIP without its last block and head.
    # The names of the dual cross-attention are the authors' secret; until they are known, `model.*` gives them ours.
    "model.vision_tower.vision_tower.vision_model.post_layernorm.*": None,
    "model.vision_tower.vision_tower.vision_model.head.*": None,
    "model.vision_tower.vision_tower.vision_model.*": "model.vision_tower.*",
    "model.mm_projector.0.*": "model.multi_modal_projector.linear_1.*",
    "model.mm_projector.2.*": "model.multi_modal_projector.linear_2.*",
    "model.image_newline": None,
    "model.faster_token": None,
    "*.rotary_emb.inv_freq": None,
    "lm_head.weight": "lm_head.weight",
    "model.*": "model.language_model.*",
}

VISION_TOWERS: dict[str, dict[str, Any]] = {
    # The config.json of LLaVA-NeXT names the encoder (`mm_vision_tower`) without its sizes
    "siglip-so400m-patch14-384": SO400M_384,
    "siglip2-so400m-patch14-384": SO400M_384,
    "siglip2-giant-opt-patch16-384": GIANT_384,
}

LLAVA_NEXT_POOLING_MODES = {"bilinear": "bilinear", "average": "average"}
"""`mm_spatial_pool_mode` as our `pooling_mode`; there is no counterpart of "max"."""

BACKBONES = {
    # The paper's, by preset: vision encoder and language model
    "2B": ("google/siglip2-so400m-patch14-384", "Qwen/Qwen2.5-1.5B-Instruct"),
    "7B": ("google/siglip2-so400m-patch14-384", "Qwen/Qwen2.5-7B-Instruct"),
    "7B-16": ("google/siglip2-giant-opt-patch16-384", "Qwen/Qwen2.5-7B-Instruct"),
}
