"""Language models to compose with SigLIP2-so400m: every tensor of each, at real size and without memory, goes through
`compose`'s names, shapes and new weights; then a frame of 384 x 384 pixels is counted. Writes backbones.json beside
this file.

    python benchmarks/backbones.py
"""

import json
from functools import partial
from pathlib import Path

import torch
from origin import origin
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from transformers_crosslmm import CrossLMMConfig
from transformers_crosslmm.checkpoints.compose import network_fields
from transformers_crosslmm.checkpoints.conversion import check_complete, renamed_tensors
from transformers_crosslmm.checkpoints.folder import StoredTensor
from transformers_crosslmm.checkpoints.inspect import count_costs
from transformers_crosslmm.checkpoints.model_card import counted_costs
from transformers_crosslmm.checkpoints.name_tables import TEXT, VISION
from transformers_crosslmm.checkpoints.new_weights import initial_tensors, with_new_rows
from transformers_crosslmm.configuration_crosslmm import QWEN2_5_1_5B, QWEN2_5_7B, SO400M_384

QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "max_position_embeddings": 40_960, "head_dim": 128}
LLAMA = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 131_072}


def sizes(hidden: int, mlp: int, layers: int, heads: int, key_heads: int, *, tied: bool) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "tie_word_embeddings": tied,
    }


# Of the six marks, Qwen's tokenizers have all, SmolLM3's two, Llama's and Mistral's none.
LANGUAGE_MODELS = {
    "Qwen2.5-1.5B": ({"model_type": "qwen2", **QWEN2_5_1_5B}, 0),
    "Qwen2.5-7B": ({"model_type": "qwen2", **QWEN2_5_7B}, 0),
    "Qwen3-1.7B": (QWEN3 | sizes(2048, 6144, 28, 16, 8, tied=True), 0),
    "Qwen3-4B": (QWEN3 | sizes(2560, 9728, 36, 32, 8, tied=True), 0),
    "Qwen3-8B": (QWEN3 | sizes(4096, 12_288, 36, 32, 8, tied=False), 0),
    "Llama-3.2-1B": (LLAMA | sizes(2048, 8192, 16, 32, 8, tied=True), 6),
    "Llama-3.2-3B": (LLAMA | sizes(3072, 8192, 28, 24, 8, tied=True), 6),
    "Llama-3.1-8B": (LLAMA | sizes(4096, 14_336, 32, 32, 8, tied=False), 6),
    "Mistral-7B-v0.3": (
        {"model_type": "mistral", "vocab_size": 32_768, "max_position_embeddings": 32_768, "sliding_window": None}
        | sizes(4096, 14_336, 32, 32, 8, tied=False),
        6,
    ),
    "SmolLM3-3B": (
        {"model_type": "smollm3", "vocab_size": 128_256, "max_position_embeddings": 65_536}
        | sizes(2048, 11_008, 36, 16, 4, tied=True),
        4,
    ),
}


def stored(model: torch.nn.Module, *, tied: bool = False) -> dict[str, StoredTensor]:
    """A model's tensors as a file would have them; there is nothing to read."""
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names.pop("lm_head.weight" if tied else "", None)
    return {
        name: StoredTensor(shape, torch.bfloat16, partial(torch.empty, shape, device="meta"))
        for name, shape in names.items()
    }


def composed(fields: dict, new_marks: int) -> dict:
    """The figures of one language model with the encoder, once every tensor of both has found its place."""
    text_config = AutoConfig.for_model(**fields)
    grown = fields.get("vocab_size", text_config.vocab_size) + new_marks
    config = CrossLMMConfig(
        vision_config=SO400M_384, text_config=network_fields(text_config) | {"vocab_size": grown}, dtype=torch.bfloat16
    )
    with torch.device("meta"):
        language_model, encoder = (
            AutoModelForCausalLM.from_config(text_config),
            AutoModel.from_config(config.vision_config),
        )
    text, _ = renamed_tensors(stored(language_model, tied=config.tie_word_embeddings), TEXT, config)
    vision, _ = renamed_tensors(stored(encoder), VISION, config)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in text:
            text[name] = with_new_rows(text[name], grown, (), key=name)
    taken_over = {**vision, **text}
    new = initial_tensors(config, taken_over, dtype=torch.bfloat16, seed=0)
    check_complete({**taken_over, **new}, config)
    costs = count_costs(config)
    return {
        "parameters": sum(costs.parts.values()),
        "new_parameters": sum(torch.Size(tensor.shape).numel() for tensor in new.values()),
        "weight_bytes": costs.weight_bytes,
        "context": costs.max_positions,
        "frames_in_context": costs.frames_in_context(costs.max_positions),
        "cross_attention_layers": len(config.cross_attention_layer_indices),
        "language_bytes_per_frame": costs.language_bytes_per_frame,
        "features_bytes_per_frame": costs.cache_bytes_per_frame["features"],
        "kv_bytes_per_frame": costs.cache_bytes_per_frame["kv"],
        "macs_per_frame": counted_costs(config).macs_per_frame,
    }


def main() -> None:
    results = origin(__file__) | {
        "backbones": {name: composed(*given) for name, given in LANGUAGE_MODELS.items()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
