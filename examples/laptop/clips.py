"""Clips of 1, 2 to 4, and 8 seconds with chats about them, for a model that answers in sentences.

    python examples/laptop/clips.py --talk runs/laptop/talk.json --output_dir runs/laptop/clips

writes H.264 files and, for `crosslmm train`, a file of chats for each level:

    train-1.jsonl   one thing: its colour, shape and place, in few words
    train-4.jsonl   up to 4 seconds: what is in each of them, in order
    train-8.jsonl   8 seconds with two or four things, each of which stays: what is in some seconds, and free wordings

and for `measure.py` a question each, about pairs of colour and shape that no training clip shows: `test-1.jsonl`,
`test-halves.jsonl` (8 seconds, two things, four seconds each) and `test-8.jsonl` (another thing each second).

Many facts to a chat: a step costs what its words cost, and most of them are the chat's frame.
"""

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from transformers_crosslmm.tiny.procedural_videos import (
    KINDS,
    ProceduralVideo,
    Question,
    Thing,
    ask,
    random_generator,
    random_video,
    write_mp4,
)

LEVELS = (1, 4, 8)
TURNS = 4
TALK_SHARE = 0.1
NAMING_SHARE = 1 / 6
"""Share of the chats of later levels that are about clips of one second, lest it be forgotten."""
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
        first_seconds = [f"the {thing} in second {video.scenes_of(thing)[0]}" for thing in question.things]
        times = " and ".join(first_seconds)
        fields |= {"one": one, "other": other, "earlier": question.answer, "times": times[0].upper() + times[1:]}
    else:
        seconds = video.scenes_of(thing)
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


def described(video: ProceduralVideo, seconds: Iterable[int]) -> str:
    """What is in these seconds, in as few words as name it: three facts in ten tokens."""
    scenes = {k: video.scenes[k - 1] for k in seconds}
    words = {
        k: f"{scene[0].thing}, {scene[0].place.replace('-', ' ')}" if scene else "nothing"
        for k, scene in scenes.items()
    }
    return " ".join(f"Second {k}: {said}." for k, said in words.items())


def each_second(rng: np.random.Generator, video: ProceduralVideo) -> list[tuple[str, str]]:
    asked = ("What do you see in each second?", "Describe the video, second by second.", "What happens in the video?")
    return [(str(rng.choice(asked)), described(video, range(1, video.num_seconds + 1)))]


def some_seconds(rng: np.random.Generator, video: ProceduralVideo) -> list[tuple[str, str]]:
    """A second of each thing, in any order: neither the text before nor the order tells what is in it."""
    seconds = [str(rng.choice(video.seconds_of(thing))) for thing in video.things]
    seconds = [seconds[index] for index in rng.permutation(len(seconds))]
    listed = " and ".join(filter(None, (", ".join(seconds[:-1]), seconds[-1])))
    named = f"second{'s' * (len(seconds) > 1)} {listed}"
    asked = (f"What do you see in {named}?", f"Describe {named}.")
    return [(str(rng.choice(asked)), described(video, map(int, seconds)))]


def slowed(video: ProceduralVideo, times: int) -> ProceduralVideo:
    """Every second of it `times` times. Times far apart are told apart before neighbouring ones are."""
    return replace(video, scenes=tuple(scene for scene in video.scenes for _ in range(times)))


def write_level(folder: Path, *, level: int, num_videos: int, talk: list[dict]) -> None:
    """Training clips and the file of chats about them."""
    lines = []
    for index in range(num_videos):
        rng = random_generator(seed=level, split="train", index=index)
        if level == 1 or rng.random() < NAMING_SHARE:
            video = random_video(rng, num_seconds=1)
            turns = [(turn["question"], turn["answer"]) for turn in naming(rng, video)]
        elif level == 4:
            video = random_video(rng, num_seconds=int(rng.choice((2, 2, 3, 4))))
            turns = each_second(rng, video)
        else:
            times = int(rng.choice((4, 4, 2)))
            video = slowed(random_video(rng, num_seconds=8 // times, filled=1.0), times)
            turns = some_seconds(rng, video) if rng.random() < 2 / 3 else turns_about(rng, video)
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


def write_test(folder: Path, *, name: str, num_seconds: int, times: int, num_videos: int) -> None:
    """Clips of unseen pairs, with a record for each question."""
    lines = []
    for index in range(num_videos):
        rng = random_generator(seed=num_seconds, split="heldout", index=index)
        video = slowed(random_video(rng, num_seconds=num_seconds, split="heldout", filled=1.0), times)
        file = f"heldout-{name}-{index:05d}.mp4"
        write_mp4(video, folder / file, size=SIZE, fps=FPS)
        if video.num_seconds == 1:
            lines += [{"video": file} | turn for turn in naming(rng, video)]
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
    parser.add_argument("--num_videos", type=int, nargs=3, default=(960, 600, 3200), help="of each level")
    parser.add_argument("--num_test_videos", type=int, default=100)
    arguments = parser.parse_args()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    talk = json.loads(arguments.talk.read_text())
    for name, num_seconds, times in (("1", 1, 1), ("halves", 2, 4), ("8", 8, 1)):
        write_test(folder, name=name, num_seconds=num_seconds, times=times, num_videos=arguments.num_test_videos)
    for level, num_videos in zip(LEVELS, arguments.num_videos, strict=True):
        write_level(folder, level=level, num_videos=num_videos, talk=talk)


if __name__ == "__main__":
    main()
