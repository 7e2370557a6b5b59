r"""In how many questions about one frame does that frame weigh most in T2V while the answer is written?

    python -m transformers_crosslmm.tiny.procedural_videos --split heldout --seed 1000 --num_videos 100 \
        --output_dir runs/heldout
    python benchmarks/where_it_looked.py --videos runs/heldout --output_file benchmarks/where_it_looked.json

Asked are the kinds of `procedural_videos` that are about one frame: "In which frame …?", whose answer names it, and
"… in frame 3?", whose question does. A frame's weight is its mean over the answer's tokens, and over heads and layers
or, in "by_layer", over the heads of one layer; chance is one in as many frames as the video has.
"""

import argparse
import json
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from origin import commit

from transformers_crosslmm import TINY_CHECKPOINT, __version__
from transformers_crosslmm.checkpoints.folder import checksum
from transformers_crosslmm.checkpoints.load import load_model, load_processor
from transformers_crosslmm.measuring.quality import VideoQuestion, batches_of, interval, read_questions

KINDS = ("which_frame", "colour", "shape", "place")
NUM_FRAMES = 8


def frame_of(question: VideoQuestion) -> int:
    """The frame, counted from 0, that a question of one of `KINDS` is about."""
    if question.kind == "which_frame":
        return int(question.answer) - 1
    match = re.search(r"(?:frame|second) (\d+)", question.question)
    assert match, question.question
    return int(match[1]) - 1


@torch.no_grad()
def looks(model: Any, processor: Any, questions: Sequence[VideoQuestion]) -> Iterator[tuple[VideoQuestion, str, Any]]:
    """Each question with its answer and the weights (layers, T) of the frames."""
    for asked, inputs in batches_of(processor, questions, num_frames=NUM_FRAMES):
        output = model.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
            output_cross_attentions=True,
        )
        written = output.sequences[:, inputs["input_ids"].shape[1] :]
        for question, ids, weights in zip(asked, written, output.cross_attentions, strict=True):
            length = int((ids != processor.tokenizer.eos_token_id).cumprod(0).sum())
            answer = processor.decode(ids[:length], skip_special_tokens=True).strip()
            yield question, answer, weights[:, :, : max(length, 1)].mean(dim=(1, 2))


def share(marks: Sequence[bool]) -> dict[str, Any]:
    low, high = interval(sum(marks), len(marks))
    return {
        "asked": len(marks),
        "share": round(sum(marks) / len(marks), 4) if marks else None,
        "interval_95": [round(low, 4), round(high, 4)],
    }


def measure(found: Sequence[tuple[VideoQuestion, str, torch.Tensor]]) -> dict[str, Any]:
    """How often the frame in question weighs most."""
    report: dict[str, Any] = {}
    for name, kinds in (("all", KINDS), *((kind, (kind,)) for kind in KINDS)):
        mine = [(q, answer == q.answer, weights, frame_of(q)) for q, answer, weights in found if q.kind in kinds]
        most = [int(weights.mean(0).argmax()) == frame for _, _, weights, frame in mine]
        report[name] = {
            "most_weight": share(most),
            "most_weight_if_right": share([hit for hit, (_, right, _, _) in zip(most, mine, strict=True) if right]),
            "mean_weight": round(sum(float(w.mean(0)[frame]) for _, _, w, frame in mine) / len(mine), 4),
            "right": share([right for _, right, _, _ in mine]),
            "by_layer": [
                round(sum(int(w[layer].argmax()) == frame for _, _, w, frame in mine) / len(mine), 4)
                for layer in range(len(mine[0][2]))
            ],
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="How often the frame in question gets the most weight.")
    parser.add_argument("--checkpoint", default=str(TINY_CHECKPOINT))
    parser.add_argument("--videos", type=Path, required=True, help="folder written by procedural_videos")
    parser.add_argument("--output_file", type=Path)
    arguments = parser.parse_args()
    model, processor = load_model(arguments.checkpoint, device="cpu"), load_processor(arguments.checkpoint)
    questions = [question for question in read_questions(arguments.videos) if question.kind in KINDS]
    report = {
        "checkpoint": Path(arguments.checkpoint).name,
        "weights_sha256": checksum(Path(arguments.checkpoint) / "model.safetensors")[:16],
        "chance": 1 / NUM_FRAMES,
        "results": measure(list(looks(model, processor, questions))),
        "machine": platform.processor() or platform.machine(),
        "commit": commit(),
        "versions": {
            "transformers_crosslmm": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.output_file is not None:
        arguments.output_file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
