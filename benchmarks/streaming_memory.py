"""Memory that one more frame of a video takes until it is encoded: all pixels first, or encoded while it is decoded.

    python benchmarks/streaming_memory.py        # -> benchmarks/streaming_memory.json

Frames are 384x384 as in the real models; the encoder is narrow (width 16), so that its features weigh little
and pixels show. Every measurement is a process: the peak of its memory over what it held with model and file ready.
"""

import io
import json
import subprocess
import sys
from pathlib import Path

from origin import origin

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "streaming_memory.json"
FRAMES = (64, 256, 512)


def measure(way: str, num_frames: int) -> float:
    """MB."""
    sys.path.insert(0, str(HERE.parent / "modeling_tests"))
    import torch

    from factories import random_model, tiny_config
    from transformers_crosslmm import CrossLMMVideoProcessor, encode_video
    from video_files import encode

    torch.set_num_threads(1)
    vision = {"image_size": 384, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 3}
    model = random_model(tiny_config(vision_config=vision, vision_chunk_size=16))
    processor = CrossLMMVideoProcessor()
    clip = io.BytesIO(encode(codec_options={"preset": "ultrafast"}, num_frames=FRAMES[-1]))
    encode_video(model, torch.zeros(16, 3, 384, 384))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held = _memory("VmRSS")
    with torch.no_grad():
        if way == "pixels":
            encoded = model.get_video_features(processor(clip, num_frames=num_frames)["pixel_values_videos"])
        else:
            [stream] = processor.stream(clip, num_frames=num_frames)
            encoded = encode_video(model, stream)
    assert len(encoded.last_hidden_state) == num_frames
    return round(_memory("VmHWM") - held, 1)


def _memory(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main() -> None:
    if len(sys.argv) > 1:
        print(measure(sys.argv[1], int(sys.argv[2])))
        return
    peaks = {}
    for way in ("pixels", "stream"):
        for count in FRAMES:
            answer = subprocess.run(
                [sys.executable, __file__, way, str(count)], capture_output=True, text=True, check=True
            )
            peaks[f"{way}, {count} frames"] = float(answer.stdout.splitlines()[-1])
    first, last = FRAMES[0], FRAMES[-1]
    growth = {
        way: round((peaks[f"{way}, {last} frames"] - peaks[f"{way}, {first} frames"]) / (last - first), 3)
        for way in ("pixels", "stream")
    }
    about = origin(__file__) | {"features_mb_per_frame": round(27 * 27 * 16 * 4 / 2**20, 3)}
    results = {"about": about, "peak_mb": peaks, "growth_mb_per_frame": growth}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(growth))


if __name__ == "__main__":
    main()
