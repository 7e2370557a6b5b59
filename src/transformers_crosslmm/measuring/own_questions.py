"""`crosslmm evaluate`: the share of a file of questions about videos that a checkpoint answers as the file says."""

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
    """The questions of a JSON Lines file, `{"video": …, "question": …, "answer": …}` each; other keys are ignored.

    Raises ValueError, with the number of the line, for a line that is no such object, and for a file without lines.
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
    """Whether both are the same apart from upper case, space around them and a full stop at the end."""
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
    """Each question with the checkpoint's greedy answer, by video; a video is decoded and prefilled once.

    root: the folder that names of videos are relative to. sampling: as for `read_video`. Raises VideoError for a video
    that cannot be decoded: to leave it out would change what the share is of.
    """
    for video, group in groupby(sorted(questions, key=lambda question: question.video), lambda item: item.video):
        prefilled = PrefilledVideo(model, processor, IsolatedStream(processor, os.path.join(root, video), **sampling))
        for question in group:
            yield question, prefilled.fork().ask(question.question, max_new_tokens=max_new_tokens).text


__all__ = ["OwnQuestion", "answers_to", "is_right", "read_own_questions"]
