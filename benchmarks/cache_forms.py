"""What the two forms of the visual cache cost: a decode step and a second question, on a CPU.

    python benchmarks/cache_forms.py             # -> benchmarks/cache_forms.json

One layer of a 7B at its real width: the language model's own, and T2V over videos of several lengths in both forms.
Original tokens are random; float32, because a CPU turns half precision into it first. CPU seconds of one thread,
medians, the forms in turn. A step is one token, a second question QUESTION_TOKENS. Beside them, counted for the full
7B in bfloat16: what a step reads, and its multiply-accumulates.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from origin import origin
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from transformers_crosslmm import CrossLMMConfig
from transformers_crosslmm.cache_crosslmm import Medium, VisualMemory, attach_visual_memory
from transformers_crosslmm.checkpoints.inspect import count_costs
from transformers_crosslmm.cross_attention_crosslmm import CrossLMMCrossAttentionBranch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "cache_forms.json"
FRAMES, COUNTED = (16, 64, 256), (256, 660, 3600)
FORMS = ("kv", "features")
QUESTION_TOKENS, ROUNDS = 32, 5


def counted(frames: int) -> dict[str, dict[str, float]]:
    """GB that a step of the full 7B reads, and its multiply-accumulates in G; cross-attention alone, and all of it."""
    config = CrossLMMConfig.from_preset("7B")
    costs, layers = count_costs(config), len(config.cross_attention_layer_indices)
    heads, head_dim, width = config.num_attention_heads, config.head_dim, config.vision_config.hidden_size
    patches = frames * config.patch_grid_size**2
    weights = 2 * sum(costs.parts[part] for part in ("language model", "T2V cross-attention", "head"))
    weights -= 2 * config.text_config.vocab_size * config.text_config.hidden_size  # one row of the embeddings is read
    found = {}
    for form, reads, inner in (("kv", 1, head_dim), ("features", 2 * layers, width)):
        visual = reads * frames * costs.cache_bytes_per_frame[form]
        found[form] = {
            "visual_gb": visual / 1e9,
            "gb": (visual + weights + frames * costs.language_bytes_per_frame) / 1e9,
            "visual_g_macs": 2 * layers * heads * patches * inner / 1e9,
        }
    return found


def memory_of(branch: CrossLMMCrossAttentionBranch, form: str, states: torch.Tensor, config: CrossLMMConfig):
    """What one layer keeps of a video in this form, its memory and its part of a cache."""
    memory = VisualMemory(
        form=form,
        patches_per_frame=config.patch_grid_size**2,
        tokens_per_frame=config.tokens_per_frame,
        rows=[[Medium(range(len(states) // config.patch_grid_size**2 * config.tokens_per_frame), (0, len(states)))]],
        states=states,
        num_patches=len(states),
    )
    cache = DynamicCache()
    attach_visual_memory(cache, memory, [0], 1)
    branch.keep_for_decoding(states, memory, cache.layers[0])
    return memory, cache.layers[0]


@torch.no_grad()
def measure() -> dict[str, dict[str, float]]:
    """CPU seconds of one layer: the language model's own, and T2V in both forms."""
    config = CrossLMMConfig.from_preset("7B")
    config.text_config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    branch, plain = CrossLMMCrossAttentionBranch(config, 0).eval(), Qwen2DecoderLayer(config.text_config, 0).eval()
    rotary = Qwen2RotaryEmbedding(config=config.text_config)
    normed = {length: torch.randn(length, config.text_config.hidden_size) for length in (1, QUESTION_TOKENS)}

    def own_layer(length: int) -> None:
        states = normed[length][None]
        plain(states, position_embeddings=rotary(states, torch.arange(length)[None]))

    found: dict[str, dict[str, float]] = {"own": seconds_of({str(n): partial(own_layer, n) for n in normed})}
    for frames in FRAMES:
        states = torch.randn(frames * config.patch_grid_size**2, config.vision_config.hidden_size)
        ways = {}
        for form in FORMS:
            memory, layer = memory_of(branch, form, states, config)
            for length in normed:
                segments = memory.segments_after_media(length, torch.device("cpu"))
                ways[f"{form}, {length}"] = partial(branch, normed[length], states, segments, memory, layer)
        found[str(frames)] = seconds_of(ways)
        print(frames, found[str(frames)], flush=True)
    return found


def seconds_of(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians, the ways in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(own) for name, own in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    results = origin(__file__) | {
        "counted": {frames: counted(frames) for frames in COUNTED},
        "seconds": measure(),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
