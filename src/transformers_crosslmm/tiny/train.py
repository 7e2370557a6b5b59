"""Trains the tiny checkpoint from nothing.

    python -m transformers_crosslmm.tiny.train --output_dir runs/tiny

Three phases, all on `procedural_videos`, rendered as they are needed:

1. *Vision*: the SigLIP tower learns, patch by patch, colour and name of the thing that covers it. Things come in the
   palette's colours, where only the colour is learned, or in colours outside it, where only the name is: so nothing is
   ever learned about which colour goes with which name, and unseen combinations are nearly as easy as seen ones.
2. *Language*: with the tower frozen, projector, Qwen2 and cross-attention learn to answer. A sample is a chat of
   several questions about one video, at the first level a still with two things. From level to level more kinds of
   question, more things in a still, and clips that show more of them.
3. *Times*: the same parts go on, now with the time before every frame, `<1.2 seconds>`, and with timed videos: when
   does a thing appear?

Everything is seeded; on the same machine and versions the run repeats itself.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..configuration_crosslmm import CrossLMMConfig
from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CHAT_TEMPLATE, MARKS, CrossLMMProcessor, timestamp
from ..training.samples import IGNORED, CrossLMMDataCollator, chat_sample
from .procedural_videos import (
    COLOURS,
    FILLED,
    KINDS,
    MAX_SECONDS,
    NAMES,
    PLACES,
    TIMED_KINDS,
    TIMED_SCENES,
    TIMED_SECONDS,
    WORDINGS,
    ProceduralVideo,
    Question,
    Split,
    Thing,
    ask,
    random_generator,
    random_moments,
    random_timed_video,
    random_video,
    render_frame,
)


@dataclass
class TinyArguments:
    """The options of the run. How the shipped checkpoint came about is in its card."""

    output_dir: str = field(metadata={"help": "Folder for the trained checkpoint."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, videos and questions."})
    vision_steps: int = field(default=2000, metadata={"help": "Steps of the first phase."})
    vision_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the first phase."})
    vision_batch_size: int = field(default=128, metadata={"help": "Frames per step of the first phase."})
    vision_tower: str | None = field(default=None, metadata={"help": "A saved tower instead of the first phase."})
    steps: int = field(default=6500, metadata={"help": "Steps of the second phase."})
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate of the later phases."})
    batch_size: int = field(default=24, metadata={"help": "Videos per step of the later phases."})
    questions_per_video: int = field(default=4, metadata={"help": "Turns of the chat about each video."})
    times_per_video: int = field(default=4, metadata={"help": "How often a video comes back, with new questions."})
    times_steps: int = field(default=3000, metadata={"help": "Steps of the third phase."})
    frames_checkpoint: str | None = field(
        default=None, metadata={"help": "What the second phase has saved in `frames`, instead of the first two."}
    )
    save_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints of the later phases."})
    evaluation_steps: int = field(default=50, metadata={"help": "Steps between looks at held-out questions."})
    cross_attention: bool = field(default=True, metadata={"help": "False: the baseline without V2V and T2V."})
    pooling_mode: str = field(default="bilinear", metadata={"help": "bilinear or average."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})


TIMES = tuple(f"{tenths / 10:.1f}" for tenths in range(10 * TIMED_SECONDS[1] + 1))
"""Those that are one token."""


# --- tokenizer, config, processor -----------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the questions and answers is one token; all other text is bytes.

    So is every time up to 40.0: of a time in digits, four layers copied the first token only. A time before a frame
    is three, "<", "12.3" and " seconds>".
    "top-left" is one word, so one token: an answer of two tokens whose first is shared by two places trains badly.
    """
    texts = [
        word
        for wordings in WORDINGS.values()
        for wording in wordings
        for word in wording.format(name="", colour="", thing="", first="", second="", k="1").split(" ")
    ]
    answers = [*COLOURS, *NAMES, *PLACES, "yes", "no", *map(str, range(10)), "user", "assistant", "system"]
    answers += [*TIMES, "seconds>", *map(str, range(10, TIMED_SCENES[1] + 1))]
    number = r"[0-9]{1,2}\.[0-9]| seconds>| ?[0-9]{1,2}"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"{number}| ?[A-Za-z]+(-[A-Za-z]+)*| ?[^\sA-Za-z0-9]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # More merges than the words hold: the trainer stops when every word is whole.
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([form for word in [*texts, *answers] for form in (word, " " + word)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[mark for mark in MARKS if mark != "<|im_end|>"],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(
    tokenizer: PreTrainedTokenizerFast, *, cross_attention: bool = True, pooling_mode: str = "bilinear"
) -> CrossLMMConfig:
    """60 × 60 pixels, 25 patches, one pooled token per frame; all four layers look at the patches."""
    return CrossLMMConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 60,
            "patch_size": 12,
        },
        text_config={
            "model_type": "qwen2",
            "tie_word_embeddings": True,
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "initializer_range": 0.05,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.vocab["<|image_pad|>"],
        video_token_id=tokenizer.vocab["<|video_pad|>"],
        cross_attention_interval=1,
        use_v2v=cross_attention,
        use_t2v=cross_attention,
        v2v_scope="frame",
        visual_norm="layernorm",
        visual_time="sinusoidal",
        gate_init=1.0,
        pooled_grid_size=1,
        pooling_mode=pooling_mode,
    )


# --- phase 1: vision ------------------------------------------------------------------------------------------------


class PatchLabels(nn.Module):
    """A vision tower with fixed linear read-outs of colour, name and place, on the features as the cross-attention
    sees them.

    The read-outs are orthonormal and stay as they are, so that each of the three takes its own directions and a like
    share of the features. With free ones most of the features' variance told names, and the cross-attention took long
    to find things by their colour. They leave the fast dimensions of `visual_time` empty: time stands there alone.
    """

    readout: torch.Tensor

    def __init__(self, tower: nn.Module, width: int):
        super().__init__()
        self.tower = tower
        self.classes = [len(COLOURS) + 1, len(NAMES) + 1, len(PLACES) + 1]
        readout = torch.zeros(sum(self.classes), width)
        slow = torch.arange(width) % (width // 2) >= 24
        readout[:, slow] = nn.init.orthogonal_(torch.empty(sum(self.classes), int(slow.sum())))
        self.register_buffer("readout", readout)

    def forward(
        self, pixel_values: torch.Tensor, colours: torch.Tensor, names: torch.Tensor, places: torch.Tensor
    ) -> dict:
        """pixel_values (F, 3, S, S); labels (F, N): the last class for background, -100 where nothing is asked."""
        features = self.tower(pixel_values).last_hidden_state
        features = F.layer_norm(features, features.shape[-1:], eps=1e-6)
        logits = (features @ self.readout.T).split(self.classes, dim=-1)
        loss = sum(
            F.cross_entropy(predicted.flatten(0, 1), true.flatten(), ignore_index=IGNORED)
            for predicted, true in zip(logits, (colours, names, places), strict=True)
        )
        return {"loss": loss, "logits": logits}


def repaint(rng: np.random.Generator, video: ProceduralVideo, *, share: float = 0.6) -> ProceduralVideo:
    """The video with `share` of its appearances in random colours that are far from the palette's."""
    palette = np.array(list(COLOURS.values()))

    def colour() -> tuple[int, int, int]:
        while True:
            rgb = rng.integers(0, 256, size=3)
            if np.abs(palette - rgb).sum(-1).min() > 90:
                return int(rgb[0]), int(rgb[1]), int(rgb[2])

    scenes = tuple(
        tuple(dataclasses.replace(a, rgb=colour()) if rng.random() < share else a for a in scene)
        for scene in video.scenes
    )
    return dataclasses.replace(video, scenes=scenes)


class PatchLabelFrames(IterableDataset):
    """Frames full of things, each seen `times` times, with the labels of their grid × grid patches."""

    def __init__(self, *, seed: int, size: int, grid: int, videos_per_round: int = 500, times: int = 4):
        self.seed, self.size, self.grid = seed, size, grid
        self.videos_per_round, self.times = videos_per_round, times

    def __iter__(self) -> Iterator[dict]:
        index = 0
        while True:
            samples = []
            for _ in range(self.videos_per_round):
                # Seeds of the first phase begin where those of the second cannot be.
                rng = random_generator(seed=self.seed, split="train", index=10**9 + index)
                index += 1
                plain = random_video(rng, things_per_scene=len(PLACES))
                painted = repaint(rng, plain)
                for k in range(plain.num_scenes):
                    share = rng.random()
                    frame = degrade(rng, render_frame(painted, k + share, size=self.size)[None])[0]
                    samples.append((frame, *self._labels(plain, painted, k, share)))
            order = np.random.default_rng([self.seed, index])
            for _ in range(self.times):
                for i in order.permutation(len(samples)):
                    frame, colours, names, places = samples[i]
                    pixels = pixels_of(frame[None])[0]
                    yield {"pixel_values": pixels, "colours": colours, "names": names, "places": places}

    def _labels(self, plain, painted, k: int, share: float) -> tuple[np.ndarray, ...]:
        centres = (np.arange(self.grid) + 0.5) / self.grid
        colours = np.full((self.grid, self.grid), len(COLOURS))
        names = np.full((self.grid, self.grid), len(NAMES))
        places = np.full((self.grid, self.grid), len(PLACES))
        for before, after in zip(plain.scenes[k], painted.scenes[k], strict=True):
            x, y = (a + (b - a) * share for a, b in zip(after.start, after.end, strict=True))
            covered = np.maximum(abs(centres[None, :] - x), abs(centres[:, None] - y)) < after.radius
            is_palette = before.rgb == after.rgb
            colours[covered] = list(COLOURS).index(after.thing.colour) if is_palette else IGNORED
            names[covered] = IGNORED if is_palette else NAMES.index(after.thing.name)
            places[covered] = PLACES.index(after.place)
        return colours.ravel(), names.ravel(), places.ravel()


def degrade(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """What cameras and codecs do to (T, S, S, 3) uint8: other brightness, contrast and tint, noise, soft blocks."""
    contrast = rng.uniform(0.9, 1.1)
    shift = rng.uniform(-10, 10) + rng.uniform(-5, 5, size=3)
    noise = rng.integers(-8, 9, size=frames.shape, dtype=np.int8)
    if rng.random() < 0.3:  # colour at half resolution, as yuv420p stores it
        small = frames[:, ::2, ::2].astype(np.float32)
        coarse = small.repeat(2, axis=1).repeat(2, axis=2)
        grey = frames.mean(axis=-1, keepdims=True)
        frames = 0.5 * frames + 0.5 * (coarse - coarse.mean(axis=-1, keepdims=True) + grey)
    return ((frames - 128.0) * contrast + 128 + shift + noise * rng.uniform(0, 1)).clip(0, 255).astype(np.uint8)


def pixels_of(frames: np.ndarray) -> torch.Tensor:
    """(T, S, S, 3) uint8 as SigLIP's processor makes it pixels: (T, 3, S, S), -1 … 1."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


# --- phases 2 and 3: language, times --------------------------------------------------------------------------------


# In the order in which they are taught: who counts finds a thing's frames, who orders finds those of two.
STILL_KINDS = ("colour", "shape", "place", "exists")
CLIP_KINDS = (*STILL_KINDS, "which_frame", "count", "order")
LAST_LEVEL = 12
"""Of the second phase, in the third: all kinds, and most scenes show something."""
TIMED_LEVELS = ((2, 4), (2, 8), TIMED_SCENES)
"""Scenes of timed videos. A time is copied from the right one of few frames first, then of more and more."""
MANY_QUESTIONS = (8, 6)
"""Turns of a chat in the third phase: about a timed video while that is learned, and otherwise."""


class VideoChats(IterableDataset):
    """Chats about procedural videos, samples for `CrossLMMDataCollator`.

    What is shown and asked follows `level`, how often each kind is asked follows `mistakes`; `Curriculum` sets both.
    with_times: the third phase, with a level of its own, `time_level`.
    """

    def __init__(
        self,
        *,
        arguments: TinyArguments,
        tokenizer: PreTrainedTokenizerFast,
        config: CrossLMMConfig,
        with_times: bool = False,
    ):
        self.arguments, self.tokenizer, self.config, self.with_times = arguments, tokenizer, config, with_times
        self.level = LAST_LEVEL if with_times else 1
        self.time_level = 0
        self.mistakes = dict.fromkeys(WORDINGS, 1.0)
        self.turns: dict[tuple[Question, bool], dict[str, list[int]]] = {}

    def __iter__(self) -> Iterator[dict]:
        arguments = self.arguments
        videos_per_round = 4 * arguments.batch_size
        index = 0
        while True:
            videos = []
            for _ in range(videos_per_round):
                rng = random_generator(seed=arguments.seed, split="train", index=index)
                index += 1
                video = self.video(rng)
                moments = random_moments(rng, video)
                frames = self.render(rng, video, moments)
                videos.append((video, moments if self.says_times(rng, video) else None, frames))
            rng = np.random.default_rng([arguments.seed, index])
            for _ in range(arguments.times_per_video):
                samples = []
                for i in rng.permutation(len(videos)):
                    video, moments, frames = videos[i]
                    sample = self.sample(self.questions(rng, video, moments), frames, moments)
                    samples.append(self.with_copies(sample) if self.with_times else sample)
                yield from self.paired(rng, samples) if self.with_times else samples

    def with_copies(self, sample: dict) -> dict:
        """The sample with a label for each frame's placeholder: the time that stands before it, if any does.

        To answer with a time, a model copies it twice, to its frame and from there. Every frame is an example of the
        first. Padded to few lengths, because kernels for a new one take longer to make than what they compute.
        """
        ids, labels = list(sample["input_ids"]), list(sample["labels"])
        # A placeholder's prediction is compared with the next label; the time is two tokens before the placeholder.
        for place in (i for i, token in enumerate(ids) if token == self.config.video_token_id):
            if self.tokenizer.convert_ids_to_tokens(ids[place - 2]) in TIMES:
                labels[place + 1] = ids[place - 2]
        rest = -len(ids) % 16
        return sample | {
            "input_ids": ids + [self.tokenizer.pad_token_id] * rest,
            "labels": labels + [IGNORED] * rest,
        }

    def paired(self, rng: np.random.Generator, samples: list[dict]) -> Iterator[dict]:
        """Half a batch of short samples, then half a batch of long ones: padded apart, a third is saved."""
        half = self.arguments.batch_size // 2
        samples = sorted(samples, key=lambda sample: len(sample["input_ids"]))
        halves = [samples[start : start + half] for start in range(0, len(samples), half)]
        for i in rng.permutation(len(halves) // 2):
            yield from halves[i] + halves[-1 - i]

    def questions(
        self, rng: np.random.Generator, video: ProceduralVideo, moments: Sequence[float] | None = None
    ) -> list[Question]:
        """The turns of a chat, kinds drawn in proportion to `mistakes`, each at most once, but "when" and the like.

        No thing comes up in two of them: where the text before answers a question, nothing is learned about looking.
        Were a kind allowed twice, four in ten questions were "exists": absent things are always left to ask about.
        """
        kinds = self.kinds_of(video, with_times=moments is not None)
        most = self.arguments.questions_per_video
        if self.with_times:
            most = MANY_QUESTIONS[0 if video.is_timed and self.time_level < len(TIMED_LEVELS) - 1 else 1]
        share = np.array([self.mistakes[kind] for kind in kinds]) + 0.05
        asked: list[Question] = []
        said: set[Thing] = set()
        for i in rng.choice(len(kinds), size=100, p=share / share.sum()):
            question = ask(rng, video, kind=kinds[i], moments=moments)
            if question is None:
                continue
            may_repeat = question.kind in ("frame_time", "when") or (self.with_times and question.kind == "count")
            key = "answer" if may_repeat else "kind"
            is_new = getattr(question, key) not in {getattr(other, key) for other in asked}
            if said.isdisjoint(question.things) and is_new:
                asked.append(question)
                said.update(question.things)
            if len(asked) == most:
                break
        return asked

    def render(self, rng: np.random.Generator, video: ProceduralVideo, moments: Sequence[float]) -> np.ndarray:
        """The frames at `moments`: (T, S, S, 3) uint8."""
        size = self.config.vision_config.image_size
        return degrade(rng, np.stack([render_frame(video, moment, size=size) for moment in moments]))

    def says_times(self, rng: np.random.Generator, video: ProceduralVideo) -> bool:
        """In the third phase; some videos stay without, for frames whose times nobody knows."""
        return self.with_times and (video.is_timed or rng.random() < 0.8)

    def kinds_of(self, video: ProceduralVideo, *, with_times: bool = False) -> tuple[str, ...]:
        """What may be asked about `video` at the present level."""
        if video.is_timed:
            return TIMED_KINDS
        if video.num_scenes == 1:
            return STILL_KINDS
        kinds = CLIP_KINDS[: len(STILL_KINDS) + self.level - 1]
        return (*kinds, "when") if with_times else kinds

    def video(self, rng: np.random.Generator) -> ProceduralVideo:
        """Stills at the first level, later two clips for every still; in the third phase every second one is timed."""
        if self.with_times and rng.random() < 0.5:
            return random_timed_video(rng, num_scenes=TIMED_LEVELS[self.time_level], filled=rng.uniform(0.4, FILLED))
        stills = 1 / 5 if self.with_times else 1 / 3
        return self.still(rng) if self.level == 1 or rng.random() < stills else self.clip(rng)

    def clip(self, rng: np.random.Generator) -> ProceduralVideo:
        """A video, mostly of eight seconds, with things in up to `level` + 1 of its scenes (or one stay more).

        Where few scenes show anything, a wrong one is right by chance more often, and the frame's number is learned.
        """
        num_seconds = MAX_SECONDS if rng.random() < 0.7 else int(rng.integers(2, MAX_SECONDS + 1))
        filled = min(FILLED, int(rng.integers(1, self.level + 2)) / num_seconds)
        return random_video(rng, num_seconds=num_seconds, filled=filled)

    def still(self, rng: np.random.Generator) -> ProceduralVideo:
        """A video of one scene with several things, where only colour and name tell which is asked about."""
        most = 2 if self.level == 1 else len(PLACES)
        return random_video(rng, num_seconds=1, things_per_scene=int(rng.integers(2, most + 1)))

    def sample(
        self, questions: Sequence[Question], frames: np.ndarray, moments: Sequence[float] | None = None
    ) -> dict:
        """A chat of all `questions` about the video with these frames, which stands before the first.

        moments: when each frame is shown, to be said before it; None: nothing is said.
        """
        turns = [self.turn(question, has_video=i == 0) for i, question in enumerate(questions)]
        ids = [token for turn in turns for token in turn["input_ids"]]
        labels = [token for turn in turns for token in turn["labels"]]
        place = ids.index(self.config.video_token_id)
        video = self.video_tokens(len(frames), moments)
        return {
            "input_ids": [*ids[:place], *video, *ids[place + 1 :]],
            "labels": [*labels[:place], *[IGNORED] * len(video), *labels[place + 1 :]],
            "pixel_values_videos": pixels_of(frames),
            "video_num_frames": torch.tensor([len(frames)]),
        }

    def video_tokens(self, num_frames: int, moments: Sequence[float] | None) -> list[int]:
        """What the processor writes for a video."""
        frame = [self.config.video_token_id] * self.config.tokens_per_frame
        stamps: Sequence[list[int]] = [[]] * num_frames
        if moments is not None:
            stamps = self.tokenizer([timestamp(seconds) for seconds in moments])["input_ids"]
        return [token for stamp in stamps for token in (*stamp, *frame)]

    def turn(self, question: Question, *, has_video: bool) -> dict[str, list[int]]:
        """One question, behind the one placeholder of a video if any, and its answer.

        Turns are kept: the template joins them without a trace, and making one costs as much as rendering a frame.
        """
        if (question, has_video) not in self.turns:
            media = [{"type": "video"}] if has_video else []
            self.turns[question, has_video] = chat_sample(
                self.tokenizer,
                [
                    {"role": "user", "content": [*media, {"type": "text", "text": question.text}]},
                    {"role": "assistant", "content": question.answer},
                ],
                chat_template=CHAT_TEMPLATE,
                placeholder_id=self.config.video_token_id,
                placeholders=[1],
            )
        return self.turns[question, has_video]


@torch.no_grad()
def make_ready_for_times(
    model: CrossLMMForConditionalGeneration, chats: VideoChats, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Between the second phase and the third: words that were never met, times, and pooled tokens.

    What is never said is pushed away from all that is, until "<", "0" and "9" are one word: these are drawn anew. The
    row of a time is the sum of three, of its tens, ones and tenths, so that one that is seldom met is copied like all.
    Pooled tokens, on which nothing depended, have grown to two hundred times the length of words, so that what
    attention adds to one, such as the time before it, does not count: they are made as long as words, and stay so.
    """
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight
    directions = F.normalize(rows, dim=-1)
    is_unused = directions @ F.normalize(directions.mean(0), dim=0) > 0.9
    rows[is_unused] = torch.randn_like(rows[is_unused]) * rows[~is_unused].std()
    tens, ones, tenths = nn.init.orthogonal_(torch.empty(30, rows.shape[1])).view(3, 10, -1)
    for i, time in enumerate(TIMES):
        row = tens[i // 100] + ones[i // 10 % 10] + tenths[i % 10]
        rows[tokenizer.vocab[time]] = 1.2 * F.normalize(row, dim=0)  # as long as other words
    pixels = torch.cat([sample["pixel_values_videos"] for sample in islice(chats, 8)])
    pooled = cast(tuple, model.get_video_features(pixels).pooler_output)
    projector = model.model.multi_modal_projector
    for parameter in projector.linear_2.parameters():
        parameter.mul_(rows.norm(dim=-1).mean() / torch.cat(pooled).norm(dim=-1).mean())
    projector.requires_grad_(False)


def load_frames(
    folder: str, config: CrossLMMConfig, tokenizer: PreTrainedTokenizerFast
) -> CrossLMMForConditionalGeneration:
    """A checkpoint of the second phase, its words put where `tokenizer` has them."""
    saved = CrossLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = CrossLMMForConditionalGeneration._from_config(config, attn_implementation="eager")
    rows = torch.randn(config.text_config.vocab_size, config.text_config.hidden_size) * 0.1
    known = AutoTokenizer.from_pretrained(folder).vocab
    for word, i in tokenizer.vocab.items():
        if word in known:
            rows[i] = saved.get_input_embeddings().weight.detach()[known[word]]
    state = saved.state_dict()
    model.load_state_dict(
        state | {name: rows for name in state if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    )
    return model


class Curriculum(TrainerCallback):
    """Looks now and then how many answers are right in every token, by kind, and raises the level of `chats`.

    The answers are those the model would choose with the truth before it, on rendered frames: to fresh questions of
    the present level, which decide, and on unseen combinations at full length, which are only shown. A level that is
    not learned ends after a fifteenth of all steps. `measuring.quality` asks on real files, by `generate`.
    """

    def __init__(
        self, chats: VideoChats, collator: CrossLMMDataCollator, *, steps: int, every: int, num_videos: int = 40
    ):
        self.chats, self.collator, self.steps = chats, collator, steps
        self.every, self.num_videos = every, num_videos
        self.level_began = 0

    def samples(self, split: Split, step: int) -> list[tuple[str, dict]]:
        """One question of each kind per video, on its own."""
        samples = []
        for index in range(self.num_videos):
            rng = random_generator(seed=self.chats.arguments.seed + 1, split=split, index=step * 1000 + index)
            video = self.chats.video(rng) if split == "train" else self.heldout(rng, index)
            moments = random_moments(rng, video)
            frames = self.chats.render(rng, video, moments)
            said = moments if self.chats.with_times else None
            # There are few things to count in a video.
            again = ["count"] * 3 if self.chats.with_times and video.num_scenes > 1 else []
            for kind in (*self.kinds(video, split), *again):
                if (question := ask(rng, video, kind=kind, split=split, moments=moments)) is not None:
                    samples.append((kind, self.chats.sample([question], frames, said)))
        return samples

    def heldout(self, rng: np.random.Generator, index: int) -> ProceduralVideo:
        make = random_timed_video if self.chats.with_times and index % 2 else random_video
        return make(rng, split="heldout")

    def kinds(self, video: ProceduralVideo, split: Split) -> Sequence[str]:
        if split == "train" or video.is_timed:
            return self.chats.kinds_of(video, with_times=self.chats.with_times)
        return (*KINDS, "when") if self.chats.with_times else KINDS

    @torch.no_grad()
    def accuracy(self, model, samples: list[tuple[str, dict]]) -> dict[str, float]:
        right: dict[str, list[bool]] = {kind: [] for kind in WORDINGS}
        for start in range(0, len(samples), 60):
            kinds, inputs = zip(*samples[start : start + 60], strict=True)
            batch = self.collator(inputs)
            labels = batch.pop("labels")[:, 1:]
            predicted = model(**batch).logits[:, :-1].argmax(-1)
            for kind, is_right in zip(kinds, ((predicted == labels) | (labels == IGNORED)).all(-1), strict=True):
                right[kind].append(bool(is_right))
        return {kind: sum(marks) / len(marks) for kind, marks in right.items() if marks}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        model.eval()
        for split in ("train", "heldout") if state.global_step % (5 * self.every) == 0 else ("train",):
            shares = self.accuracy(model, self.samples(split, state.global_step))
            text = "  ".join(f"{kind} {100 * share:.0f}" for kind, share in shares.items())
            level = self.chats.time_level if self.chats.with_times else self.chats.level
            print(f"step {state.global_step}, level {level}, {split}: {text}", flush=True)
            if split == "heldout":
                continue
            for kind, share in shares.items():
                self.chats.mistakes[kind] = (self.chats.mistakes[kind] + 1 - share) / 2
            is_long = state.global_step - self.level_began >= self.steps / (8 if self.chats.with_times else 15)
            if self.chats.with_times:
                if (shares.get("when", 0) > 0.85 or is_long) and self.chats.time_level < len(TIMED_LEVELS) - 1:
                    self.chats.time_level += 1
                    self.level_began = state.global_step
            elif sum(shares.values()) > 0.85 * len(shares) or is_long:
                self.chats.level += 1
                self.level_began = state.global_step
        model.train()


def training_arguments(arguments: TinyArguments, folder: str, **options) -> TrainingArguments:
    """What both phases share."""
    return TrainingArguments(
        output_dir=str(Path(arguments.output_dir) / folder),
        seed=arguments.seed,
        use_cpu=True,
        bf16=True,
        warmup_steps=100,
        weight_decay=0.02,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=50,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        # The dispatcher would cut the frames of all videos to the number of samples.
        accelerator_config={"dispatch_batches": False},
        **options,
    )


def train_vision(arguments: TinyArguments, model: CrossLMMForConditionalGeneration) -> None:
    """Phase 1: the tower of `model`, in place."""
    vision = model.config.vision_config
    options = training_arguments(
        arguments,
        "vision",
        lr_scheduler_type="cosine",
        max_steps=arguments.vision_steps,
        learning_rate=arguments.vision_learning_rate,
        per_device_train_batch_size=arguments.vision_batch_size,
        save_strategy="no",
    )
    frames = PatchLabelFrames(seed=arguments.seed, size=vision.image_size, grid=model.config.patch_grid_size)
    labels = PatchLabels(model.model.vision_tower, vision.hidden_size)
    Trainer(model=labels, args=options, train_dataset=frames).train()


def train_language(
    arguments: TinyArguments,
    model: CrossLMMForConditionalGeneration,
    processor: CrossLMMProcessor,
    *,
    with_times: bool,
) -> None:
    """Phase 2 or, with times, 3: all of `model` but its tower, in place."""
    model.model.vision_tower.requires_grad_(False)
    steps = arguments.times_steps if with_times else arguments.steps
    halves = 2 if with_times else 1  # see `VideoChats.paired`
    options = training_arguments(
        arguments,
        "times" if with_times else "language",
        # The levels go up while the rate is high; it falls in the last third.
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 3},
        max_steps=steps,
        learning_rate=arguments.learning_rate,
        # Words as loud as this noise: without it some pairs that are never asked for, "red triangle", find nothing.
        neftune_noise_alpha=5.0,
        per_device_train_batch_size=arguments.batch_size // halves,
        gradient_accumulation_steps=halves,
        save_steps=arguments.save_steps,
        save_only_model=True,
    )
    chats = VideoChats(arguments=arguments, tokenizer=processor.tokenizer, config=model.config, with_times=with_times)
    if with_times:
        make_ready_for_times(model, chats, processor.tokenizer)
    collator = CrossLMMDataCollator(processor)
    accuracy = Curriculum(chats, collator, steps=steps, every=arguments.evaluation_steps)
    Trainer(model=model, args=options, train_dataset=chats, data_collator=collator, callbacks=[accuracy]).train()


def main() -> None:
    (arguments,) = HfArgumentParser(cast(Any, TinyArguments)).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    set_seed(arguments.seed)
    tokenizer = build_tokenizer()
    config = tiny_config(tokenizer, cross_attention=arguments.cross_attention, pooling_mode=arguments.pooling_mode)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    processor = CrossLMMProcessor.from_config(config, tokenizer)
    if arguments.frames_checkpoint is None:
        # At these sizes plain matrix products train faster than fused attention.
        model = CrossLMMForConditionalGeneration._from_config(config, attn_implementation="eager")
        if arguments.vision_tower is None:
            train_vision(arguments, model)
        else:
            model.model.vision_tower.load_state_dict(torch.load(arguments.vision_tower))
        torch.save(model.model.vision_tower.state_dict(), folder / "vision_tower.pt")
        train_language(arguments, model, processor, with_times=False)
        model.save_pretrained(folder / "frames")
        processor.save_pretrained(folder / "frames")
    else:
        model = load_frames(arguments.frames_checkpoint, config, tokenizer)
    train_language(arguments, model, processor, with_times=True)
    model.config.use_cache = True  # the Trainer turns it off, and it would be saved so
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
