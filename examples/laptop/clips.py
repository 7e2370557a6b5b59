"""Clips of 1, 2, 4 and 8 seconds with chats about them, for a model that answers in sentences.

    python examples/laptop/clips.py --talk runs/laptop/talk.json --output_dir runs/laptop/clips

writes H.264 files and, for `crosslmm train`, a file of chats for each level:

    train-1.jsonl   one second, one thing: its colour, shape and place, in few words
    train-2.jsonl   two seconds: what is to be seen in each of them, in any order
    train-4.jsonl   four seconds: that, and questions in free wordings, answered in sentences
    train-8.jsonl   eight seconds with two to eight things: the same

and for `measure.py` a question each, about pairs of colour and shape that no training clip shows: `test-1.jsonl`,
`test-halves.jsonl` (8 seconds, two things that differ in everything, four seconds each) and `test-8.jsonl` (a stay
lasts one to four seconds).

Many facts to a chat: a step costs what its words cost, and most of them are the chat's frame.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from transformers_crosslmm.tiny.procedural_videos import (
    HELD_OUT_THINGS,
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

LEVELS = (1, 2, 4, 8)
TURNS = 4
TALK_SHARE = 0.1
NAMING_SHARE = 1 / 8
"""Share of the chats of later levels that are about clips of one second, lest it be forgotten."""
DESCRIBED = {1: 0.5, 2: 1.0, 4: 0.75, 8: 0.6}
"""Share of a level's chats that list what is to be seen in some seconds; others are naming, later sentences."""
SIZE, FPS = 120, 2

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
        ("What colour is the {name} in second {k}?", "Second {k} {thing}, so it is {colour}."),
        (
            "In second {k} there is a {name}. Which colour does it have?",
            "Second {k} {thing}, so its colour is {colour}.",
        ),
        ("Tell me the colour of the {name} in second {k}.", "Second {k} {thing}, so the {name} is {colour}."),
    ),
    "shape": (
        ("What is the {colour} thing in second {k}?", "Second {k} {thing}, so it is a {name}."),
        ("Which shape or digit is {colour} in second {k}?", "Second {k} {thing}, so the {colour} one is a {name}."),
        ("Look at second {k} and name the {colour} thing.", "Second {k} {thing}, so I see a {name}."),
    ),
    "place": (
        ("Where is the {thing} in second {k}?", "Second {k} {thing}, {place}, so it is at the {place}."),
        ("In which corner is the {thing} in second {k}?", "Second {k} {thing}, {place}, so it is in the {place}."),
        ("Tell me the place of the {thing} in second {k}.", "Second {k} {thing}, {place}, so you find it {place}."),
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


def listed(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


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
        first = [f"the {thing} is there in second {video.scenes_of(thing)[0]}" for thing in question.things]
        times = " and ".join(first)
        fields |= {"one": one, "other": other, "earlier": question.answer, "times": times[0].upper() + times[1:]}
    else:
        fields |= {"all": listed([*map(str, video.scenes_of(thing))]), "n": question.answer}
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


def describe(video: ProceduralVideo, second: int) -> str:
    """What is to be seen in a second, in as few words as name it, three facts in eight tokens.

    What follows the number directly is looked up from the number: T2V's query is made of the token that it is at.
    """
    (shown,) = video.scenes[second - 1]
    return f"Second {second} {shown.thing}, {shown.place.replace('-', ' ')}."


def described(rng: np.random.Generator, video: ProceduralVideo) -> list[tuple[str, str]]:
    """A second of each thing, in any order: neither the text before nor the order tells what is in it."""
    things = [video.things[index] for index in rng.permutation(len(video.things))]
    seconds = [int(rng.choice(video.scenes_of(thing))) for thing in things]
    named = f"second{'s' * (len(seconds) > 1)} {listed([*map(str, seconds)])}"
    asked = (f"What do you see in {named}?", f"Describe {named}.")
    return [(str(rng.choice(asked)), " ".join(describe(video, second) for second in seconds))]


def slowed(video: ProceduralVideo, times: int) -> ProceduralVideo:
    """Every second of it `times` times. Times far apart are told apart before neighbouring ones are."""
    scenes = tuple(scene for scene in video.scenes for _ in range(times))
    return replace(video, scenes=scenes, ends=tuple(map(float, range(1, len(scenes) + 1))))


def pair(rng: np.random.Generator, split: Split) -> ProceduralVideo:
    """Two things that differ in colour, name and place: a blind choice of one of them is right half of the time."""
    while True:
        video = random_video(rng, num_seconds=2, split=split, filled=1.0)
        (one,), (other,) = video.scenes
        if one.thing.colour != other.thing.colour and one.thing.name != other.thing.name and one.place != other.place:
            return video


def at_a_time(rng: np.random.Generator, video: ProceduralVideo) -> list[dict[str, str]]:
    """Colour, shape and place of an unseen thing, of which the question says the time and nothing else."""
    second = int(rng.choice([k for thing in video.things if thing in HELD_OUT_THINGS for k in video.scenes_of(thing)]))
    (shown,) = video.scenes[second - 1]
    keys = {"colour": shown.thing.colour, "shape": shown.thing.name, "place": shown.place}
    asked, answer = f"What do you see in second {second}?", describe(video, second)
    return [{"question": asked, "answer": answer, "kind": kind, "key": key} for kind, key in keys.items()]


def write_level(folder: Path, *, level: int, num_videos: int, talk: list[dict]) -> None:
    """Training clips and the file of chats about them."""
    lines = []
    for index in range(num_videos):
        rng = random_generator(seed=level, split="train", index=index)
        num_seconds = level if rng.random() > NAMING_SHARE else 1
        times = int(rng.choice((4, 2, 1))) if num_seconds == 8 else 1
        scenes = num_seconds // times
        video = pair(rng, "train") if scenes == 2 else random_video(rng, num_seconds=scenes, filled=1.0)
        video = slowed(video, times)
        if rng.random() < DESCRIBED[num_seconds]:
            turns = described(rng, video)
        elif num_seconds == 1:
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
        name = f"train-{level}-{index:05d}.mp4"
        write_mp4(video, folder / name, size=SIZE, fps=FPS)
        lines.append({"video": name, "conversations": said})
    write_lines(folder / f"train-{level}.jsonl", lines)


def write_test(folder: Path, *, name: str, num_videos: int) -> None:
    """Clips of unseen pairs, with a record for each question."""
    lines = []
    for index in range(num_videos):
        rng = random_generator(seed=LEVELS[-1], split="heldout", index=index)
        if name == "halves":
            video = slowed(pair(rng, "heldout"), 4)
        else:
            video = random_video(rng, num_seconds=int(name), split="heldout", filled=1.0)
        file = f"heldout-{name}-{index:05d}.mp4"
        write_mp4(video, folder / file, size=SIZE, fps=FPS)
        if name == "1":
            lines += [{"video": file} | turn for turn in naming(rng, video)]
            continue
        if name == "halves":
            lines += [{"video": file} | turn for turn in at_a_time(rng, video)]
            continue
        for kind in KINDS:
            if (question := ask(rng, video, kind=kind, split="heldout")) is not None:
                asked, answered = in_words(rng, video, question)
                record = {"video": file, "question": asked, "answer": answered}
                lines.append(record | {"kind": kind, "key": question.answer})
    write_lines(folder / f"test-{name}.jsonl", lines)


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{path}: {len(records)} records", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes clips, and chats about them.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--talk", type=Path, required=True, help="what talk.py wrote")
    parser.add_argument("--num_videos", type=int, nargs=4, default=(800, 2560, 640, 1040), help="of each level")
    parser.add_argument("--num_test_videos", type=int, default=100)
    arguments = parser.parse_args()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    talk = json.loads(arguments.talk.read_text())
    for name in ("1", "halves", "8"):
        write_test(folder, name=name, num_videos=arguments.num_test_videos)
    for level, num_videos in zip(LEVELS, arguments.num_videos, strict=True):
        write_level(folder, level=level, num_videos=num_videos, talk=talk)


if __name__ == "__main__":
    main()
