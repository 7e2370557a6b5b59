"""What an hour-long video in a cache costs when a second video joins it: its patches are copied once.

    PYTHONPATH=src python benchmarks/second_video.py        # -> benchmarks/second_video.json

A 7B's widths in bfloat16, 3,600 frames, then 60. 36 instead of 729 patches a frame, and four layers with keys and
values ("kv"): seconds and bytes grow with the patches in proportion. Seconds are CPU seconds of one thread. The extra
peak is the most memory of the process while the second video joins, without what is kept afterwards.
"""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from origin import origin
from transformers import DynamicCache

from transformers_crosslmm.cache_crosslmm import Medium, VisualMemory, attach_visual_memory

RESULTS = Path(__file__).with_suffix(".json")
FRAMES, MORE, PATCHES, WIDTH, GROUPS, HEAD, LAYERS = 3600, 60, 36, 1152, 4, 128, 4


def memory_of(form: str, num_frames: int) -> VisualMemory:
    patches = num_frames * PATCHES
    states = torch.ones(patches if form == "features" else 1, WIDTH, dtype=torch.bfloat16)
    return VisualMemory(form, PATCHES, 9, rows=[[Medium([0], (0, patches))]], states=states, num_patches=patches)


def keys_of(num_frames: int) -> torch.Tensor:
    return torch.ones(num_frames * PATCHES, GROUPS, HEAD, dtype=torch.bfloat16)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def measured(first_bytes: int, second_bytes: int, join: Callable[[], None]) -> dict[str, float]:
    before, start = peak_bytes(), time.process_time()
    join()
    seconds, extra = time.process_time() - start, peak_bytes() - before - second_bytes
    return {
        "first video, MB": round(first_bytes / 1e6),
        "second video joins, s": round(seconds, 2),
        "extra peak, MB": round(extra / 1e6),
        "extra peak, share of the first": round(extra / first_bytes, 2),
    }


def keys_and_values() -> dict[str, float]:
    cache, memory = DynamicCache(), memory_of("kv", FRAMES)
    attach_visual_memory(cache, memory, list(range(LAYERS)), LAYERS)
    for layer in cache.layers:
        layer.append_cross(keys_of(FRAMES), keys_of(FRAMES))
    new = [(keys_of(MORE), keys_of(MORE)) for _ in cache.layers]

    def join() -> None:
        for layer, pair in zip(cache.layers, new, strict=True):
            layer.append_cross(*pair)

    return measured(LAYERS * 2 * keys_of(FRAMES).nbytes, LAYERS * 2 * keys_of(MORE).nbytes, join)


def features() -> dict[str, float]:
    memory, new = memory_of("features", FRAMES), memory_of("features", MORE)
    return measured(memory.states.nbytes, new.states.nbytes, lambda: memory.append(new))


def main() -> None:
    torch.set_num_threads(1)
    # "kv" last: the peak of a process never falls, and these keys and values take more than the features.
    results = {"about": origin(__file__), "features": features(), "kv": keys_and_values()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
