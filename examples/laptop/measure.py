"""What the trained model answers, about clips of pairs it has never seen and about everything else.

    python examples/laptop/measure.py --model runs/laptop/level-8 --text runs/laptop/text \
        --clips runs/laptop/clips --test test-halves.jsonl --output_file runs/laptop/measured-halves.json

Videos: a test of clips.py, one frame per second, with gates as trained and shut. An answer is right where the
last colour, name, place, number or pair that it names is the true one. Text: the logits against the language model's
own. Beside a video: ordinary questions that training did not have, against the answers without one.
"""

import argparse
import json
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor, __version__
from transformers_crosslmm.measuring.quality import closed_gates, score
from transformers_crosslmm.tiny.procedural_videos import CHANCE, COLOURS, KINDS, NAMES

COLOUR, NAME = f"(?:{'|'.join(COLOURS)})", f"(?:{'|'.join(NAMES)})"
SAID = {
    "colour": COLOUR,
    "shape": NAME,
    "place": "(?:top|bottom) (?:left|right)",
    "which_frame": r"\d",
    "exists": "(?:yes|no)",
    "order": f"{COLOUR} {NAME}",
    "count": r"\d",
}
BATCH_SIZE = 32
ORDINARY = [
    "What is the capital of France?",
    "What is the capital of Germany?",
    "What is 2 plus 2?",
    "What does a nurse do? Answer in one sentence.",
    "What is snow? Answer in one sentence.",
    "Write one short sentence about a cat.",
    "What is the opposite of cold?",
    "Who are you?",
    "Which planet do we live on?",
    "How many legs does a dog have?",
    "Who painted the Mona Lisa?",
    "What do cows eat?",
]


def is_right(record: dict[str, str], answer: str) -> bool:
    said = re.findall(rf"\b{SAID[record['kind']]}\b", answer.lower())
    return said[-1:] == [record["key"].replace("-", " ")]


@torch.no_grad()
def answers_to(
    model: Any, processor: CrossLMMProcessor, questions: Sequence[str], videos: Sequence[Path | None]
) -> list[str]:
    """Greedily written answers; None is a chat without a video."""
    processor_options = {"fps": 1.0, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    answers: list[str] = []
    for start in range(0, len(questions), BATCH_SIZE):
        chats = [
            [{"role": "user", "content": [{"type": "video", "path": str(video)}] * (video is not None) + [question]}]
            for question, video in zip(
                [{"type": "text", "text": question} for question in questions[start : start + BATCH_SIZE]],
                videos[start : start + BATCH_SIZE],
                strict=True,
            )
        ]
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        inputs = processor.apply_chat_template(chats, **options, processor_kwargs=processor_options)
        written = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        ends = written[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(ends, skip_special_tokens=True)]
        print(f"{len(answers)} of {len(questions)} answered: {questions[start]} {answers[start]}", flush=True)
    return answers


@torch.no_grad()
def is_text_unchanged(model: Any, processor: CrossLMMProcessor, text: str) -> bool:
    """Whether the logits of text without a video are the language model's own, to the bit."""
    own = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32).eval()
    for question in ORDINARY:
        chat = [{"role": "user", "content": question}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        inputs = processor.apply_chat_template(chat, **options)
        logits = own(**inputs).logits
        if not torch.equal(model(**inputs).logits[..., : logits.shape[-1]], logits):
            return False
    return True


def run_of(folder: Path) -> dict[str, Any]:
    """Of a run of `crosslmm train`: step and loss, how many steps, and how long it took."""
    state = json.loads((folder / "trainer_state.json").read_text())
    log = state["log_history"]
    return {
        "seconds": round(next(entry["train_runtime"] for entry in log if "train_runtime" in entry)),
        "steps": state["global_step"],
        "losses": [[entry["step"], float(entry["loss"])] for entry in log if "loss" in entry],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the trained model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", required=True, help="folder or name of the language model")
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--test", default="test-8.jsonl", help="which questions")
    parser.add_argument("--num_questions", type=int, help="the first so many of the test")
    parser.add_argument("--output_file", type=Path, required=True)
    arguments = parser.parse_args()
    model = CrossLMMForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).eval()
    processor = CrossLMMProcessor.from_pretrained(arguments.model)
    lines = (arguments.clips / arguments.test).read_text().splitlines()[: arguments.num_questions]
    records = [json.loads(line) for line in lines]
    questions, videos = [r["question"] for r in records], [arguments.clips / r["video"] for r in records]
    report: dict[str, Any] = {"text_is_unchanged": is_text_unchanged(model, processor, arguments.text)}

    alone = answers_to(model, processor, ORDINARY, [None] * len(ORDINARY))
    beside = answers_to(model, processor, ORDINARY, videos[: len(ORDINARY)])
    report["ordinary"] = [
        {"question": question, "alone": one, "beside_a_video": other}
        for question, one, other in zip(ORDINARY, alone, beside, strict=True)
    ]
    began = time.process_time()
    as_trained = answers_to(model, processor, questions, videos)
    report["seconds_of_cpu_per_answer"] = round((time.process_time() - began) / len(questions), 2)
    with closed_gates(model):
        shut = answers_to(model, processor, questions, videos)
    for name, given in (("as_trained", as_trained), ("gates_0", shut)):
        marks = [(record["kind"], is_right(record, text)) for record, text in zip(records, given, strict=True)]
        by_kind = {kind: [mark for other, mark in marks if other == kind] for kind in KINDS}
        by_kind = {kind: own for kind, own in by_kind.items() if own}
        report[name] = {kind: score(own) | {"chance": CHANCE[kind]} for kind, own in by_kind.items()}
    report["examples"] = [
        record | {"said": text, "said_with_gates_shut": other}
        for record, text, other in list(zip(records, as_trained, shut, strict=True))[:40]
    ]
    report["gates"] = {
        name.removeprefix("model.language_model.layers.").removesuffix(".gate.weight"): round(float(gate), 3)
        for name, gate in model.named_parameters()
        if name.endswith("2v.gate.weight")
    }
    report["runs"] = {path.name: run_of(path) for path in sorted(arguments.model.parent.glob("level-*"))}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    report |= {
        "commit": commit,
        "machine": platform.processor() or platform.machine(),
        "versions": {
            "transformers_crosslmm": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }
    arguments.output_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
