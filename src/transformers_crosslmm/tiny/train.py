"""Trains the tiny checkpoint from nothing.

    python -m transformers_crosslmm.tiny.train --output_dir runs/tiny

Two phases, both on `procedural_videos`, rendered as they are needed:

1. *Vision*: the SigLIP tower learns, patch by patch, colour and name of the thing that covers it. Things come in the
   palette's colours, where only the colour is learned, or in colours outside it, where only the name is: so nothing is
   ever learned about which colour goes with which name, and unseen combinations are nearly as easy as seen ones.
2. *Language*: with the tower frozen, projector, Qwen2 and cross-attention learn to answer. A sample is a chat of
   several questions about one video, at the first level a still with two things. From level to level more kinds of
   question, more things in a still, and clips that show more of them.

Everything is seeded; on the same machine and versions the run repeats itself.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..configuration_crosslmm import CrossLMMConfig
from ..modeling_crosslmm import CrossLMMForConditionalGeneration
from ..processing_crosslmm import CHAT_TEMPLATE, MARKS, CrossLMMProcessor
from ..training.samples import IGNORED, CrossLMMDataCollator, chat_sample
from .procedural_videos import (
    COLOURS,
    FILLED,
    KINDS,
    MAX_SECONDS,
    NAMES,
    PLACES,
    WORDINGS,
    ProceduralVideo,
    Question,
    Split,
    Thing,
    ask,
    random_generator,
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
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate of the second phase."})
    batch_size: int = field(default=24, metadata={"help": "Videos per step of the second phase."})
    questions_per_video: int = field(default=4, metadata={"help": "Turns of the chat about each video."})
    times_per_video: int = field(default=4, metadata={"help": "How often a video comes back, with new questions."})
    save_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints of the second phase."})
    evaluation_steps: int = field(default=50, metadata={"help": "Steps between looks at held-out questions."})
    cross_attention: bool = field(default=True, metadata={"help": "False: the baseline without V2V and T2V."})
    pooling_mode: str = field(default="bilinear", metadata={"help": "bilinear or average."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})


# --- tokenizer, config, processor -----------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the questions and answers is one token; all other text is bytes.

    "top-left" is one word, so one token: an answer of two tokens whose first is shared by two places trains badly.
    """
    texts = [
        word
        for wordings in WORDINGS.values()
        for wording in wordings
        for word in wording.format(name="", colour="", thing="", first="", second="", k="1").split(" ")
    ]
    answers = [*COLOURS, *NAMES, *PLACES, "yes", "no", *map(str, range(10)), "user", "assistant", "system"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+(-[A-Za-z]+)*| ?[0-9]| ?[^\sA-Za-z0-9]+|\s"), "isolated"),
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
                for k in range(plain.num_seconds):
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


# --- phase 2: language ----------------------------------------------------------------------------------------------


# In the order in which they are taught: who counts finds a thing's frames, who orders finds those of two.
STILL_KINDS = ("colour", "shape", "place", "exists")
CLIP_KINDS = (*STILL_KINDS, "which_frame", "count", "order")


class VideoChats(IterableDataset):
    """Chats about procedural videos, samples for `CrossLMMDataCollator`.

    What is shown and asked follows `level`, how often each kind is asked follows `mistakes`; `Curriculum` sets both.
    """

    def __init__(self, *, arguments: TinyArguments, tokenizer: PreTrainedTokenizerFast, config: CrossLMMConfig):
        self.arguments, self.tokenizer, self.config = arguments, tokenizer, config
        self.level = 1
        self.mistakes = dict.fromkeys(KINDS, 1.0)
        self.turns: dict[tuple[Question, int], dict[str, list[int]]] = {}

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
                videos.append((video, self.render(rng, video)))
            rng = np.random.default_rng([arguments.seed, index])
            for _ in range(arguments.times_per_video):
                for i in rng.permutation(len(videos)):
                    video, frames = videos[i]
                    yield self.sample(self.questions(rng, video), frames)

    def questions(self, rng: np.random.Generator, video: ProceduralVideo) -> list[Question]:
        """The turns of a chat, kinds drawn in proportion to `mistakes`, each at most once.

        No thing comes up in two of them: where the text before answers a question, nothing is learned about looking.
        Were a kind allowed twice, four in ten questions were "exists": absent things are always left to ask about.
        """
        kinds = self.kinds_of(video)
        share = np.array([self.mistakes[kind] for kind in kinds]) + 0.05
        asked: list[Question] = []
        said: set[Thing] = set()
        for i in rng.choice(len(kinds), size=100, p=share / share.sum()):
            question = ask(rng, video, kind=kinds[i])
            if question is None:
                continue
            if said.isdisjoint(question.things) and question.kind not in {other.kind for other in asked}:
                asked.append(question)
                said.update(question.things)
            if len(asked) == self.arguments.questions_per_video:
                break
        return asked

    def render(self, rng: np.random.Generator, video: ProceduralVideo) -> np.ndarray:
        """One frame per second, all at the same moment of their seconds: (T, S, S, 3) uint8."""
        moments = np.arange(video.num_seconds) + rng.uniform(0.02, 0.98)
        size = self.config.vision_config.image_size
        return degrade(rng, np.stack([render_frame(video, moment, size=size) for moment in moments]))

    def kinds_of(self, video: ProceduralVideo) -> tuple[str, ...]:
        """What may be asked about `video` at the present level."""
        return STILL_KINDS if video.num_seconds == 1 else CLIP_KINDS[: len(STILL_KINDS) + self.level - 1]

    def video(self, rng: np.random.Generator) -> ProceduralVideo:
        """Stills at the first level, later two clips for every still."""
        return self.still(rng) if self.level == 1 or rng.random() < 1 / 3 else self.clip(rng)

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

    def sample(self, questions: Sequence[Question], frames: np.ndarray) -> dict:
        """A chat of all `questions` about the video with these frames, which stands before the first."""
        turns = [self.turn(question, len(frames) if i == 0 else 0) for i, question in enumerate(questions)]
        return {
            **{name: [token for turn in turns for token in turn[name]] for name in ("input_ids", "labels")},
            "pixel_values_videos": pixels_of(frames),
            "video_num_frames": torch.tensor([len(frames)]),
        }

    def turn(self, question: Question, num_frames: int) -> dict[str, list[int]]:
        """One question, behind a video of `num_frames` if any, and its answer.

        Turns are kept: the template joins them without a trace, and making one costs as much as rendering a frame.
        """
        if (question, num_frames) not in self.turns:
            media = [{"type": "video"}] if num_frames else []
            self.turns[question, num_frames] = chat_sample(
                self.tokenizer,
                [
                    {"role": "user", "content": [*media, {"type": "text", "text": question.text}]},
                    {"role": "assistant", "content": question.answer},
                ],
                chat_template=CHAT_TEMPLATE,
                placeholder_id=self.config.video_token_id,
                placeholders=[num_frames * self.config.tokens_per_frame],
            )
        return self.turns[question, num_frames]


class Curriculum(TrainerCallback):
    """Looks now and then how many answers are right in every token, by kind, and raises the level of `chats`.

    The answers are those the model would choose with the truth before it, on rendered frames: to fresh questions of
    the present level, which decide, and on unseen combinations at full length, which are only shown. A level that is
    not learned ends after a fifteenth of all steps. `measuring.quality` asks on real files, by `generate`.
    """

    def __init__(self, chats: VideoChats, collator: CrossLMMDataCollator, *, every: int, num_videos: int = 40):
        self.chats, self.collator, self.every, self.num_videos = chats, collator, every, num_videos
        self.level_began = 0

    def samples(self, split: Split, step: int) -> list[tuple[str, dict]]:
        """One question of each kind per video, on its own."""
        samples = []
        for index in range(self.num_videos):
            rng = random_generator(seed=self.chats.arguments.seed + 1, split=split, index=step * 1000 + index)
            video = self.chats.video(rng) if split == "train" else random_video(rng, split=split)
            frames = self.chats.render(rng, video)
            for kind in self.chats.kinds_of(video) if split == "train" else KINDS:
                if (question := ask(rng, video, kind=kind, split=split)) is not None:
                    samples.append((kind, self.chats.sample([question], frames)))
        return samples

    @torch.no_grad()
    def accuracy(self, model, samples: list[tuple[str, dict]]) -> dict[str, float]:
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
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
            print(f"step {state.global_step}, level {self.chats.level}, {split}: {text}", flush=True)
            if split == "heldout":
                continue
            for kind, share in shares.items():
                self.chats.mistakes[kind] = (self.chats.mistakes[kind] + 1 - share) / 2
            is_learned = sum(shares.values()) > 0.85 * len(shares)
            if is_learned or state.global_step - self.level_began >= self.chats.arguments.steps / 15:
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
    arguments: TinyArguments, model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor
) -> None:
    """Phase 2: all of `model` but its tower, in place."""
    model.model.vision_tower.requires_grad_(False)
    options = training_arguments(
        arguments,
        "language",
        # The levels go up while the rate is high; it falls in the last third.
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": arguments.steps // 3},
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        # Words as loud as this noise: without it some pairs that are never asked for, "red triangle", find nothing.
        neftune_noise_alpha=5.0,
        per_device_train_batch_size=arguments.batch_size,
        save_steps=arguments.save_steps,
        save_only_model=True,
    )
    chats = VideoChats(arguments=arguments, tokenizer=processor.tokenizer, config=model.config)
    collator = CrossLMMDataCollator(processor)
    accuracy = Curriculum(chats, collator, every=arguments.evaluation_steps)
    Trainer(model=model, args=options, train_dataset=chats, data_collator=collator, callbacks=[accuracy]).train()


def main() -> None:
    (arguments,) = HfArgumentParser(cast(Any, TinyArguments)).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    set_seed(arguments.seed)
    tokenizer = build_tokenizer()
    config = tiny_config(tokenizer, cross_attention=arguments.cross_attention, pooling_mode=arguments.pooling_mode)
    # At these sizes plain matrix products train faster than fused attention.
    model = CrossLMMForConditionalGeneration._from_config(config, attn_implementation="eager")
    processor = CrossLMMProcessor.from_config(config, tokenizer)
    if arguments.vision_tower is None:
        train_vision(arguments, model)
    else:
        model.model.vision_tower.load_state_dict(torch.load(arguments.vision_tower))
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.model.vision_tower.state_dict(), folder / "vision_tower.pt")
    train_language(arguments, model, processor)
    model.config.use_cache = True  # the Trainer turns it off, and it would be saved so
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
