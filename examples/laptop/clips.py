"""Clips of 1, 2, 4 and 8 seconds with chats about them, for a model that answers in sentences.

    python examples/laptop/clips.py --talk runs/laptop/talk.json --output_dir runs/laptop/clips

writes H.264 files, `train-1.jsonl` … `train-8.jsonl`, and `test-1.jsonl` and `test-8.jsonl`: a question each, about
pairs of colour and shape that no training clip shows. `crosslmm train` reads all of them as they are.

An answer names the thing and the second before it says something new: the text looks back at the video from its own
last words, and a language model that stays frozen brings nothing else there.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

from transformers_crosslmm.tiny.procedural_videos import (
    KINDS,
    ProceduralVideo,
    Question,
    Split,
    Thing,
    ask,
    random_generator,
    random_video,
    write_mp4,
)

LENGTHS = (1, 2, 4, 8)
TURNS = 4
TALK_SHARE = 0.1
SIZE, FPS = 120, 4

# Asked of clips of one second, with one thing in them. Short answers: where a fact is one word in ten, sentences are
# learned first, and for a long time nothing else.
NAMING: dict[str, tuple[tuple[str, str], ...]] = {
    "colour": (("What colour is it?", "It is {colour}."), ("Which colour do you see?", "I see {colour}.")),
    "shape": (("What is it?", "It is a {name}."), ("Which shape or digit do you see?", "I see a {name}.")),
    "place": (("Where is it?", "It is at the {place}."), ("In which corner is it?", "In the {place}.")),
}
# A question and its answer, which goes with it: so there is one right answer to learn.
WORDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "colour": (
        ("What colour is the {name} in second {k}?", "The {name} in second {k} is {colour}."),
        ("In second {k} there is a {name}. Which colour does it have?", "In second {k} the {name} is {colour}."),
        ("Tell me the colour of the {name} that is on screen in second {k}.", "The {name} in second {k} is {colour}."),
    ),
    "shape": (
        ("What is the {colour} thing in second {k}?", "The {colour} thing in second {k} is a {name}."),
        ("Which shape or digit is {colour} in second {k}?", "In second {k} the {colour} thing is a {name}."),
        ("Look at second {k} and name the {colour} thing.", "The {colour} thing in second {k} is a {name}."),
    ),
    "place": (
        ("Where is the {thing} in second {k}?", "The {thing} in second {k} is at the {place}."),
        ("In which corner do you see the {thing} in second {k}?", "In second {k} the {thing} is at the {place}."),
        ("Tell me the place of the {thing} in second {k}.", "The {thing} in second {k} is at the {place}."),
    ),
    "which_frame": (
        ("When is the {thing} on screen?", "The {thing} is on screen in second {k}."),
        ("In which second does the {thing} appear?", "The {thing} appears in second {k}."),
        ("Which second of the video shows the {thing}?", "The {thing} is shown in second {k}."),
    ),
    "exists": (
        ("Is the {thing} in the video?", "The {thing}? {yes}, it is {not_}in the video."),
        ("Does the {thing} appear at any time?", "The {thing}? {yes}, it does {not_}appear."),
        ("Can you see the {thing}?", "The {thing}? {yes}, I do {not_}see it."),
    ),
    "order": (
        ("Which comes first, the {one} or the {other}?", "{times}, so the {earlier} comes first."),
        ("The {one} and the {other}: which of them is earlier?", "{times}, so the {earlier} is earlier."),
        ("Does the {one} or the {other} appear first?", "{times}, so the {earlier} appears first."),
    ),
    "count": (
        (
            "For how many seconds is the {thing} on screen?",
            "The {thing} is on screen in second {all}: that makes {n}.",
        ),
        ("How many seconds show the {thing}?", "The {thing} is shown in second {all}: that makes {n}."),
        ("Count the seconds with the {thing}.", "The {thing} is there in second {all}: that makes {n}."),
    ),
}


def in_words(rng: np.random.Generator, video: ProceduralVideo, question: Question) -> tuple[str, str]:
    """The question in one of our wordings, and its answer as a sentence."""
    thing = question.things[0]
    fields: dict[str, object] = {"thing": thing, "name": thing.name, "colour": thing.colour}
    if question.kind in ("colour", "shape", "place"):
        (fields["k"],) = re.findall(r"\d", question.text)
        fields["place"] = question.answer.replace("-", " ")
    elif question.kind == "which_frame":
        fields["k"] = question.answer
    elif question.kind == "exists":
        fields |= {"yes": question.answer.capitalize(), "not_": "" if question.answer == "yes" else "not "}
    elif question.kind == "order":
        one, other = question.things
        first_seconds = [f"the {thing} in second {video.seconds_of(thing)[0]}" for thing in question.things]
        times = " and ".join(first_seconds)
        fields |= {"one": one, "other": other, "earlier": question.answer, "times": times[0].upper() + times[1:]}
    else:
        seconds = video.seconds_of(thing)
        fields |= {"all": ", ".join(map(str, seconds)), "n": question.answer}
    wordings = WORDINGS[question.kind]
    asked, answered = wordings[int(rng.integers(len(wordings)))]
    return asked.format(**fields), answered.format(**fields)


def naming(rng: np.random.Generator, video: ProceduralVideo) -> list[dict[str, str]]:
    """Colour, shape and place of the one thing in a clip of one second, in any order: questions, answers, keys."""
    ((appearance,),) = video.scenes
    thing, place = appearance.thing, appearance.place
    keys = {"colour": thing.colour, "shape": thing.name, "place": place}
    fields = {"colour": thing.colour, "name": thing.name, "place": place.replace("-", " ")}
    turns = []
    for kind in map(str, rng.permutation(list(NAMING))):
        asked, answered = NAMING[kind][int(rng.integers(len(NAMING[kind])))]
        turns.append({"question": asked, "answer": answered.format(**fields), "kind": kind, "key": keys[kind]})
    return turns


def turns_about(rng: np.random.Generator, video: ProceduralVideo) -> list[tuple[str, str]]:
    """Up to `TURNS` questions of different kinds. No thing comes up in two: the text would answer for the video."""
    turns: dict[str, tuple[str, str]] = {}
    said: set[Thing] = set()
    for kind in [str(kind) for _ in range(4) for kind in rng.permutation(KINDS)]:
        if kind in turns or len(turns) == TURNS:
            continue
        question = ask(rng, video, kind=kind)
        if question is not None and said.isdisjoint(question.things):
            turns[kind] = in_words(rng, video, question)
            said.update(question.things)
    return list(turns.values())


def write_split(folder: Path, *, split: Split, num_seconds: int, num_videos: int, talk: list[dict]) -> None:
    """Clips and the file of chats about them. A third of the training clips of a length are shorter."""
    lines = []
    for index in range(num_videos):
        rng = random_generator(seed=num_seconds, split=split, index=index)
        shorter = [length for length in LENGTHS if length < num_seconds]
        is_shorter = split == "train" and shorter and rng.random() < 1 / 3
        length = int(rng.choice(shorter)) if is_shorter else num_seconds
        video = random_video(rng, num_seconds=length, split=split)
        name = f"{split}-{num_seconds}-{index:05d}.mp4"
        write_mp4(video, folder / name, size=SIZE, fps=FPS)
        if split == "heldout" and num_seconds == 1:
            lines += [{"video": name} | turn for turn in naming(rng, video)]
            continue
        if split == "heldout":
            for kind in KINDS:
                if (question := ask(rng, video, kind=kind, split=split)) is not None:
                    asked, answered = in_words(rng, video, question)
                    record = {"video": name, "question": asked, "answer": answered}
                    lines.append(record | {"kind": kind, "key": question.answer})
            continue
        if length == 1:
            turns = [(turn["question"], turn["answer"]) for turn in naming(rng, video)]
        else:
            turns = turns_about(rng, video)
        if not turns or rng.random() < TALK_SHARE:
            chosen = talk[int(rng.integers(len(talk)))]
            turns = [(chosen["question"], chosen["answer"])]
        said = [
            {"from": speaker, "value": words}
            for turn in turns
            for speaker, words in zip(("human", "gpt"), turn, strict=True)
        ]
        said[0]["value"] = "<video>\n" + said[0]["value"]
        lines.append({"video": name, "conversations": said})
    path = folder / f"{'test' if split == 'heldout' else split}-{num_seconds}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{path}: {len(lines)} records about {num_videos} clips", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes clips, and chats about them.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--talk", type=Path, required=True, help="what talk.py wrote")
    parser.add_argument("--num_videos", type=int, nargs=4, default=(1600, 800, 1280, 1600), help="of each length")
    parser.add_argument("--num_test_videos", type=int, default=100)
    arguments = parser.parse_args()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    talk = json.loads(arguments.talk.read_text())
    for num_seconds in (1, 8):
        write_split(folder, split="heldout", num_seconds=num_seconds, num_videos=arguments.num_test_videos, talk=talk)
    for num_seconds, num_videos in zip(LENGTHS, arguments.num_videos, strict=True):
        write_split(folder, split="train", num_seconds=num_seconds, num_videos=num_videos, talk=talk)


if __name__ == "__main__":
    main()
