"""CrossLMM beside video models of Transformers at their full size, timed on a CPU in bfloat16.

    python benchmarks/full_size_cpu.py           # -> benchmarks/full_size_cpu.json; takes 18 GB of memory, and an hour

What `crosslmm bench` does on a GPU, as far as a CPU's patience goes: FRAMES frames of 384 x 384 pixels and TEXT_TOKENS
tokens of text, random weights, one thread. A prefill; the first token of a second question in a fork of its cache;
each further token; and the most memory that all of this takes beside weights and pixels. Memory holds one model, so
each is made anew, in a process of its own, in each of ROUNDS rounds. Seconds are of CPU time, figures medians.
"""

import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from origin import origin
from tqdm import tqdm
from transformers.initialization import no_init_weights
from transformers.utils import logging

from transformers_crosslmm.measuring.contenders import Contender, contenders
from transformers_crosslmm.measuring.cost import TEXT_TOKENS, Runner, _resident_bytes, count

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "full_size_cpu.json"
MODELS = (
    "CrossLMM-2B video features",
    "CrossLMM-7B video features",
    "LLaVA-OneVision-0.5B",
    "LLaVA-OneVision-7B",
    "Qwen2.5-VL-7B",
    "Qwen3-VL-8B",
)
FRAMES, NEW_TOKENS, ROUNDS = 16, 8, 2


def contender_of(name: str) -> Contender:
    return next(contender for contender in contenders() if contender.name == name)


@torch.no_grad()
def build(contender: Contender) -> torch.nn.Module:
    """The model in bfloat16, all weights from one block of random numbers: drawing each takes minutes."""
    with no_init_weights():
        model = contender.model_class._from_config(contender.config("full"), dtype=torch.bfloat16).eval()
    block = (0.02 * torch.randn(2**20)).bfloat16()
    for parameter in model.parameters():
        for part in parameter.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
    return model


@torch.no_grad()
def measure(name: str) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    contender = contender_of(name)
    runner = Runner(contender, build(contender))
    runner.show(2)
    runner.prefill()  # warms up
    runner.show(FRAMES)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident_bytes("VmRSS")
    found = {"prefill": runner.clock.seconds(runner.prefill)}
    found["second_question"] = runner.clock.seconds(partial(runner.answer_another, 1))
    longer = runner.clock.seconds(partial(runner.answer_another, 1 + NEW_TOKENS))
    found["decode_step"] = (longer - found["second_question"]) / NEW_TOKENS
    return found | {"peak_mb": (_resident_bytes("VmHWM") - before) / 1e6}


def main() -> None:
    chosen = sys.argv[1:] or MODELS
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tqdm(total=ROUNDS * len(chosen)) as progress:
        for _ in range(ROUNDS):
            for name in chosen:
                progress.set_description(name)
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                    rounds[name].append(process.submit(measure, name).result())
                progress.update()
    rows = [
        {
            "model": name,
            "macs": count(contender_of(name), FRAMES)["macs"]["total"],
            **{what: round(statistics.median(one[what] for one in found), 3) for what in found[0]},
        }
        for name, found in rounds.items()
    ]
    about = origin(__file__) | {
        "machine": f"{platform.machine()} with AMX, one of {os.cpu_count()} cores",
        "frames": FRAMES,
        "text_tokens": TEXT_TOKENS,
        "rounds": ROUNDS,
    }
    RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
