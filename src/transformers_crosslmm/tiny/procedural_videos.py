"""Procedural videos with questions whose true answers are known: what the tiny checkpoint learns from.

A *video* is a sequence of *scenes*. A *thing* is a shape or a digit in a colour ("red star", "blue seven"). In every
scene one thing is on screen or none, inside a quarter of the picture, drifting there while the textured background
scrolls; then the scene changes. There are two sorts:

- A scene lasts a second (`random_video`). Frame k of n frames sampled from an n-second clip (t = k - ½ seconds) shows
  scene k, counted from 1, and "frame k" and "second k" mean the same.
- Scenes last as long as they like, 4 to 40 seconds together, and each is seen once, at some moment
  (`random_timed_video`, `random_moments`). Only the frames' times tell when a thing appears.

Everything follows from integers: the same `seed`, `split` and `index` give the same video, questions and pixels. Of
the 96 combinations of colour and name, `HELD_OUT_THINGS` are never shown nor asked about in the split "train"; in the
split "heldout" every question is about one of them, beside and against things of either sort.

    python -m transformers_crosslmm.tiny.procedural_videos --output_dir runs/videos --num_videos 20

writes `00000.mp4`, … (H.264), `questions.jsonl` and `contact_sheet.png`; with `--timed` the videos are timed, and
every record says with `times` at which seconds to look.
"""

import argparse
import bisect
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "heldout"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (245, 130, 15),
    "yellow": (245, 225, 40),
    "green": (35, 160, 50),
    "cyan": (70, 215, 225),
    "blue": (35, 60, 215),
    "purple": (150, 45, 190),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
DIGITS = ("zero", "one", "two", "four", "five", "seven")
NAMES = SHAPES + DIGITS
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
KINDS = ("colour", "shape", "place", "which_frame", "exists", "order", "count")
"""What is asked where a scene lasts a second."""
TIMED_KINDS = ("exists", "order", "count", "frame_time", "when")
"""What is asked where frames and seconds are not the same."""
MAX_SECONDS = 8
FILLED = 0.8
"""Share of the scenes that show a thing, at least."""
TIMED_SCENES = (8, 16)
TIMED_SECONDS = (4, 40)
TICK = 1 / 8
"""Seconds: scenes of timed videos begin at its multiples and last two of them at least."""
MAX_COUNT = 4
"""A thing is on screen in at most this many scenes, one after the other."""

WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {name} in frame {k}?",
        "Which colour does the {name} have in second {k}?",
        "Name the colour of the {name} in frame {k}.",
    ),
    "shape": (
        "Which shape or digit is {colour} in frame {k}?",
        "What is the {colour} thing in second {k}?",
        "Name the {colour} thing in frame {k}.",
    ),
    "place": (
        "Where is the {thing} in frame {k}?",
        "In which quarter is the {thing} in second {k}?",
        "Name the place of the {thing} in frame {k}.",
    ),
    "which_frame": (
        "In which frame does the {thing} appear?",
        "Which frame shows the {thing}?",
        "In which second is the {thing} on screen?",
    ),
    "exists": (
        "Is there a {thing} in the video?",
        "Does a {thing} appear at any time?",
        "Can a {thing} be seen in any frame?",
    ),
    "order": (
        "Which comes first, the {first} or the {second}?",
        "Which appears earlier, the {first} or the {second}?",
        "The {first} and the {second}: which of the two is first on screen?",
    ),
    "count": (
        "How many frames show the {thing}?",
        "In how many frames is there a {thing}?",
        "For how many seconds is the {thing} on screen?",
    ),
    "frame_time": (
        "At which second is frame {k} shown?",
        "When is frame {k} on screen?",
    ),
    "when": (
        "At which second does the {thing} appear?",
        "When does the {thing} first appear?",
        "At what time is the {thing} first seen?",
    ),
}
CHANCE: dict[str, float] = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(NAMES),
    "place": 1 / len(PLACES),
    "which_frame": 1 / MAX_SECONDS,
    "exists": 1 / 2,
    "order": 1 / 2,
    "count": 1 / MAX_COUNT,
    "frame_time": 1 / TIMED_SCENES[0],
    "when": 1 / TIMED_SCENES[0],
}
"""What answers without the video reach: every kind's answers are drawn evenly (8-second videos; the last two: the
time of one of the frames, of which there are 8 at least)."""


@dataclass(frozen=True)
class Thing:
    colour: str
    name: str

    def __str__(self) -> str:
        return f"{self.colour} {self.name}"


ALL_THINGS = tuple(Thing(colour, name) for colour in COLOURS for name in NAMES)
HELD_OUT_THINGS = frozenset(
    Thing(colour, name)
    for i, colour in enumerate(COLOURS)
    for j, name in enumerate(NAMES)
    # One name of every colour, never the same: few, so that which names a colour lacks is not worth learning.
    if j == (5 * i + 2) % len(NAMES)
)
SEEN_THINGS = tuple(thing for thing in ALL_THINGS if thing not in HELD_OUT_THINGS)
UNSEEN_THINGS = tuple(thing for thing in ALL_THINGS if thing in HELD_OUT_THINGS)


@dataclass(frozen=True)
class Appearance:
    """A thing in one scene. Lengths are shares of the frame's side, x to the right, y down; angle in radians."""

    thing: Thing
    place: str
    start: tuple[float, float]
    end: tuple[float, float]
    radius: float
    angle: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class ProceduralVideo:
    scenes: tuple[tuple[Appearance, ...], ...]
    background_seed: int
    ends: tuple[float, ...]
    """Seconds from the beginning at which each scene is over."""

    @property
    def num_scenes(self) -> int:
        return len(self.scenes)

    @property
    def num_seconds(self) -> float:
        return self.ends[-1]

    @property
    def is_timed(self) -> bool:
        """Whether a scene is longer or shorter than a second."""
        return self.ends != tuple(range(1, self.num_scenes + 1))

    @property
    def middles(self) -> tuple[float, ...]:
        """The second at which half of each scene is over."""
        return tuple((start + end) / 2 for start, end in zip((0.0, *self.ends), self.ends, strict=False))

    def scenes_of(self, thing: Thing) -> tuple[int, ...]:
        """The scenes that show `thing`, counted from 1."""
        return tuple(k for k, scene in enumerate(self.scenes, start=1) if any(a.thing == thing for a in scene))

    @cached_property
    def things(self) -> tuple[Thing, ...]:
        """Every thing that appears, in the order of first appearance."""
        return tuple(dict.fromkeys(a.thing for scene in self.scenes for a in scene))


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    things: tuple[Thing, ...]
    """What is asked about."""


def random_generator(*, seed: int, split: Split, index: int) -> np.random.Generator:
    """The stream of random numbers of one video; no two of (seed, split, index) share one."""
    return np.random.default_rng([seed, ("train", "heldout").index(split), index])


def random_video(
    rng: np.random.Generator,
    *,
    num_seconds: int = MAX_SECONDS,
    split: Split = "train",
    things_per_scene: int = 1,
    filled: float = FILLED,
) -> ProceduralVideo:
    """A video of `num_seconds` scenes of a second each.

    Things are drawn with a number of scenes each (1 to `MAX_COUNT`, 1 more often than not), for which they stay, until
    the share `filled` of the screen's room (`things_per_scene` in every scene) is taken. Things may share their colour
    or their name with others, but not within a scene, so that "the circle in frame 3" is one.
    """
    if not 1 <= num_seconds <= MAX_SECONDS:
        raise ValueError(f"`num_seconds` must lie between 1 and {MAX_SECONDS}; got {num_seconds}.")
    ends = tuple(map(float, range(1, num_seconds + 1)))
    return _random_scenes(rng, ends, split=split, things_per_scene=things_per_scene, filled=filled)


def random_timed_video(
    rng: np.random.Generator,
    *,
    num_scenes: tuple[int, int] = TIMED_SCENES,
    split: Split = "train",
    filled: float = FILLED,
) -> ProceduralVideo:
    """A video of `TIMED_SECONDS` with so many scenes, each as long as chance has it; the rest as in `random_video`.

    num_scenes: at least and at most.
    """
    return _random_scenes(rng, _random_ends(rng, *num_scenes), split=split, things_per_scene=1, filled=filled)


def _random_ends(rng: np.random.Generator, fewest: int, most: int) -> tuple[float, ...]:
    num_scenes = int(rng.integers(fewest, most + 1))
    num_ticks = int(rng.uniform(*TIMED_SECONDS) / TICK)
    # Distances of points thrown at random into what is left when every scene has had its two ticks.
    cuts = np.sort(rng.integers(0, num_ticks - 2 * num_scenes + 1, size=num_scenes - 1))
    ticks = np.append(cuts + 2 * np.arange(1, num_scenes), num_ticks)
    return tuple((ticks * TICK).tolist())


def random_moments(rng: np.random.Generator, video: ProceduralVideo) -> list[float]:
    """A second of every scene at which to look: after the same share of each, or in timed videos after any."""
    shares = rng.uniform(0.02, 0.98, size=video.num_scenes if video.is_timed else 1)
    starts, ends = np.array((0.0, *video.ends[:-1])), np.array(video.ends)
    return (starts + shares * (ends - starts)).tolist()


def _random_scenes(
    rng: np.random.Generator, ends: tuple[float, ...], *, split: Split, things_per_scene: int, filled: float
) -> ProceduralVideo:
    num_scenes = len(ends)
    scenes: list[list[Thing]] = [[] for _ in range(num_scenes)]
    used: set[Thing] = set()
    while sum(map(len, scenes)) < filled * things_per_scene * num_scenes:
        # Without an unseen thing on screen there would be little to ask in the held-out split.
        is_unseen = split == "heldout" and (not used or rng.random() < 0.5)
        pool = UNSEEN_THINGS if is_unseen else SEEN_THINGS
        thing = _relative(rng, pool, sorted(used, key=str)) if used and rng.random() < 0.5 else _choose(rng, pool)
        if thing in used:
            continue
        is_free = [
            len(scene) < things_per_scene and all(o.colour != thing.colour and o.name != thing.name for o in scene)
            for scene in scenes
        ]
        wanted = 1 if rng.random() < 0.4 else int(rng.integers(1, min(MAX_COUNT, num_scenes) + 1))
        starts = [i for i in range(num_scenes - wanted + 1) if all(is_free[i : i + wanted])]
        if not starts:
            continue
        used.add(thing)
        first = _choose(rng, starts)
        for scene in scenes[first : first + wanted]:
            scene.append(thing)
    return ProceduralVideo(
        scenes=tuple(_arrange(rng, things) for things in scenes),
        background_seed=int(rng.integers(2**31)),
        ends=ends,
    )


def _choose(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]


def _relative(rng: np.random.Generator, pool: Sequence[Thing], used: list[Thing]) -> Thing:
    """A thing with the colour or the name of one in use, if `pool` has any: what makes half a look lead astray."""
    other = _choose(rng, used)
    return _choose(rng, [t for t in pool if (t.colour == other.colour) != (t.name == other.name)] or pool)


def _arrange(rng: np.random.Generator, things: list[Thing]) -> tuple[Appearance, ...]:
    """Things on their ways, each within a quarter of its own, which it never leaves."""
    quarters = rng.permutation(len(PLACES))
    appearances = []
    for thing, quarter in zip(things, quarters, strict=False):
        radius = rng.uniform(0.17, 0.22)
        corner = np.array([quarter % 2, quarter // 2]) / 2
        start, end = (corner + rng.uniform(radius, 0.5 - radius, size=2) for _ in range(2))
        rgb = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-12, 13, size=3), 0, 255)
        appearances.append(
            Appearance(
                thing=thing,
                place=PLACES[quarter],
                start=(float(start[0]), float(start[1])),
                end=(float(end[0]), float(end[1])),
                radius=float(radius),
                angle=float(rng.uniform(-0.2, 0.2)),
                rgb=(int(rgb[0]), int(rgb[1]), int(rgb[2])),
            )
        )
    return tuple(appearances)


# --- pixels ---------------------------------------------------------------------------------------------------------


def _regular(points: int, *, inner: float = 1.0, turn: float = -math.pi / 2) -> list[tuple[float, float]]:
    """Corners of a regular polygon in the unit circle; every second one at radius `inner`."""
    return [
        ((r := inner if i % 2 else 1.0) * math.cos(a := turn + 2 * math.pi * i / points), r * math.sin(a))
        for i in range(points)
    ]


def _box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


_SEGMENTS = {
    "a": _box(-0.62, -1.0, 0.62, -0.62),
    "b": _box(0.24, -1.0, 0.62, 0.19),
    "c": _box(0.24, -0.19, 0.62, 1.0),
    "d": _box(-0.62, 0.62, 0.62, 1.0),
    "e": _box(-0.62, -0.19, -0.24, 1.0),
    "f": _box(-0.62, -1.0, -0.24, 0.19),
    "g": _box(-0.62, -0.19, 0.62, 0.19),
}
_DIGIT_SEGMENTS = {"zero": "abcdef", "one": "bc", "two": "abged", "four": "fgbc", "five": "afgcd", "seven": "abc"}
OUTLINES: dict[str, list[list[tuple[float, float]]]] = {
    "circle": [_regular(48)],
    "square": [_box(-0.82, -0.82, 0.82, 0.82)],
    "triangle": [_regular(3)],
    "star": [_regular(10, inner=0.42)],
    "cross": [_box(-0.3, -1.0, 0.3, 1.0), _box(-1.0, -0.3, 1.0, 0.3)],
    "heart": [
        [
            (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
            for t in np.linspace(0, 2 * math.pi, 40, endpoint=False)
        ]
    ],
    **{name: [_SEGMENTS[s] for s in segments] for name, segments in _DIGIT_SEGMENTS.items()},
}
"""Polygons of every shape and seven-segment digit around (0, 0), within a radius of about 1."""

_SUPERSAMPLING = 4


def render_frame(video: ProceduralVideo, time_seconds: float, *, size: int) -> np.ndarray:
    """The picture at `time_seconds`: (size, size, 3) uint8. The same scene at every size."""
    scene = min(bisect.bisect_right(video.ends, time_seconds), video.num_scenes - 1)
    start, end = (0.0, *video.ends)[scene], video.ends[scene]
    # The texture is made for eight seconds; in longer videos it scrolls as much more slowly.
    scrolled_seconds = time_seconds * MAX_SECONDS / max(MAX_SECONDS, video.num_seconds)
    frame = _background(video.background_seed, scrolled_seconds, size=size)
    for appearance in video.scenes[scene]:
        _draw(frame, appearance, share=(time_seconds - start) / (end - start))
    return frame


def _draw(frame: np.ndarray, appearance: Appearance, *, share: float) -> None:
    """Draw into `frame` where the thing is after `share` of its scene, edges smoothed by supersampling."""
    size = frame.shape[0]
    x, y = (a + (b - a) * share for a, b in zip(appearance.start, appearance.end, strict=True))
    reach = appearance.radius * 1.15
    left, top = (max(0, math.floor((c - reach) * size)) for c in (x, y))
    right, bottom = (min(size, math.ceil((c + reach) * size) + 1) for c in (x, y))
    fine = _SUPERSAMPLING
    mask = Image.new("L", ((right - left) * fine, (bottom - top) * fine))
    pen = ImageDraw.Draw(mask)
    cos, sin = math.cos(appearance.angle), math.sin(appearance.angle)
    scale = appearance.radius * size * fine
    origin = ((x * size - left) * fine, (y * size - top) * fine)
    for polygon in OUTLINES[appearance.thing.name]:
        pen.polygon(
            [(origin[0] + scale * (u * cos - v * sin), origin[1] + scale * (u * sin + v * cos)) for u, v in polygon],
            fill=255,
        )
    cover = np.asarray(mask.reduce(fine), dtype=np.float32)[..., None] / 255
    region = frame[top:bottom, left:right]
    region[...] = region + cover * (np.array(appearance.rgb, dtype=np.float32) - region) + 0.5


@lru_cache(maxsize=8)
def _texture(seed: int, size: int) -> tuple[np.ndarray, tuple[float, float]]:
    """A muted texture (soft blotches, stripes, grain) of twice the frame's size, and how fast it scrolls.

    Returns (2·size, 2·size, 3) uint8 and the speed in frame sides per second; 8 seconds stay within the texture.
    """
    rng = np.random.default_rng(seed)
    base = rng.uniform(50, 130) + rng.uniform(-16, 16, size=3)
    cells = base + rng.uniform(-28, 28, size=(13, 13, 1)) + rng.uniform(-9, 9, size=(13, 13, 3))
    side = 2 * size
    blotches = Image.fromarray(cells.clip(0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    direction, waves, strength = rng.uniform(0, math.pi), rng.uniform(4, 18), rng.uniform(0, 14)
    axis = np.linspace(0, 2 * math.pi * waves, side, endpoint=False)
    stripes = strength * np.sin(axis[None, :] * math.cos(direction) + axis[:, None] * math.sin(direction))
    grain = rng.integers(-6, 7, size=(side, side, 1), dtype=np.int16)
    texture = np.asarray(blotches, dtype=np.int16) + stripes.astype(np.int16)[..., None] + grain
    speed = rng.uniform(-0.1, 0.1, size=2)
    return texture.clip(0, 255).astype(np.uint8), (float(speed[0]), float(speed[1]))


def _background(seed: int, time_seconds: float, *, size: int) -> np.ndarray:
    """The part of the texture that is behind the frame at `time_seconds`: a copy, (size, size, 3) uint8."""
    texture, speed = _texture(seed, size)
    top, left = (int(((1 - math.copysign(1, v)) / 2 + time_seconds * v) * size) for v in speed)
    return texture[top : top + size, left : left + size].copy()


def write_mp4(
    video: ProceduralVideo, path: Path | str, *, size: int = 240, fps: int = 8, constant_rate_factor: int = 23
) -> None:
    """Encode the video as H.264 (yuv420p) at `fps` frames per second and `size` × `size` pixels (even)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(constant_rate_factor), "threads": "1"}
        for i in range(round(video.num_seconds * fps)):
            frame = av.VideoFrame.from_ndarray(render_frame(video, i / fps, size=size), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def draw_contact_sheet(video: ProceduralVideo, *, size: int = 240, columns: int = 4) -> Image.Image:
    """The middle of every scene side by side, numbered as the questions number them."""
    rows = math.ceil(video.num_scenes / columns)
    margin, caption = 6, 16
    sheet = Image.new("RGB", (columns * (size + margin) + margin, rows * (size + margin + caption) + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for i, moment in enumerate(video.middles):
        left = margin + (i % columns) * (size + margin)
        top = margin + (i // columns) * (size + margin + caption)
        pen.text((left, top), f"frame {i + 1}", fill="black")
        sheet.paste(Image.fromarray(render_frame(video, moment, size=size)), (left, top + caption))
    return sheet


# --- questions ------------------------------------------------------------------------------------------------------


def ask(
    rng: np.random.Generator,
    video: ProceduralVideo,
    *,
    kind: str,
    split: Split = "train",
    moments: Sequence[float] | None = None,
) -> Question | None:
    """A question of `kind` with its true answer, or None when the video gives no well-posed one.

    moments: the second of each scene that is seen (None: its middle). The answer to "frame_time" is one of them as the
    processor writes it, "3.4 seconds", that to "when" the first that shows the thing.

    Answers are drawn first and evenly, then something that fits them, so that the question alone tells nothing.
    In the split "heldout" the thing asked about (for "order": one of the two) is of `HELD_OUT_THINGS`.
    """
    if kind not in WORDINGS:
        raise ValueError(f"`kind` must be one of {', '.join(WORDINGS)}; got {kind!r}.")
    wordings = WORDINGS[kind]
    if kind == "count" and video.is_timed:  # frames are not seconds
        wordings = wordings[:2]
    wording = _choose(rng, wordings)
    subjects = [t for t in video.things if split == "train" or t in HELD_OUT_THINGS]
    if kind in ("colour", "shape", "place"):
        appearances = [(k, a) for k, scene in enumerate(video.scenes, 1) for a in scene if a.thing in subjects]
        if not appearances:
            return None
        k, a = _choose(rng, appearances)
        text = wording.format(name=a.thing.name, colour=a.thing.colour, thing=a.thing, k=k)
        answer = {"colour": a.thing.colour, "shape": a.thing.name, "place": a.place}[kind]
        return Question(kind, text, answer, (a.thing,))
    if kind == "exists":
        answer = _choose(rng, ("yes", "no"))
        pool = UNSEEN_THINGS if split == "heldout" else SEEN_THINGS
        absent = [t for t in pool if t not in video.things]
        # Its colour and its name are both in the video, on different things: neither alone gives the answer.
        colours, names = {t.colour for t in video.things}, {t.name for t in video.things}
        hard = [t for t in absent if t.colour in colours and t.name in names]
        options = subjects if answer == "yes" else hard if hard and rng.random() < 0.7 else absent
        if not options:
            return None
        thing = _choose(rng, options)
        return Question(kind, wording.format(thing=thing), answer, (thing,))
    if kind == "order":
        scenes_of = {t: video.scenes_of(t) for t in video.things}
        pairs = [  # the earlier is gone before the later comes
            (a, b)
            for a in scenes_of
            for b in scenes_of
            if scenes_of[a][-1] < scenes_of[b][0] and (a in subjects or b in subjects)
        ]
        if not pairs:
            return None
        earlier, later = _choose(rng, pairs)
        first, second = (earlier, later) if rng.random() < 0.5 else (later, earlier)
        return Question(kind, wording.format(first=first, second=second), str(earlier), (first, second))
    if kind == "which_frame":
        options = [t for t in subjects if len(video.scenes_of(t)) == 1]
        if not options:
            return None
        thing = _choose(rng, options)
        (k,) = video.scenes_of(thing)
        # Long stays seldom reach the ends, so that things seen once gather there.
        if k in (1, video.num_scenes) and rng.random() < 0.35:
            return None
        return Question(kind, wording.format(thing=thing), str(k), (thing,))
    seen_at = video.middles if moments is None else moments
    if kind == "frame_time":
        k = int(rng.integers(1, len(seen_at) + 1))
        return Question(kind, wording.format(k=k), f"{seen_at[k - 1]:.1f} seconds", ())
    if kind == "when":
        if not subjects:
            return None
        thing = _choose(rng, subjects)
        k = video.scenes_of(thing)[0]
        if k == 1 and rng.random() < 0.35:  # where stays of every length can begin
            return None
        return Question(kind, wording.format(thing=thing), f"{seen_at[k - 1]:.1f} seconds", (thing,))
    assert kind == "count"
    counts = {t: len(video.scenes_of(t)) for t in subjects}
    wanted = int(rng.integers(1, MAX_COUNT + 1))
    options = [t for t, count in counts.items() if count == wanted]
    # Short stays are found more often than long ones.
    if rng.random() < 0.2 * (MAX_COUNT - wanted) or not options:
        return None
    thing = _choose(rng, options)
    return Question(kind, wording.format(thing=thing), str(wanted), (thing,))


# --- files ----------------------------------------------------------------------------------------------------------


def write_videos(
    folder: Path, *, num_videos: int, seed: int, split: Split, size: int, fps: int, num_seconds: int = MAX_SECONDS
) -> None:
    """Videos, `questions.jsonl` (at most one question of each kind per video) and a contact sheet of the first."""

    def videos() -> Iterator[tuple[np.random.Generator, ProceduralVideo, None]]:
        for index in range(num_videos):
            rng = random_generator(seed=seed, split=split, index=index)
            yield rng, random_video(rng, num_seconds=num_seconds, split=split), None

    _write(folder, videos(), kinds=KINDS, split=split, size=size, fps=fps)


def write_timed_videos(folder: Path, *, num_videos: int, seed: int, split: Split, size: int, fps: int) -> None:
    """As `write_videos`, of timed videos; `times` in `questions.jsonl` are of frames that the files have.

    Raises ValueError unless a frame begins with every tick.
    """
    if fps * TICK % 1:
        raise ValueError(f"`fps` must be a multiple of {1 / TICK:.0f}, so that scenes begin with a frame; got {fps}.")

    def videos() -> Iterator[tuple[np.random.Generator, ProceduralVideo, list[float]]]:
        for index in range(num_videos):
            rng = random_generator(seed=seed, split=split, index=index)
            video = random_timed_video(rng, split=split)
            yield rng, video, [math.floor(moment * fps) / fps for moment in random_moments(rng, video)]

    _write(folder, videos(), kinds=TIMED_KINDS, split=split, size=size, fps=fps)


def _write(
    folder: Path,
    videos: Iterable[tuple[np.random.Generator, ProceduralVideo, list[float] | None]],
    *,
    kinds: Sequence[str],
    split: Split,
    size: int,
    fps: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as lines:
        for index, (rng, video, moments) in enumerate(videos):
            name = f"{index:05d}.mp4"
            write_mp4(video, folder / name, size=size, fps=fps)
            if index == 0:
                draw_contact_sheet(video, size=size).save(folder / "contact_sheet.png")
            for kind in kinds:
                question = ask(rng, video, kind=kind, split=split, moments=moments)
                if question is not None:
                    record = {"video": name, "kind": kind, "question": question.text, "answer": question.answer}
                    times = {} if moments is None else {"times": moments}
                    lines.write(json.dumps(record | times) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes procedural videos (H.264) and questions about them.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_videos", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--size", type=int, default=240, help="pixels along each side, even")
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--timed", action="store_true", help="scenes of any length, 4 to 40 seconds together")
    arguments = parser.parse_args()
    write = write_timed_videos if arguments.timed else write_videos
    write(
        arguments.output_dir,
        num_videos=arguments.num_videos,
        seed=arguments.seed,
        split=arguments.split,
        size=arguments.size,
        fps=arguments.fps,
    )
    print(f"{arguments.num_videos} videos and {arguments.output_dir / 'questions.jsonl'}")


if __name__ == "__main__":
    main()
