"""The generator's promises: repeatable, true, fair, and without a trace of the held-out combinations in training."""

import dataclasses
import io
import json
import re
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from transformers_crosslmm.tiny.procedural_videos import (
    CHANCE,
    COLOURS,
    HELD_OUT_THINGS,
    KINDS,
    NAMES,
    OUTLINES,
    PLACES,
    TIMED_KINDS,
    ask,
    draw_contact_sheet,
    random_generator,
    random_moments,
    random_timed_video,
    random_video,
    render_frame,
    write_mp4,
    write_timed_videos,
    write_videos,
)

SAMPLES = Path(__file__).parents[2] / "samples"
THING = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(NAMES)})\b")


def video_and_questions(index: int, *, split: str = "train", seed: int = 7):
    rng = random_generator(seed=seed, split=split, index=index)
    video = random_video(rng, split=split)
    asked = [ask(rng, video, kind=kind, split=split) for _ in range(2) for kind in KINDS]
    return video, [question for question in asked if question is not None]


# --- an eye of its own: what a video shows, read from its pixels ---


def outline_mask(polygons, *, angle: float, side: int = 160) -> np.ndarray:
    picture = Image.new("1", (side, side))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    for polygon in polygons:
        corners = (np.array(polygon) @ turn.T) * side * 0.4 + side / 2
        ImageDraw.Draw(picture).polygon([tuple(corner) for corner in corners], fill=1)
    return np.asarray(picture)


def framed(mask: np.ndarray, side: int = 40) -> np.ndarray:
    """The mask's bounding box, scaled into a square without changing its proportions."""
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = side / max(box.shape)
    size = (max(1, round(box.shape[1] * scale)), max(1, round(box.shape[0] * scale)))
    square = np.zeros((side, side), bool)
    square[: size[1], : size[0]] = np.asarray(Image.fromarray(box).resize(size, Image.Resampling.NEAREST))
    return square


def outline_templates() -> dict[tuple[str, float], np.ndarray]:
    return {
        (name, angle): framed(outline_mask(polygons, angle=angle))
        for (name, polygons), angle in product(OUTLINES.items(), np.linspace(-0.2, 0.2, 9))
    }


def things_seen(
    frame: np.ndarray, templates: dict[tuple[str, float], np.ndarray], *, tolerance: int = 16
) -> dict[tuple[str, str], str]:
    """{(colour, name): place} by nearest palette colour, overlap with the outlines, and centre of mass."""
    palette = np.array(list(COLOURS.values()))
    distance = np.abs(frame[..., None, :].astype(int) - palette).max(-1)  # (S, S, colours)
    nearest = np.where(distance.min(-1) <= tolerance, distance.argmin(-1), -1)
    seen = {}
    for index, colour in enumerate(COLOURS):
        mask = nearest == index
        if mask.sum() < 0.006 * mask.size:
            continue
        shape = framed(mask)
        name = max(templates, key=lambda key: (templates[key] & shape).sum() / (templates[key] | shape).sum())[0]
        rows, columns = np.where(mask)
        place = PLACES[2 * int(rows.mean() > frame.shape[0] / 2) + int(columns.mean() > frame.shape[1] / 2)]
        seen[colour, name] = place
    return seen


def answer_from(seen: list[dict[tuple[str, str], str]], kind: str, text: str, moments: list[float]) -> str:
    colours = re.findall(rf"\b({'|'.join(COLOURS)})\b", text)
    names = re.findall(rf"\b({'|'.join(NAMES)})\b", text)
    if kind == "order":
        return " ".join(
            min(THING.findall(text), key=lambda pair: next(k for k, scene in enumerate(seen) if pair in scene))
        )
    if kind in ("colour", "shape", "place"):
        scene = seen[int(re.search(r"\d", text).group()) - 1]
        if kind == "colour":
            return next(colour for colour, name in scene if name == names[0])
        if kind == "shape":
            return next(name for colour, name in scene if colour == colours[0])
        return next(place for (colour, name), place in scene.items() if name == names[0] and {colour} >= set(colours))
    if kind == "frame_time":
        return f"{moments[int(re.search(r'[0-9]+', text).group()) - 1]:.1f} seconds"
    if kind == "when":
        first = next(second for second, scene in zip(moments, seen, strict=True) if (colours[0], names[0]) in scene)
        return f"{first:.1f} seconds"
    shown = [k for k, scene in enumerate(seen, start=1) if (colours[0], names[0]) in scene]
    if kind == "exists":
        return "yes" if shown else "no"
    if kind == "count":
        return str(len(shown))
    assert len(shown) == 1
    return str(shown[0])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_answers_are_what_the_pixels_show(split):
    templates = outline_templates()
    asked = Counter()
    for index in range(6):
        video, questions = video_and_questions(index, split=split)
        middles = [k + 0.5 for k in range(video.num_scenes)]
        seen = [things_seen(render_frame(video, moment, size=200), templates) for moment in middles]
        for question in questions:
            assert answer_from(seen, question.kind, question.text, middles) == question.answer, (index, question)
            asked[question.kind] += 1
    assert set(asked) == set(KINDS)


def seconds_between(video) -> list[float]:
    return [end - start for start, end in pairwise((0.0, *video.ends))]


def test_timed_videos_take_4_to_40_seconds_in_8_to_16_scenes_of_any_length():
    videos = [random_timed_video(random_generator(seed=3, split="train", index=index)) for index in range(300)]
    lengths = [video.num_seconds for video in videos]
    assert 4 <= min(lengths) < 6
    assert 38 < max(lengths) <= 40
    assert {video.num_scenes for video in videos} == set(range(8, 17))
    assert min(min(seconds_between(video)) for video in videos) >= 0.25
    assert all(video.is_timed for video in videos)
    # Scenes as long as each other would make the time of a frame a matter of counting.
    assert np.median([max(seconds_between(video)) / np.mean(seconds_between(video)) for video in videos]) > 2


def test_every_scene_of_a_timed_video_is_looked_at_once():
    rng = np.random.default_rng(1)
    for _ in range(50):
        video = random_timed_video(rng)
        moments = random_moments(rng, video)
        assert [sum(end <= moment for end in video.ends) for moment in moments] == list(range(video.num_scenes))


def test_the_file_of_a_timed_video_answers_at_the_times_that_its_questions_name(tmp_path):
    write_timed_videos(tmp_path, num_videos=3, seed=1, split="heldout", size=128, fps=8)
    asked = Counter()
    for record in map(json.loads, (tmp_path / "questions.jsonl").read_text().splitlines()):
        with av.open(str(tmp_path / record["video"])) as container:
            frames = {float(f.time): f.to_ndarray(format="rgb24") for f in container.decode(video=0)}
        seen = [things_seen(frames[second], outline_templates(), tolerance=30) for second in record["times"]]
        assert answer_from(seen, record["kind"], record["question"], record["times"]) == record["answer"]
        asked[record["kind"]] += 1
    assert set(asked) == set(TIMED_KINDS)


def test_a_rate_at_which_scenes_begin_between_two_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`fps` must be a multiple of 8, so that scenes begin with a frame; got 12"):
        write_timed_videos(tmp_path, num_videos=1, seed=0, split="train", size=64, fps=12)


def test_the_truths_about_the_sample_video_are_what_its_file_shows():
    sample = json.loads((SAMPLES / "questions.json").read_text())
    with av.open(str(SAMPLES / sample["video"])) as container:
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    middles = [max((f for f in frames if f[0] <= k + 0.5), key=lambda f: f[0])[1] for k in range(sample["num_frames"])]
    # The codec moves colours by a few levels.
    seen = [things_seen(frame, outline_templates(), tolerance=30) for frame in middles]
    for question in sample["questions"]:
        moments = [k + 0.5 for k in range(sample["num_frames"])]
        assert answer_from(seen, question["kind"], question["question"], moments) == question["answer"]


def test_the_same_numbers_give_the_same_video_questions_and_pixels():
    (first, questions), (again, questions_again) = video_and_questions(3), video_and_questions(3)
    assert first == again
    assert questions == questions_again
    assert np.array_equal(render_frame(first, 2.3, size=50), render_frame(again, 2.3, size=50))


@pytest.mark.parametrize("other", [{"index": 4}, {"seed": 8}, {"split": "heldout"}], ids=str)
def test_another_index_seed_or_split_gives_another_video(other):
    assert video_and_questions(**({"index": 3} | other))[0] != video_and_questions(3)[0]


def test_training_never_shows_nor_names_a_held_out_combination():
    held_out = {str(thing) for thing in HELD_OUT_THINGS}
    for index in range(300):
        video, questions = video_and_questions(index)
        assert not HELD_OUT_THINGS & set(video.things)
        for question in questions:
            assert not [
                words for words in held_out if re.search(rf"\b{words}\b", f"{question.text} {question.answer}")
            ]


def test_every_held_out_question_is_about_a_held_out_combination():
    for index in range(60):
        video, questions = video_and_questions(index, split="heldout")
        for question in questions:
            if question.kind in ("colour", "shape", "place"):
                scene = video.scenes[int(re.search(r"\d", question.text).group()) - 1]
                words = set(re.findall(r"\w+", question.text))
                (asked,) = [
                    a for a in scene if a.thing.name in words or (a.thing.colour in words and question.kind == "shape")
                ]
                assert asked.thing in HELD_OUT_THINGS
            elif question.kind != "frame_time":
                assert any(str(thing) in question.text for thing in HELD_OUT_THINGS)


def test_every_colour_lacks_one_name_and_no_two_the_same():
    assert Counter(thing.colour for thing in HELD_OUT_THINGS) == dict.fromkeys(COLOURS, 1)
    assert max(Counter(thing.name for thing in HELD_OUT_THINGS).values()) == 1


def test_no_answer_is_more_likely_than_chance_says():
    answers: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    firsts = Counter()
    for index in range(800):
        rng = random_generator(seed=11, split="train", index=index)
        video = random_video(rng)
        for kind in KINDS:
            if (question := ask(rng, video, kind=kind)) is not None:
                answers[kind][question.answer] += 1
                if kind == "order":
                    firsts[THING.findall(question.text)[0] == tuple(question.answer.split())] += 1
    answers["order"] = firsts
    for kind, counts in answers.items():
        asked, chance = counts.total(), CHANCE[kind]
        # Four standard deviations for the most frequent of up to twelve answers.
        bound = chance + 4 * (chance * (1 - chance) / asked) ** 0.5
        assert max(counts.values()) / asked <= bound, (kind, counts)


def test_a_thing_is_on_screen_in_scenes_that_follow_each_other():
    for index in range(50):
        video, _ = video_and_questions(index)
        for thing in video.things:
            scenes = video.scenes_of(thing)
            assert scenes == tuple(range(scenes[0], scenes[-1] + 1))


def test_things_stay_in_a_quarter_of_their_own():
    for index in range(50):
        video, _ = video_and_questions(index)
        for scene in video.scenes:
            assert len({a.place for a in scene}) == len(scene)
            assert len({a.thing.colour for a in scene}) == len({a.thing.name for a in scene}) == len(scene)
            for a in scene:
                corner = np.array([PLACES.index(a.place) % 2, PLACES.index(a.place) // 2]) / 2
                for point in (a.start, a.end):
                    assert (np.array(point) - a.radius >= corner).all()
                    assert (np.array(point) + a.radius <= corner + 0.5).all()


def test_things_and_background_move_within_a_second():
    video, _ = video_and_questions(0)
    scene = next(k for k, appearances in enumerate(video.scenes) if appearances)
    early, late = (render_frame(video, scene + share, size=90).astype(int) for share in (0.05, 0.95))
    empty = dataclasses.replace(video, scenes=((),) * 8)
    background = [render_frame(empty, scene + share, size=90).astype(int) for share in (0.05, 0.95)]
    assert np.abs(early - late).mean() > 1
    assert np.abs(background[0] - background[1]).mean() > 0.5


def test_the_file_is_h264_and_shows_the_rendered_frames(tmp_path):
    video, _ = video_and_questions(5)
    write_mp4(video, tmp_path / "video.mp4", size=128, fps=4)
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = {float(frame.time): frame.to_ndarray(format="rgb24") for frame in container.decode(stream)}
    assert len(frames) == 8 * 4
    for seconds, decoded in frames.items():
        rendered = render_frame(video, seconds, size=128).astype(float)
        # One scene taken for its neighbour differs by a thing's share of the frame, about 10 levels and more.
        assert np.abs(decoded - rendered).mean() < 6, seconds


def test_a_folder_holds_videos_questions_and_a_contact_sheet(tmp_path):
    write_videos(tmp_path, num_videos=2, seed=5, split="heldout", size=96, fps=2, num_seconds=3)
    records = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert {record["video"] for record in records} == {"00000.mp4", "00001.mp4"}
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"00000.mp4", "00001.mp4"}
    assert set(records[0]) == {"video", "kind", "question", "answer"}
    assert Image.open(io.BytesIO((tmp_path / "contact_sheet.png").read_bytes())).width > 3 * 96


def test_the_contact_sheet_shows_the_middle_of_every_second():
    video, _ = video_and_questions(2)
    sheet = np.asarray(draw_contact_sheet(video, size=64, columns=4))
    for k in range(8):
        frame = render_frame(video, k + 0.5, size=64)
        windows = np.lib.stride_tricks.sliding_window_view(sheet, frame.shape)
        rows, columns = windows.shape[:2]
        region = windows[k // 4 * rows // 2 : (k // 4 + 1) * rows // 2 + 1, :columns]
        assert (region == frame).all((-1, -2, -3)).any(), f"frame {k + 1} is not in its row"


@pytest.mark.parametrize("num_seconds", [0, 9])
def test_a_length_that_questions_cannot_speak_of_is_refused(num_seconds):
    with pytest.raises(ValueError, match=f"`num_seconds` must lie between 1 and 8; got {num_seconds}"):
        random_video(random_generator(seed=0, split="train", index=0), num_seconds=num_seconds)


def test_an_unknown_kind_of_question_is_refused():
    video, _ = video_and_questions(0)
    with pytest.raises(ValueError, match=r"`kind` must be one of colour, shape.*; got 'mood'"):
        ask(random_generator(seed=0, split="train", index=0), video, kind="mood")
