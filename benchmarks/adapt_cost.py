"""What `adapt` costs beside stage 2. Writes adapt_cost.json beside this file.

    python benchmarks/adapt_cost.py

Counted, for the real 2B and 7B: what learns, the bytes that `crosslmm train` keeps for it (weights and gradients in
float32, AdamW's two moments), and the multiply-accumulates of a step on one sample. Activations are not counted: they
depend on checkpointing. Timed, on a CPU and at a toy size: steps of either stage in turns, for their ratio alone.
"""

import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import yaml

from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration
from transformers_crosslmm.benchmarking_crosslmm import multiply_accumulates
from transformers_crosslmm.contenders_crosslmm import CrossLMM
from transformers_crosslmm.training_crosslmm import RECIPES, count_parts, parameter_groups, train_only

FRAMES, TEXT_TOKENS = 64, 256
STAGES = ("adapt", "stage2_instruct")
TOY_FRAMES, REPEATS = 4, 5


def parts_of(stage: str) -> list[str]:
    return yaml.safe_load((RECIPES / f"{stage}.yaml").read_text())["trained_parts"]


def training_macs(
    config: CrossLMMConfig, parts: list[str], *, frames: int = FRAMES, text_tokens: int = TEXT_TOKENS
) -> int:
    """Of forward and backward on one sample, with cross-attention and projector among the parts that learn.

    A matrix product costs its forward once more for the gradient of its input, where anything below it learns, and
    once more for that of its weights, where they learn. A product of two activations has two inputs.
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


def timed() -> dict[str, float]:
    """Median CPU seconds of a step on one video, for each stage; the stages take turns."""
    config = CrossLMM("7B").config("toy")
    config.text_config.gate_init = 1.0
    video = torch.full((1, TOY_FRAMES * config.tokens_per_frame), config.video_token_id)
    text = torch.randint(0, 4000, (1, TEXT_TOKENS))
    ids = torch.cat([video, text], dim=1)
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == config.video_token_id, -100),
        "pixel_values_videos": torch.rand(TOY_FRAMES, 3, 384, 384),
    }
    runs = {}
    for stage in STAGES:
        model = CrossLMMForConditionalGeneration(config).train()
        train_only(model, parts_of(stage))
        runs[stage] = model, torch.optim.AdamW(parameter_groups(model, learning_rate=1e-5, gate_learning_rate=1e-3))
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
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    seconds = timed()
    result = {
        "command": "python benchmarks/adapt_cost.py",
        "commit": commit,
        "machine": f"{platform.machine()} CPU, 1 thread, torch {torch.__version__}",
        "frames": FRAMES,
        "text_tokens": TEXT_TOKENS,
        "counted": {preset: {stage: counted(preset, stage) for stage in STAGES} for preset in ("2B", "7B")},
        "toy_samples_per_second_of_adapt_over_stage2": seconds["stage2_instruct"] / seconds["adapt"],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
