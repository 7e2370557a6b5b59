"""Frames per call of the encoder: CPU time for some values of `vision_chunk_size`.

    python benchmarks/vision_chunk_size.py       # -> benchmarks/vision_chunk_size.json

SigLIP2 so400m at 384 pixels with one block of its 26, random weights, float32, one thread; FRAMES frames, the values
in turns, medians of ROUNDS rounds.
"""

import json
import statistics
import time
from pathlib import Path

import torch
from origin import origin

from transformers_crosslmm import CrossLMMConfig, CrossLMMModel

HERE = Path(__file__).resolve().parent
FRAMES, ROUNDS = 32, 7
SIZES = (1, 2, 4, 8, 16, 32)


def encoder() -> CrossLMMModel:
    full = CrossLMMConfig.from_preset("2B").to_dict()
    full["vision_config"] |= {"num_hidden_layers": 2}  # of which the last is not built
    full["text_config"] |= {"num_hidden_layers": 1, "layer_types": None, "vocab_size": 1000}
    config = CrossLMMConfig(**{key: value for key, value in full.items() if key != "model_type"})
    return CrossLMMModel(config).eval()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = encoder()
    frames = torch.randn(FRAMES, 3, 384, 384)
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(1 + ROUNDS):  # the first warms up
        for size in SIZES:
            model.config.vision_chunk_size = size
            begin = time.process_time()
            model.get_video_features(frames)
            seconds[size].append(time.process_time() - begin)
    medians = {size: round(1000 * statistics.median(times[1:]) / FRAMES, 2) for size, times in seconds.items()}
    results = origin(__file__) | {"milliseconds_per_frame": medians}
    (HERE / "vision_chunk_size.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
