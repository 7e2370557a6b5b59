r"""Accuracy of a checkpoint on questions about video files, by kind, with and without its cross-attention.

    python -m transformers_crosslmm.tiny.procedural_videos --split heldout --seed 1000 --num_videos 300 \
        --output_dir runs/heldout
    python -m transformers_crosslmm.measuring.quality --videos runs/heldout \
        --output_file benchmarks/tiny_checkpoint.json

Every question is a separate chat: `num_frames` frames of the file are sampled, or those at the record's `times`, and
`generate` answers greedily. An answer is right if it equals the true one exactly.
"""

import argparse
import json
import math
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from .. import TINY_CHECKPOINT
from .._version import __version__
from ..checkpoints.load import load_model, load_processor
from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CrossLMMProcessor
from ..tiny.procedural_videos import CHANCE

SUMMARIES = {
    "fine_detail": ("colour", "shape", "place", "which_frame", "exists"),
    "order_and_count": ("order", "count"),
    "times": ("frame_time", "when"),
}
"""Kinds that are scored together, too."""


@dataclass(frozen=True)
class VideoQuestion:
    video: Path
    kind: str
    question: str
    answer: str
    times: list[float] | None = None


def read_questions(folder: Path) -> list[VideoQuestion]:
    """Reads `questions.jsonl` of a folder written by `procedural_videos`."""
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [VideoQuestion(**record | {"video": folder / record["video"]}) for record in map(json.loads, lines)]


@contextmanager
def closed_gates(model: CrossLMMForConditionalGeneration) -> Iterator[None]:
    """Sets all gates of T2V and V2V to 0 within the block."""
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("2v.gate.weight")]
    values = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for gate, value in zip(gates, values, strict=True):
                gate.copy_(value)


def move_timestamps(inputs: Mapping[str, Any], processor: CrossLMMProcessor) -> dict[str, Any]:
    """The inputs of one video a row, with the time before each frame that of the one half the frames further on."""
    input_ids = inputs["input_ids"].clone()
    bracket = processor.tokenizer.convert_tokens_to_ids("<")
    for row in input_ids:
        is_frame = row == processor.video_token_id
        end = int(is_frame.nonzero()[-1]) + 1
        begin = int((row[: int(is_frame.nonzero()[0])] == bracket).nonzero()[-1])
        stamps: list[list[int]] = [[]]
        frames: list[list[int]] = [[]]
        for token, is_placeholder in zip(row[begin:end].tolist(), is_frame[begin:end].tolist(), strict=True):
            if not is_placeholder and frames[-1]:
                stamps, frames = [*stamps, []], [*frames, []]
            (frames if is_placeholder else stamps)[-1].append(token)
        half = len(stamps) // 2
        moved = [*stamps[half:], *stamps[:half]]
        row[begin:end] = torch.tensor([t for pair in zip(moved, frames, strict=True) for part in pair for t in part])
    return {**inputs, "input_ids": input_ids}


def batches_of(
    processor: CrossLMMProcessor, questions: Sequence[VideoQuestion], *, num_frames: int
) -> Iterator[tuple[list[VideoQuestion], Any]]:
    """Yields the consecutive questions about each video, with inputs of `generate` for them."""
    for video, group in groupby(questions, key=lambda question: question.video):
        asked = list(group)
        media = {"type": "video", "path": str(video)}
        chats = [
            [{"role": "user", "content": [media, {"type": "text", "text": question.question}]}] for question in asked
        ]
        sampling = {"num_frames": num_frames} if asked[0].times is None else {"times": asked[0].times}
        options = {**sampling, "padding": True, "padding_side": "left", "return_tensors": "pt"}
        yield (
            asked,
            processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=options
            ),
        )


@torch.no_grad()
def answer_questions(model: Any, inputs: Mapping[str, torch.Tensor], processor: CrossLMMProcessor) -> list[str]:
    """The greedy answer to each row of `inputs`, stripped."""
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def interval(right: int, asked: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of right / asked."""
    if not asked:
        return 0.0, 1.0
    z, share = 1.959964, right / asked
    centre = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked)) / (1 + z * z / asked)
    return max(0.0, centre - half), min(1.0, centre + half)


def is_within_a_frame(answer: str, question: VideoQuestion) -> bool:
    """Whether "3.4 seconds" is the time of the right frame, or of the one before or after it."""
    times = [f"{seconds:.1f} seconds" for seconds in cast(list[float], question.times)]
    return answer in times and abs(times.index(answer) - times.index(question.answer)) <= 1


def score(marks: Sequence[bool]) -> dict[str, Any]:
    low, high = interval(sum(marks), len(marks))
    return {
        "asked": len(marks),
        "right": sum(marks),
        "accuracy": round(sum(marks) / len(marks), 4) if marks else None,
        "interval_95": [round(low, 4), round(high, 4)],
    }


def evaluate(
    model: CrossLMMForConditionalGeneration,
    processor: CrossLMMProcessor,
    questions: Sequence[VideoQuestion],
    *,
    num_frames: int = 8,
) -> dict[str, Any]:
    """Scores a model by kind of question, as it is ("as_trained"), if it has gates, with gates of 0 ("gates_0"), and
    if the processor writes the times of frames, with these moved by half of the frames ("timestamps_moved"). Without
    them nobody asks for times.

    "chance" is the accuracy of a uniform guess among a kind's answers, "always_the_same" that of the most frequent
    answer. Questions about one video must be consecutive; they are a batch.
    """
    if not processor.add_timestamps:
        questions = [question for question in questions if question.kind not in SUMMARIES["times"]]
    has_gates = any(name.endswith("2v.gate.weight") for name, _ in model.named_parameters())
    marks: dict[str, dict[str, list[bool]]] = {}
    truths: dict[str, Counter[str]] = {}
    for question in questions:
        truths.setdefault(question.kind, Counter())[question.answer] += 1
    for asked, inputs in batches_of(processor, questions, num_frames=num_frames):
        answers = {"as_trained": answer_questions(model, inputs, processor)}
        if has_gates:
            with closed_gates(model):
                answers["gates_0"] = answer_questions(model, inputs, processor)
        if processor.add_timestamps:
            moved = move_timestamps(inputs, processor)
            answers["timestamps_moved"] = answer_questions(model, moved, processor)
        for state, given in answers.items():
            for question, text in zip(asked, given, strict=True):
                marked = marks.setdefault(state, {})
                marked.setdefault(question.kind, []).append(text == question.answer)
                if question.kind == "when" and question.times:
                    marked.setdefault("when_within_a_frame", []).append(is_within_a_frame(text, question))
    scores: dict[str, Any] = {}
    for state, by_kind in marks.items():
        scores[state] = {
            kind: score(by_kind[kind])
            | {"chance": CHANCE[kind], "always_the_same": max(truths[kind].values()) / len(by_kind[kind])}
            for kind in CHANCE
            if kind in by_kind
        }
        if "when_within_a_frame" in by_kind:
            scores[state]["when_within_a_frame"] = score(by_kind["when_within_a_frame"])
        for name, kinds in SUMMARIES.items():
            if not by_kind.keys().isdisjoint(kinds):
                scores[state][name] = score([mark for kind in kinds for mark in by_kind.get(kind, [])])
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of a checkpoint on a folder of procedural videos.")
    parser.add_argument("--checkpoint", default=str(TINY_CHECKPOINT))
    parser.add_argument("--videos", type=Path, required=True, help="folder written by procedural_videos")
    parser.add_argument("--num_frames", type=int, default=8)
    parser.add_argument("--add_timestamps", action="store_true", help="write each frame's time before it")
    parser.add_argument("--output_file", type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.checkpoint, device="cpu")
    processor = load_processor(arguments.checkpoint, add_timestamps=arguments.add_timestamps or None)
    scores = evaluate(model, processor, read_questions(arguments.videos), num_frames=arguments.num_frames)
    report = {
        "checkpoint": Path(arguments.checkpoint).name,
        "num_frames": arguments.num_frames,
        "add_timestamps": processor.add_timestamps,
        "scores": scores,
        "machine": platform.processor() or platform.machine(),
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
