"""Prefill and decoding beside Transformers' LLaVA-OneVision class: equal widths, depths, frames and text, on a CPU.

    python benchmarks/cpu_speed.py               # -> benchmarks/cpu_speed.json, figures under "now"
    python benchmarks/cpu_speed.py --as before   # the same under another name, for what a change brought

Weights are random, both models run eagerly in float32 on one thread, `generate` writes NEW_TOKENS tokens, and a
streamer takes the time of each: CPU time, which other processes do not change much. Rounds alternate between the
models; figures are medians. The prediction is the ratio of the multiply-accumulates that `torch.utils.flop_counter`
counts, with attention in plain matrix products. As not all kernels multiply at one rate, a profile of each prefill
also says how much of its time goes into them (matrix products, convolution, attention), and how much beside.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from origin import origin
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    set_seed,
)
from transformers.utils import logging

from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "cpu_speed.json"
TEXT_TOKENS, NEW_TOKENS = 24, 21
VIDEO_TOKEN, VOCABULARY = 7, 1000
KERNELS = {"mm", "addmm", "bmm", "mkldnn_convolution", "_scaled_dot_product_flash_attention_for_cpu"}
SIZES = {
    # rounds; frames; patch grid and blocks of the encoder; layers of the language model; every 4th looks back
    "tiny": {"rounds": 15, "frames": 8, "grid": 12, "blocks": 2, "layers": 8, "width": 64, "mlp": 192, "heads": 4},
    "mid": {"rounds": 9, "frames": 8, "grid": 27, "blocks": 2, "layers": 8, "width": 384, "mlp": 1024, "heads": 6},
}


class Clock:
    """A streamer that notes when each token came; the first call brings the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, _) -> None:
        self.times.append(time.process_time())

    def end(self) -> None:
        pass


def vision_config(size: dict, blocks: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=size["width"],
        intermediate_size=2 * size["width"],
        num_hidden_layers=blocks,
        num_attention_heads=size["heads"],
        image_size=14 * size["grid"],
        patch_size=14,
        vision_use_head=False,
    )


def text_fields(size: dict) -> dict:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size["width"],
        "intermediate_size": size["mlp"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
    }


def crosslmm(size: dict, attention: str) -> CrossLMMForConditionalGeneration:
    config = CrossLMMConfig(
        vision_config=vision_config(size, size["blocks"] + 1),  # of which the last is not built
        text_config={**text_fields(size), "gate_init": 1.0},
        image_token_id=VIDEO_TOKEN + 1,
        video_token_id=VIDEO_TOKEN,
    )
    return CrossLMMForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def llava_onevision(size: dict, attention: str) -> LlavaOnevisionForConditionalGeneration:
    config = LlavaOnevisionConfig(
        vision_config=vision_config(size, size["blocks"]),
        text_config=Qwen2Config(**text_fields(size)),
        image_token_index=VIDEO_TOKEN + 1,
        video_token_index=VIDEO_TOKEN,
    )
    return LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def inputs_of(model, size: dict) -> dict:
    frames = torch.randn(size["frames"], 3, 14 * size["grid"], 14 * size["grid"])
    if isinstance(model, CrossLMMForConditionalGeneration):
        tokens = size["frames"] * model.config.tokens_per_frame
    else:
        tokens, frames = size["frames"] * (-(-size["grid"] // 2)) ** 2 + 1, frames[None]
    text = torch.arange(10, 10 + TEXT_TOKENS)
    ids = torch.cat([text[:4], torch.full((tokens,), VIDEO_TOKEN), text[4:]])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": frames}


@torch.no_grad()
def write(model, inputs: dict, **options) -> dict[str, float]:
    """Milliseconds until the first token, and of a step behind it."""
    clock = Clock()
    start = time.process_time()
    model.generate(
        **inputs,
        **options,
        streamer=clock,
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    steps = [1000 * (b - a) for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
    return {"prefill": 1000 * (clock.times[1] - start), "decode": statistics.median(steps)}


@torch.no_grad()
def count(model, inputs: dict, **options) -> dict[str, float]:
    """Multiply-accumulates (millions) of the prefill and of a step behind it."""
    counts = {}
    with FlopCounterMode(display=False) as counter:
        past = model(**inputs, **options, use_cache=True, logits_to_keep=1).past_key_values
    counts["prefill"] = round(counter.get_total_flops() / 2e6, 3)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([[11]]), past_key_values=past, use_cache=True)
    counts["decode"] = round(counter.get_total_flops() / 2e6, 3)
    return counts


@torch.no_grad()
def profiled(model, inputs: dict, **options) -> dict[str, float]:
    """Milliseconds of a prefill in kernels that multiply, and beside them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**inputs, **options, use_cache=True, logits_to_keep=1)
    times = {"kernels": 0.0, "beside": 0.0}
    for event in profile.key_averages():
        part = "kernels" if event.key.removeprefix("aten::") in KERNELS else "beside"
        times[part] += event.self_cpu_time_total / 1000
    return times


def measure(size: dict) -> dict:
    set_seed(0)
    ways = {
        "CrossLMM, kv": (crosslmm, {"cross_attention_cache": "kv"}),
        "CrossLMM, features": (crosslmm, {"cross_attention_cache": "features"}),
        "LLaVA-OneVision": (llava_onevision, {}),
    }
    counted, models = {}, {}
    for name, (build, options) in ways.items():
        eager = build(size, "eager")
        counted[name] = count(eager, inputs_of(eager, size), **options)
        model = build(size, "sdpa")
        models[name] = (model, inputs_of(model, size), options)
        write(*models[name][:2], **options)  # warm
    parts = ("prefill", "decode", "kernels", "beside")
    times: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name in ways}
    for _ in range(size["rounds"]):
        for name, (model, inputs, options) in models.items():
            for part, ms in (write(model, inputs, **options) | profiled(model, inputs, **options)).items():
                times[name][part].append(ms)
    medians = {
        name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in times.items()
    }
    peer = "LLaVA-OneVision"
    ratios = {
        name: {
            part: {
                "measured": round(medians[name][part] / medians[peer][part], 3),
                "predicted": round(counted[name][part] / counted[peer][part], 3),
            }
            for part in counted[name]
        }
        | {f"prefill, {part}": {"measured": round(medians[name][part] / medians[peer][part], 3)} for part in parts[2:]}
        for name in ways
        if name != peer
    }
    return {
        "size": size,
        "milliseconds": {name: {part: round(ms, 3) for part, ms in own.items()} for name, own in medians.items()},
        "million_multiply_accumulates": counted,
        "time_against_llava_onevision": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="name", default="now", help="the name under which figures are kept")
    name = parser.parse_args().name
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    about = origin(__file__, *([] if name == "now" else ["--as", name]))
    sizes = {size: measure(fields) for size, fields in SIZES.items()}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {name: about | sizes}, indent=1) + "\n")
    for size, figures in sizes.items():
        print(size, json.dumps(figures["time_against_llava_onevision"], indent=1))


if __name__ == "__main__":
    main()
