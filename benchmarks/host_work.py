"""What the CPU does for a long video besides arithmetic: segments, calls of attention, looks at pixels, copies.

    PYTHONPATH=src python benchmarks/host_work.py --output benchmarks/host_work.json --label COMMIT

CPU seconds of one thread. Widths are those of no model: one small head, so that what remains is the work of the host.
Runs on any version since 4616c4e (by PYTHONPATH); each run adds its entry to the output.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from unittest import mock

import torch

PATCHES, TOKENS, WIDTH = 25, 9, 32


def timed(function) -> tuple[float, object]:
    start = time.process_time()  # of one thread: what else the machine does plays no part
    result = function()
    return round(time.process_time() - start, 3), result


def memory_of(num_frames: int):
    """One row: 20 tokens of text, the video, 20 tokens of text."""
    from transformers_crosslmm.cache_crosslmm import Medium, VisualMemory

    medium = Medium(range(20, 20 + num_frames * TOKENS), (0, num_frames * PATCHES))
    return VisualMemory(
        form="kv",
        patches_per_frame=PATCHES,
        tokens_per_frame=TOKENS,
        rows=[[medium]],
        states=torch.randn(num_frames * PATCHES, WIDTH),
        num_patches=num_frames * PATCHES,
    )


def causal_attention(num_frames: int, frames_at_once: int, num_layers: int) -> dict[str, float | int]:
    """V2V of scope "causal" in several layers, keys of some frames at a time."""
    from transformers_crosslmm import attention_crosslmm

    memory = memory_of(num_frames)
    length = 40 + num_frames * TOKENS
    seconds, segments = timed(lambda: memory.v2v_segments(0, length, "causal", torch.device("cpu")))
    query = torch.randn(len(segments.queries), 2, 8)
    key, value = torch.randn(2, memory.num_patches, 1, 8)
    calls = 0

    def nothing(query, key, value, scaling):
        nonlocal calls
        calls += 1
        return query, query[..., :1]

    def layer():
        attention_crosslmm.attention_piece_by_piece(
            lambda start, end: (key[start:end], value[start:end]),
            query,
            1.0,
            segments,
            patches_at_once=frames_at_once * PATCHES,
        )

    with mock.patch.object(attention_crosslmm, "_attention_with_weight", nothing):
        first, _ = timed(layer)
        rest, _ = timed(lambda: [layer() for _ in range(num_layers - 1)])
    return {
        "causal, segments, s": seconds,
        "causal, first layer without its kernels, s": first,
        f"causal, {num_layers - 1} more layers, s": rest,
        "causal, calls of the kernel per layer": calls // num_layers,
    }


def text_between_frames(num_frames: int) -> dict[str, float]:
    """A timestamp of seven tokens before each frame, scope "causal"."""
    from transformers_crosslmm.cache_crosslmm import Medium

    memory = memory_of(num_frames)
    positions = [20 + frame * (TOKENS + 7) + 7 + i for frame in range(num_frames) for i in range(TOKENS)]
    memory.rows = [[Medium(positions, (0, memory.num_patches))]]
    length, device = positions[-1] + 20, torch.device("cpu")
    try:
        seconds, _ = timed(lambda: memory.t2v_segments(0, length, "causal", None, device))
    except TypeError:  # before text between frames was told apart
        seconds, _ = timed(lambda: memory.t2v_segments(0, length, None, device))
    return {"text between frames, segments, s": seconds}


def pixels(num_frames: int, side: int) -> dict[str, float | int]:
    """From `generate` on: how often all pixels are looked through, and how long one look takes."""
    from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration, inputs_crosslmm

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 200, "num_key_value_heads": 1, "max_position_embeddings": 10**6}
    config = CrossLMMConfig(
        vision_config={**small, "image_size": side, "patch_size": side // 5},
        text_config=text,
        image_token_id=198,
        video_token_id=199,
        pooled_grid_size=1,
        cross_attention_layers=[0],
    )
    model = CrossLMMForConditionalGeneration(config).eval()
    frames = torch.zeros(num_frames, 3, side, side)
    ids = torch.tensor([[1, *[199] * num_frames, 2]])
    looks, check = [], inputs_crosslmm.check_pixels

    def counted(*args):
        seconds, _ = timed(lambda: check(*args))
        looks.append(seconds)

    modules = [module for name, module in sys.modules.items() if name.startswith("transformers_crosslmm")]
    with mock.patch.multiple(torch, set_num_threads=torch.set_num_threads):
        patches = [
            mock.patch.object(module, "check_pixels", counted) for module in modules if hasattr(module, "check_pixels")
        ]
        for patch in patches:
            patch.start()
        total, _ = timed(
            lambda: model.generate(input_ids=ids, pixel_values_videos=frames, max_new_tokens=1, do_sample=False)
        )
        for patch in patches:
            patch.stop()
    return {"looks through all pixels": len(looks), "these, s": round(sum(looks), 3), "generate, s": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3600)
    parser.add_argument("--label", required=True, help="name of the column, as a commit")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = causal_attention(options.frames, 44, 7) | text_between_frames(options.frames)
        found |= pixels(options.frames // 4, 100)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    results[options.label] = {"frames": options.frames, "torch": torch.__version__, "threads": 1} | found
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
