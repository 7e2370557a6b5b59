"""Makes the codes of time louder in a composed model.

    python examples/laptop/times.py --model runs/laptop/composed --output_dir runs/laptop/timed

Keys are made of a patch and of the code of its frame's number, and the codes of neighbouring frames differ by 3 % of
that only: the columns that read the fast part of the code begin `--louder` times as large.
"""

import argparse
from pathlib import Path

import torch

from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor

FAST = 16
"""Rates of the code, a sine and a cosine each, from 1 to 0.1 radians a frame in an encoder of width 128."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the codes of time louder.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--louder", type=float, default=5.0)
    arguments = parser.parse_args()
    model = CrossLMMForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith("2v.k_proj.weight"):
            sines_and_cosines = weight.unflatten(1, (2, -1))
            sines_and_cosines[:, :, :FAST] *= arguments.louder
    model.save_pretrained(arguments.output_dir)
    CrossLMMProcessor.from_pretrained(arguments.model).save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
