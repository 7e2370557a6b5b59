"""Peak memory over the frames of a video: of its encoding, and of an answer about it from prefill to the last token.

    python benchmarks/memory_curve.py            # -> benchmarks/memory_curve.json, docs/images/memory_curve.png
    python benchmarks/memory_curve.py "7B, kv"   # this curve alone is measured again

Widths are the real ones (SigLIP2 so400m at 384 pixels; Qwen2.5 1.5B or 7B), depths are not: one block of the encoder
and two layers of the language model, of which one looks back; bfloat16, on a CPU. To encode, frames come a chunk at a
time, as a stream decodes them. To answer, original tokens are made up, and `generate` writes NEW_TOKENS tokens, as it
comes ("features": a prompt of more than PREFILL_TOKENS is prefilled in chunks) or as the name says. Every point is a
process of its own, forked from one with the model ready: the peak of its resident memory over what it held then,
original tokens included. What is made for the moment is bounded (`CHUNK_BYTES`, PREFILL_TOKENS), and all points lie
where the bounds are reached. "Grouped": Transformers' sdpa is told to leave keys that several heads share as they are,
as flash attention does; else it repeats them for each head wherever there is a mask.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from origin import origin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.utils import logging

from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration, encode_video

HERE = Path(__file__).resolve().parent
RESULTS, CHART = HERE / "memory_curve.json", HERE.parent / "docs" / "images" / "memory_curve.png"
FRAMES = (500, 750, 1000)
ENCODED = (32, 64)
TEXT_TOKENS, NEW_TOKENS = 32, 3
GOAL = 1.75
M_MMAP_THRESHOLD = -3
FEATURES, KV = {"cross_attention_cache": "features"}, {"cross_attention_cache": "kv"}
SMALL_CHUNKS, ONE_PIECE = {"prefill_chunk_size": 256}, {"prefill_chunk_size": 10**6}
NORMALISED = {"visual_norm": "layernorm", "visual_time": "sinusoidal"}
WAYS = {
    "encoding": None,
    "7B, features": ("7B", {}, FEATURES),
    "7B, features, chunks of 256, grouped": ("7B", {}, FEATURES | SMALL_CHUNKS),
    "7B, features, one piece": ("7B", {}, FEATURES | ONE_PIECE),
    "7B, kv": ("7B", {}, KV),
    "2B, features": ("2B", {}, FEATURES),
    "2B, features, chunks of 256, grouped": ("2B", {}, FEATURES | SMALL_CHUNKS),
    "2B, features, normalised": ("2B", NORMALISED, FEATURES),
    "2B, features, normalised, chunks of 256, grouped": ("2B", NORMALISED, FEATURES | SMALL_CHUNKS),
}


class Frames:
    """As many frames as a stream would decode, random, a chunk at a time."""

    def __init__(self, num_frames: int, size: int):
        self.expected_num_frames, self.size = num_frames, size

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, self.expected_num_frames, 16):
            yield torch.randn(min(16, self.expected_num_frames - start), 3, self.size, self.size)


def model_of(preset: str, text: dict, dtype: torch.dtype = torch.bfloat16) -> CrossLMMForConditionalGeneration:
    full = CrossLMMConfig.from_preset(preset).to_dict()
    full["vision_config"] |= {"num_hidden_layers": 2}  # of which the last is not built
    full["text_config"] |= {"num_hidden_layers": 2, "layer_types": None, "vocab_size": 1000, **text}
    # The cost of scores is linear in the frames; what they hold is no other.
    full["text_config"] |= {"v2v_scope": "frame"}
    full |= {"image_token_id": 998, "video_token_id": 999}
    config = CrossLMMConfig(**{key: value for key, value in full.items() if key != "model_type"})
    with torch.device("meta"):
        model = CrossLMMForConditionalGeneration._from_config(config, dtype=dtype)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    embeddings = model.model.vision_tower.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    model.model.language_model.rotary_emb = Qwen2RotaryEmbedding(config=config.text_config)
    return model


def encode(model: CrossLMMForConditionalGeneration, num_frames: int) -> None:
    encode_video(model, Frames(num_frames, model.config.vision_config.image_size))


def answer(model: CrossLMMForConditionalGeneration, num_frames: int, options: dict) -> None:
    config = model.config
    width, num_tokens = config.vision_config.hidden_size, num_frames * config.tokens_per_frame
    original = torch.full((num_frames, config.patch_grid_size**2, width), 0.5, dtype=model.dtype)
    pooled = torch.full((num_tokens, config.text_config.hidden_size), 0.5, dtype=model.dtype)
    encoded = BaseModelOutputWithPooling(last_hidden_state=original, pooler_output=(pooled,))
    text = torch.arange(10, 10 + TEXT_TOKENS)
    ids = torch.cat([text[:4], torch.full((num_tokens,), config.video_token_id), text[4:]])[None]
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_encoder_outputs={"video": encoded},
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        **options,
    )


def prepare() -> None:
    """One thread, and memory that goes back as soon as a tensor goes."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)


def memory(field: str) -> float:
    """MB (10^6 bytes)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def forget_peak() -> None:
    """Lets the peak of resident memory, VmHWM, begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def in_child(measured: Callable[[], Any]) -> Any:
    """What a function returns in a forked process, whose peak of memory begins with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        forget_peak()
        os.write(writer, json.dumps(measured()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        written = pipe.read()
    os.waitpid(child, 0)
    return json.loads(written)


def peak(work: Callable[[int], None], num_frames: int) -> float:
    """MB over what the process held before, measured in a child."""

    def measured() -> float:
        held = memory("VmRSS")
        work(num_frames)
        return round(memory("VmHWM") - held, 1)

    return in_child(measured)


def own_cache(config: CrossLMMConfig) -> float:
    """MB that the language model's own cache keeps of a frame."""
    text = config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    return config.tokens_per_frame * text.num_hidden_layers * 2 * text.num_key_value_heads * head_dim * 2 / 1e6


def measure(name: str) -> dict:
    way = WAYS[name]
    os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = str(int(name.endswith("grouped")))
    model = model_of(*(way[:2] if way else ("2B", {})))
    work = partial(answer, model, options=way[2]) if way else partial(encode, model)
    frames = FRAMES if way else ENCODED
    work(2)  # what is made once is made before
    peaks = {count: peak(work, count) for count in frames}
    growth = (peaks[frames[-1]] - peaks[frames[0]]) / (frames[-1] - frames[0])
    own = own_cache(model.config) if way else 0.0
    return {
        "peak_mb": peaks,
        "growth_mb_per_frame": round(growth, 3),
        "language_models_own_mb_per_frame": round(own, 3),
        "growth_without_it": round(growth - own, 3),
    }


def main() -> None:
    prepare()
    about = origin(__file__) | {"goal_mb_per_frame": GOAL}
    for name in sys.argv[1:] or WAYS:
        curve = {"about": about, **measure(name)}
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(kept | {name: curve}, indent=1) + "\n")
        print(name, json.dumps(curve), flush=True)
    draw(json.loads(RESULTS.read_text()))


def draw(curves: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 4.6))
    for name, curve in curves.items():
        if name.startswith("7B"):
            points = {int(frames): megabytes for frames, megabytes in curve["peak_mb"].items()}
            [line] = axes.plot(list(points), list(points.values()), marker="o")
            end = (max(points) + 25, points[max(points)])
            label = name.removeprefix("7B, ").replace(", ", ",\n")
            axes.annotate(label, end, va="center", color=line.get_color(), fontsize=11)
    axes.set(xlabel="frames", ylim=(0, None), xlim=(min(FRAMES) - 50, max(FRAMES) + 310), xticks=FRAMES)
    axes.set_title("7B: peak MB, without the model", loc="left", fontsize=12, fontweight="bold")
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(CHART, dpi=140)


if __name__ == "__main__":
    main()
