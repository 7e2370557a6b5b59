"""`crosslmm evaluate`: a checkpoint's accuracy on a file of questions about videos with their answers."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..asking.prefilled import IsolatedStream, PrefilledVideo
from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CrossLMMProcessor


@dataclass(frozen=True)
class OwnQuestion:
    video: str
    question: str
    answer: str


def read_own_questions(path: str | os.PathLike) -> list[OwnQuestion]:
    """Reads a JSON Lines file of `{"video": …, "question": …, "answer": …}`; other keys are ignored.

    Raises ValueError, with the line number, for an invalid line, and for a file without questions.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            values = [record[name] for name in ("video", "question", "answer")]
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            values, record = [], error
        if not values or not all(isinstance(value, str) and value.strip() for value in values):
            raise ValueError(
                f'Line {number} of {path} must be a JSON object with the strings "video", "question" and "answer"; '
                f"got {str(record)[:80]}."
            )
        found.append(OwnQuestion(*values))
    if not found:
        raise ValueError(f"{path} has no questions; write one JSON object per line.")
    return found


def is_right(answer: str, truth: str) -> bool:
    """Whether both are equal, ignoring case, surrounding space and a final full stop."""
    return answer.strip().rstrip(".").casefold() == truth.strip().rstrip(".").casefold()


def answers_to(
    model: CrossLMMForConditionalGeneration,
    processor: CrossLMMProcessor,
    questions: list[OwnQuestion],
    *,
    root: str | os.PathLike,
    max_new_tokens: int = 64,
    **sampling: Any,
) -> Iterator[tuple[OwnQuestion, str]]:
    """Yields each question with the greedy answer, grouped by video; each video is decoded and prefilled once.

    root: the folder that names of videos are relative to. sampling: as for `read_video`. Raises VideoError for a video
    that cannot be decoded, because leaving it out would change the accuracy.
    """
    for video, group in groupby(sorted(questions, key=lambda question: question.video), lambda item: item.video):
        prefilled = PrefilledVideo(model, processor, IsolatedStream(processor, os.path.join(root, video), **sampling))
        for question in group:
            yield question, prefilled.fork().ask(question.question, max_new_tokens=max_new_tokens).text


__all__ = ["OwnQuestion", "answers_to", "is_right", "read_own_questions"]
