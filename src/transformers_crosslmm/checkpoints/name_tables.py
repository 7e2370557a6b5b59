"""Tables that map tensor names of other checkpoints to ours.

The first row that matches a name applies. `*` matches any part of a name and is copied to our name. None marks tensors
that CrossLMM has no place for; these are reported. Parts of a vision encoder that our class does not build need no row
(see `conversion.renamed_tensors`). `reversed_table` inverts a table, for writing.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configuration_crosslmm import GIANT_384, SO400M_384
from .folder import read_json, stored_tensors

NameTable = Mapping[str, str | None]

NEW_IN_LAYER = re.compile(r"(model\.language_model\.layers\.\d+)\.cross_attention\.(.+)")
"""Our names of the tensors that are new in a layer of the language model."""

VISION: NameTable = {
    # a vision encoder on the Hub, alone or as a part of a CLIP or SigLIP
    "text_model.*": None,
    "text_projection.*": None,
    "visual_projection.*": None,
    "logit_scale": None,
    "logit_bias": None,
    "*.position_ids": None,
    "vision_model.*": "model.vision_tower.*",
    "*": "model.vision_tower.*",
}

TEXT: NameTable = {
    # a language model with or without its head
    "lm_head.*": "lm_head.*",
    "*.rotary_emb.inv_freq": None,
    "model.*": "model.language_model.*",
    "*": "model.language_model.*",
}

LLAVA_ONEVISION: NameTable = {
    # `LlavaOnevisionForConditionalGeneration` on the Hub, and as current Transformers writes it
    "vision_tower.vision_model.*": "model.vision_tower.*",
    "vision_tower.*": "model.vision_tower.*",
    "multi_modal_projector.*": "model.multi_modal_projector.*",
    "image_newline": None,
    "language_model.lm_head.*": "lm_head.*",
    "language_model.model.*": "model.language_model.*",
    # the names inside the class
    "model.vision_tower.*": "model.vision_tower.*",
    "model.multi_modal_projector.*": "model.multi_modal_projector.*",
    "model.image_newline": None,
    "model.language_model.*": "model.language_model.*",
    "lm_head.weight": "lm_head.weight",
}

LLAVA_NEXT: NameTable = {
    # LLaVA-NeXT's own files (lmms-lab's LLaVA-OneVision and LLaVA-Video): SigLIP without its last block and head.
    # The authors' names of the dual cross-attention are not published; `model.*` expects ours.
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
    # LLaVA-NeXT's config.json names the encoder (`mm_vision_tower`) without its sizes
    "siglip-so400m-patch14-384": SO400M_384,
    "siglip2-so400m-patch14-384": SO400M_384,
    "siglip2-giant-opt-patch16-384": GIANT_384,
}

BACKBONES = {
    # the paper's vision encoder and language model, by preset
    "2B": ("google/siglip2-so400m-patch14-384", "Qwen/Qwen2.5-1.5B-Instruct"),
    "7B": ("google/siglip2-so400m-patch14-384", "Qwen/Qwen2.5-7B-Instruct"),
    "7B-16": ("google/siglip2-giant-opt-patch16-384", "Qwen/Qwen2.5-7B-Instruct"),
}


def rename(name: str, table: NameTable) -> str | None:
    """Our name of a tensor, or None if CrossLMM has no place for it. Raises KeyError if no row matches."""
    for pattern, target in table.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\*", "(.*)"), name)
        if match:
            return target and target.replace("*", "{}").format(*match.groups())
    raise KeyError(name)


def reversed_table(table: NameTable) -> NameTable:
    """Inverts a table: from our names to theirs."""
    reverse: dict[str, str | None] = {}
    for pattern, target in table.items():
        if target is not None:
            reverse.setdefault(target, pattern)
    return reverse


def read_name_table(path: str | os.PathLike) -> NameTable:
    """Reads rows to be put before those of `LLAVA_NEXT`, from a JSON object {their name: our name or null}.

    Raises ValueError unless both names of a row have equally many `*`.
    """
    table = read_json(Path(path))
    for pattern, target in table.items():
        if not (target is None or (isinstance(target, str) and target.count("*") == pattern.count("*"))):
            raise ValueError(
                f"A row of a name table must map to null, or to a name with equally many `*`; "
                f"{path} has {pattern!r}: {target!r}."
            )
    return table


def transformers_key_mapping(folder: str | os.PathLike, table: NameTable) -> dict[str, str]:
    """Converts a table to the `key_mapping` of `from_pretrained(folder, config=..., key_mapping=...)`.

    Missing weights then get Transformers' initialisation, not that of a conversion, and `save_pretrained` writes the
    folder's names again.
    """
    mapping = {}
    for name in stored_tensors(Path(folder)):
        target = rename(name, table)
        if target not in (None, name):
            mapping[f"^{re.escape(name)}$"] = str(target)
    return mapping
