"""Peak memory over the frames of a video, from pixels to the last of a few new tokens.

    python benchmarks/memory_curve.py            # -> benchmarks/memory_curve.json and .png
    python benchmarks/memory_curve.py "7B, kv"   # this curve alone is measured again

Widths are the real ones (SigLIP2 so400m at 384 pixels; Qwen2.5 1.5B or 7B), depths are not: one block of the encoder
and two layers of the language model, of which one looks back. Weights are random, bfloat16, on a CPU. Frames come a
chunk at a time, as a stream decodes them, and are encoded as they come; then `generate` writes NEW_TOKENS tokens.
Every point is a process of its own, forked from one with the model ready: the peak of its resident memory over what it
held then.
"""

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging

from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration, encode_video

HERE = Path(__file__).resolve().parent
RESULTS, CHART = HERE / "memory_curve.json", HERE / "memory_curve.png"
FRAMES = (16, 48, 96)
TEXT_TOKENS, NEW_TOKENS = 32, 3
CHUNK = 256  # tokens of a chunked prefill
GOAL = 1.75
M_MMAP_THRESHOLD = -3
WAYS = {
    "7B, features, prefill in chunks": ("7B", {}, {"cross_attention_cache": "features", "prefill_chunk_size": CHUNK}),
    "7B, features": ("7B", {}, {"cross_attention_cache": "features"}),
    "7B, kv": ("7B", {}, {"cross_attention_cache": "kv"}),
    "2B, features, prefill in chunks": ("2B", {}, {"cross_attention_cache": "features", "prefill_chunk_size": CHUNK}),
    "2B, features, normalised, prefill in chunks": (
        "2B",
        {"visual_norm": "layernorm", "visual_time": "sinusoidal"},
        {"cross_attention_cache": "features", "prefill_chunk_size": CHUNK},
    ),
}


class Frames:
    """As many frames as a stream would decode, random, a chunk at a time."""

    def __init__(self, num_frames: int, size: int):
        self.expected_num_frames, self.size = num_frames, size

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, self.expected_num_frames, 16):
            yield torch.randn(min(16, self.expected_num_frames - start), 3, self.size, self.size)


def model_of(preset: str, text: dict) -> CrossLMMForConditionalGeneration:
    full = CrossLMMConfig.from_preset(preset).to_dict()
    full["vision_config"] |= {"num_hidden_layers": 2}  # of which the last is not built
    full["text_config"] |= {"num_hidden_layers": 2, "layer_types": None, "vocab_size": 1000, "gate_init": 1.0, **text}
    full |= {"image_token_id": 998, "video_token_id": 999}
    config = CrossLMMConfig(**{key: value for key, value in full.items() if key != "model_type"})
    return CrossLMMForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()


def answer(model: CrossLMMForConditionalGeneration, num_frames: int, options: dict) -> None:
    config = model.config
    encoded = {"video": encode_video(model, Frames(num_frames, config.vision_config.image_size))}
    text = torch.arange(10, 10 + TEXT_TOKENS)
    placeholders = torch.full((num_frames * config.tokens_per_frame,), config.video_token_id)
    ids = torch.cat([text[:4], placeholders, text[4:]])[None]
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_encoder_outputs=encoded,
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        **options,
    )


def memory(field: str) -> float:
    """MB (10^6 bytes)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def peak(model: CrossLMMForConditionalGeneration, num_frames: int, options: dict) -> float:
    """MB, measured in a child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        held = memory("VmRSS")
        answer(model, num_frames, options)
        os.write(writer, str(memory("VmHWM") - held).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        figure = pipe.read()
    os.waitpid(child, 0)
    return round(float(figure), 1)


def main() -> None:
    asked = sys.argv[1:] or list(WAYS)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)  # a tensor that goes gives its memory back at once
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    about = {"command": "python benchmarks/memory_curve.py", "commit": commit, "torch": torch.__version__}
    about |= {"machine": f"{platform.machine()}, one of {os.cpu_count()} cores", "goal_mb_per_frame": GOAL}
    for name in asked:
        preset, text, options = WAYS[name]
        model = model_of(preset, text)
        answer(model, 2, options)  # what is made once is made before
        peaks = {frames: peak(model, frames, options) for frames in FRAMES}
        config = model.config
        own = 2 * 2 * config.tokens_per_frame * config.text_config.num_hidden_layers
        own *= config.text_config.num_key_value_heads * config.text_config.hidden_size
        own_mb = own / config.text_config.num_attention_heads / 1e6
        growth = (peaks[FRAMES[-1]] - peaks[FRAMES[0]]) / (FRAMES[-1] - FRAMES[0])
        curve = {
            "about": about,
            "peak_mb": peaks,
            "growth_mb_per_frame": round(growth, 3),
            "language_models_own_mb_per_frame": round(own_mb, 3),
            "growth_without_it": round(growth - own_mb, 3),
        }
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(kept | {name: curve}, indent=1) + "\n")
        print(name, json.dumps(curve), flush=True)
        del model
    draw(json.loads(RESULTS.read_text()))


def draw(curves: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    for name, curve in curves.items():
        points = [curve["peak_mb"][str(frames)] for frames in FRAMES]
        axes.plot(FRAMES, points, marker="o", label=f"{name}: {curve['growth_without_it']:g} MB per frame")
    start = min(curve["peak_mb"][str(FRAMES[0])] for curve in curves.values())
    goal = [start + GOAL * (frames - FRAMES[0]) for frames in FRAMES]
    axes.plot(FRAMES, goal, "k:", label=f"goal: {GOAL} MB per frame")
    axes.set(xlabel="frames", ylabel="peak memory over the model's, MB", ylim=(0, None))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(CHART, dpi=120)


if __name__ == "__main__":
    main()
