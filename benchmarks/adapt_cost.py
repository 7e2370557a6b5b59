"""What `adapt` costs beside stage 2. Writes adapt_cost.json beside this file.

    python benchmarks/adapt_cost.py              # 10 GB of memory, and a quarter of an hour

Counted, for the real 2B and 7B: what learns, the bytes that `crosslmm train` keeps for it (weights and gradients in
float32, AdamW's two moments), and the multiply-accumulates of a step on one sample, what checkpointing makes again
among them. Measured, on a CPU and one thread: steps of `adapt` as its recipe has them (bfloat16 on float32 weights,
checkpointing), on a real 2B with random weights, and the memory they take; a step of stage 2 would take 32 GB. Timed
at a toy size: steps of either stage in turns, for their ratio alone.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from memory_curve import forget_peak, memory, prepare
from origin import origin
from training_memory import SavedBytes

from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration
from transformers_crosslmm.measuring.contenders import CrossLMM
from transformers_crosslmm.measuring.cost import multiply_accumulates
from transformers_crosslmm.training.trainer import RECIPES, count_parts, parameter_groups, train_only

FRAMES, TEXT_TOKENS = 64, 256
T = TypeVar("T")
STAGES = ("adapt", "stage2_instruct")
TOY_FRAMES, REPEATS = 4, 5
MEASURED_FRAMES, MEASURED_TEXT_TOKENS, MEASURED_STEPS = 16, 64, 3


def parts_of(stage: str) -> list[str]:
    return yaml.safe_load((RECIPES / f"{stage}.yaml").read_text())["trained_parts"]


def training_macs(
    config: CrossLMMConfig,
    parts: list[str],
    *,
    frames: int = FRAMES,
    text_tokens: int = TEXT_TOKENS,
    checkpointing: bool = True,
) -> int:
    """Of forward and backward on one sample, with cross-attention and projector among the parts that learn.

    A matrix product costs its forward once more for the gradient of its input, where anything below it learns, and
    once more for that of its weights, where they learn. A product of two activations has two inputs. Checkpointing
    runs the layers of the language model once more, and the blocks of an encoder that learns twice.
    """
    forward = multiply_accumulates(config, frames, text_tokens=text_tokens)
    forward["head"] *= frames * config.tokens_per_frame + text_tokens  # the loss wants logits everywhere
    has_vision, has_language = "vision_tower" in parts, "language_model" in parts
    times = {
        "vision": 3 if has_vision else 1,
        "projector": 3 if has_vision else 2,  # nearly: a frozen encoder wants no gradient of the first layer's input
        "language model": 3 if has_language else 2,
        "head": 3 if has_language else 2,
        "keys and values": 3 if has_vision else 2,
        "folding": 0,  # the other form of the cache, for inference
    }
    if checkpointing:
        again = {"vision": 2 * has_vision, "projector": 0, "head": 0, "folding": 0}
        times = {part: times.get(part, 3) + again.get(part, 1) for part in forward}
    return sum(macs * times.get(part, 3) for part, macs in forward.items())


def counted(preset: str, stage: str) -> dict[str, int]:
    config = CrossLMMConfig.from_preset(preset)
    with torch.device("meta"):
        model = CrossLMMForConditionalGeneration(config)
    train_only(model, parts_of(stage))
    parts = count_parts(model).values()
    learning, together = sum(part[0] for part in parts), sum(part[1] for part in parts)
    return {
        "parameters": together,
        "learning": learning,
        "weight_bytes": 4 * together,
        "gradient_bytes": 4 * learning,
        "optimizer_bytes": 8 * learning,
        "macs_per_sample": training_macs(config, parts_of(stage)),
    }


def batch_of(config: CrossLMMConfig, frames: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """One sample: a video, and text behind it of which every token is learned."""
    video = torch.full((1, frames * config.tokens_per_frame), config.video_token_id)
    ids = torch.cat([video, torch.randint(0, 4000, (1, text_tokens))], dim=1)
    labels = ids.masked_fill(ids == config.video_token_id, -100)
    size = config.vision_config.image_size
    return {"input_ids": ids, "labels": labels, "pixel_values_videos": torch.rand(frames, 3, size, size)}


def optimizer_of(model: CrossLMMForConditionalGeneration) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, learning_rate=1e-5, gate_learning_rate=1e-3))


def measured() -> dict[str, Any]:
    """Median CPU seconds of a step of `adapt` on a 2B, and GB: the peak of each of its parts, and what autograd keeps.

    The first step warms up and is looked through; Adam's moments are there from its end on.
    """
    parts = parts_of("adapt")
    without = memory("VmRSS")
    config = CrossLMMConfig.from_preset("2B")
    config.gate_init = 1.0
    model = CrossLMMForConditionalGeneration(config).train()
    train_only(model, parts)
    model.activation_checkpointing_enable()
    optimizer = optimizer_of(model)
    batch = batch_of(config, MEASURED_FRAMES, MEASURED_TEXT_TOKENS)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    def peak(part: Callable[[], T]) -> tuple[T, float]:
        forget_peak()
        result = part()
        return result, round((memory("VmHWM") - without) / 1000, 3)

    with SavedBytes(model.parameters()) as saved:
        total = loss()
    kept = round(saved.total / 1e9, 3)
    saved.storages.clear()
    total.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds = []
    for _ in range(MEASURED_STEPS):
        begin = time.process_time()
        total, forward = peak(loss)
        _, backward = peak(total.backward)
        _, update = peak(optimizer.step)
        optimizer.zero_grad()
        seconds.append(time.process_time() - begin)
    shape = {"frames": MEASURED_FRAMES, "text_tokens": MEASURED_TEXT_TOKENS}
    return {
        "preset": "2B",
        "stage": "adapt",
        **shape,
        "cpu_seconds_per_sample": round(statistics.median(seconds), 1),
        "peak_gigabytes": {"forward": forward, "backward": backward, "optimizer": update},
        "kept_for_backward_gigabytes": kept,
        "macs_per_sample": training_macs(config, parts, **shape),
    }


def timed() -> dict[str, float]:
    """Median CPU seconds of a step on one video, for each stage; the stages take turns."""
    config = CrossLMM("7B").config("toy")
    config.gate_init = 1.0
    batch = batch_of(config, TOY_FRAMES, TEXT_TOKENS)
    runs = {}
    for stage in STAGES:
        model = CrossLMMForConditionalGeneration(config).train()
        model.activation_checkpointing_enable()
        train_only(model, parts_of(stage))
        runs[stage] = model, optimizer_of(model)
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for _ in range(1 + REPEATS):
        for stage, (model, optimizer) in runs.items():
            begin = time.process_time()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[stage].append(time.process_time() - begin)
    return {stage: statistics.median(times[1:]) for stage, times in seconds.items()}  # the first warms up


def main() -> None:
    torch.manual_seed(0)
    prepare()
    about = origin(__file__)
    adapted = measured()
    seconds = timed()
    result = about | {
        "frames": FRAMES,
        "text_tokens": TEXT_TOKENS,
        "counted": {preset: {stage: counted(preset, stage) for stage in STAGES} for preset in ("2B", "7B")},
        "measured": adapted,
        "toy_samples_per_second_of_adapt_over_stage2": seconds["stage2_instruct"] / seconds["adapt"],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
