"""Answers six questions about the sample video with the package's tiny checkpoint.

Run it with `make demo`, or `python samples/demo.py [CHECKPOINT]`.
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import pipeline

import transformers_crosslmm

here = Path(__file__).parent
checkpoint = sys.argv[1] if len(sys.argv) > 1 else transformers_crosslmm.TINY_CHECKPOINT
sample = json.loads((here / "questions.json").read_text())
video = here / sample["video"]

answer = pipeline("video-text-to-text", model=str(checkpoint))
table = Table("question", "answer", "truth", title=f"{video.name}, {sample['num_frames']} frames")
for question in sample["questions"]:
    output = answer(
        videos=str(video),
        text=question["question"],
        processor_kwargs={
            "num_frames": sample["num_frames"],
            "add_timestamps": question.get("add_timestamps", False),  # the time before each frame, to ask when
        },
        max_new_tokens=8,
        return_full_text=False,
    )
    table.add_row(question["question"], output[0]["generated_text"].strip(), question["answer"])
Console().print(table)
