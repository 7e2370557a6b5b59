"""Trains the tiny checkpoint from nothing.

    python -m transformers_crosslmm.training_tiny_crosslmm --output_dir runs/tiny

Two phases, both on `procedural_videos`, rendered as they are needed:

1. *Vision*: the SigLIP tower learns, patch by patch, colour and name of the thing that covers it. Things come in the
   palette's colours, where only the colour is learned, or in colours outside it, where only the name is: so nothing is
   ever learned about which colour goes with which name, and unseen combinations are nearly as easy as seen ones.
2. *Language*: with the tower frozen, projector, Qwen2 and cross-attention learn to answer. A sample is a chat of
   several questions about one video; videos begin with few scenes and end with eight.

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

from .configuration_crosslmm import CrossLMMConfig
from .data_crosslmm import IGNORED, VideoChatCollator, chat_sample
from .modeling_crosslmm import CrossLMMForConditionalGeneration
from .procedural_videos import (
    COLOURS,
    KINDS,
    MAX_SECONDS,
    NAMES,
    PLACES,
    WORDINGS,
    ProceduralVideo,
    Question,
    ask,
    ask_many,
    random_generator,
    random_video,
    render_frame,
)
from .processing_crosslmm import CHAT_TEMPLATE, MARKS, CrossLMMProcessor


@dataclass
class TinyArguments:
    """The options of the run. How the shipped checkpoint came about is in its card."""

    output_dir: str = field(metadata={"help": "Folder for the trained checkpoint."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, videos and questions."})
    vision_steps: int = field(default=3600, metadata={"help": "Steps of the first phase."})
    vision_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the first phase."})
    vision_batch_size: int = field(default=128, metadata={"help": "Frames per step of the first phase."})
    vision_tower: str | None = field(default=None, metadata={"help": "A saved tower instead of the first phase."})
    steps: int = field(default=4000, metadata={"help": "Steps of the second phase."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the second phase."})
    batch_size: int = field(default=16, metadata={"help": "Videos per step of the second phase."})
    questions_per_video: int = field(default=6, metadata={"help": "Turns of the chat about each video."})
    times_per_video: int = field(default=3, metadata={"help": "How often a video comes back, with new questions."})
    save_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints of the second phase."})
    evaluation_steps: int = field(default=500, metadata={"help": "Steps between looks at held-out questions."})
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
        for kind in KINDS
        for wording in WORDINGS[kind]
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
    """60 × 60 pixels, 25 patches, one pooled token per frame; every second layer of six looks at the patches."""
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
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "initializer_range": 0.05,
            "cross_attention_interval": 2,
            "use_v2v": cross_attention,
            "use_t2v": cross_attention,
            "v2v_scope": "frame",
            "visual_norm": "layernorm",
            "visual_time": "sinusoidal",
            "gate_init": 1.0,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.vocab["<|image_pad|>"],
        video_token_id=tokenizer.vocab["<|video_pad|>"],
        pooled_grid_size=1,
        pooling_mode=pooling_mode,
    )


# --- phase 1: vision ------------------------------------------------------------------------------------------------


class PatchLabels(nn.Module):
    """A vision tower with two linear read-outs per patch, on the features as the cross-attention sees them.

    No read-out of the place: it is in the features anyway, and in the trials that asked for it the cross-attention
    came to find things by colour and frame alone, and names as queries stayed unlearned for thousands of steps.
    """

    def __init__(self, tower: nn.Module, width: int):
        super().__init__()
        self.tower = tower
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.name = nn.Linear(width, len(NAMES) + 1)

    def forward(self, pixel_values: torch.Tensor, colours: torch.Tensor, names: torch.Tensor) -> dict:
        """pixel_values (F, 3, S, S); labels (F, N): the last class for background, -100 where nothing is asked."""
        features = self.tower(pixel_values).last_hidden_state
        features = F.layer_norm(features, features.shape[-1:], eps=1e-6)
        logits = self.colour(features), self.name(features)
        loss = sum(
            F.cross_entropy(predicted.flatten(0, 1), true.flatten(), ignore_index=IGNORED)
            for predicted, true in zip(logits, (colours, names), strict=True)
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
                    frame, colours, names = samples[i]
                    pixels = torch.from_numpy(frame).permute(2, 0, 1).float().div(127.5).sub(1.0)
                    yield {"pixel_values": pixels, "colours": colours, "names": names}

    def _labels(self, plain, painted, k: int, share: float) -> tuple[np.ndarray, ...]:
        centres = (np.arange(self.grid) + 0.5) / self.grid
        colours = np.full((self.grid, self.grid), len(COLOURS))
        names = np.full((self.grid, self.grid), len(NAMES))
        for before, after in zip(plain.scenes[k], painted.scenes[k], strict=True):
            x, y = (a + (b - a) * share for a, b in zip(after.start, after.end, strict=True))
            covered = np.maximum(abs(centres[None, :] - x), abs(centres[:, None] - y)) < after.radius
            is_palette = before.rgb == after.rgb
            colours[covered] = list(COLOURS).index(after.thing.colour) if is_palette else IGNORED
            names[covered] = IGNORED if is_palette else NAMES.index(after.thing.name)
        return colours.ravel(), names.ravel()


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


# --- phase 2: language ----------------------------------------------------------------------------------------------


class VideoChats(IterableDataset):
    """Chats about procedural videos: `input_ids`, `labels`, `frames`.

    num_samples: how many will be drawn; the number of scenes follows the share that has been.
    """

    def __init__(self, *, arguments: TinyArguments, tokenizer: PreTrainedTokenizerFast, config: CrossLMMConfig):
        self.arguments, self.tokenizer, self.config = arguments, tokenizer, config
        self.num_samples = arguments.steps * arguments.batch_size
        self.turns: dict[tuple[Question, int], dict[str, list[int]]] = {}

    def __iter__(self) -> Iterator[dict]:
        arguments = self.arguments
        videos_per_round = 32 * arguments.batch_size
        drawn = index = 0
        while True:
            videos = []
            for _ in range(videos_per_round):
                rng = random_generator(seed=arguments.seed, split="train", index=index)
                index += 1
                video = random_video(rng, num_seconds=self.num_seconds(rng, drawn / self.num_samples))
                videos.append((video, self.render(rng, video)))
            rng = np.random.default_rng([arguments.seed, index])
            for _ in range(arguments.times_per_video):
                for i in rng.permutation(len(videos)):
                    video, frames = videos[i]
                    questions = ask_many(rng, video, num_questions=arguments.questions_per_video)
                    yield self.sample(questions, frames)
                    drawn += 1

    def render(self, rng: np.random.Generator, video: ProceduralVideo) -> np.ndarray:
        """One frame per second, all at the same moment of their seconds: (T, S, S, 3) uint8."""
        moments = np.arange(video.num_seconds) + rng.uniform(0.02, 0.98)
        size = self.config.vision_config.image_size
        return degrade(rng, np.stack([render_frame(video, moment, size=size) for moment in moments]))

    def num_seconds(self, rng: np.random.Generator, progress: float) -> int:
        """Scenes of the next video: 2 or 3 at first, then up to 5, then any number up to 8, at last mostly 8.

        Few scenes teach to find the frame that a question names: among two, a wrong one is wrong half the time.
        """
        if progress < 0.04:
            return int(rng.integers(2, 4))
        if progress < 0.13:
            return int(rng.integers(2, 6))
        if progress < 0.5:
            return int(rng.integers(2, MAX_SECONDS + 1))
        return MAX_SECONDS if rng.random() < 0.75 else int(rng.integers(3, MAX_SECONDS))

    def sample(self, questions: Sequence[Question], frames: np.ndarray) -> dict:
        """A chat of all `questions` about the video with these frames, which stands before the first."""
        turns = [self.turn(question, len(frames) if i == 0 else 0) for i, question in enumerate(questions)]
        return {
            **{name: [token for turn in turns for token in turn[name]] for name in ("input_ids", "labels")},
            "frames": frames,
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


class HeldOutAccuracy(TrainerCallback):
    """Says now and then how many answers to questions on unseen combinations are right in every token, by kind.

    The answers are those the model would choose with the truth before it, one question per video: a quick look, on
    rendered frames. `evaluation_crosslmm` asks on real files, by `generate`.
    """

    def __init__(self, chats: VideoChats, collator: VideoChatCollator, *, every: int, num_videos: int = 30):
        self.every, self.collator = every, collator
        self.samples: list[tuple[str, dict]] = []
        for index in range(num_videos):
            rng = random_generator(seed=chats.arguments.seed, split="heldout", index=index)
            video = random_video(rng, split="heldout")
            frames = chats.render(rng, video)
            for kind in KINDS:
                if (question := ask(rng, video, kind=kind, split="heldout")) is not None:
                    self.samples.append((kind, chats.sample([question], frames)))

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        model.eval()
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for start in range(0, len(self.samples), 60):
            kinds, samples = zip(*self.samples[start : start + 60], strict=True)
            batch = self.collator(samples)
            labels = batch.pop("labels")[:, 1:]
            predicted = model(**batch).logits[:, :-1].argmax(-1)
            for kind, is_right in zip(kinds, ((predicted == labels) | (labels == IGNORED)).all(-1), strict=True):
                right[kind].append(bool(is_right))
        model.train()
        shares = "  ".join(f"{kind} {100 * sum(marks) / len(marks):.0f}" for kind, marks in right.items())
        print(f"step {state.global_step}: {shares}", flush=True)


def training_arguments(arguments: TinyArguments, folder: str, **options) -> TrainingArguments:
    """What both phases share."""
    return TrainingArguments(
        output_dir=str(Path(arguments.output_dir) / folder),
        seed=arguments.seed,
        use_cpu=True,
        bf16=True,
        lr_scheduler_type="cosine",
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
        max_steps=arguments.vision_steps,
        learning_rate=arguments.vision_learning_rate,
        per_device_train_batch_size=arguments.vision_batch_size,
        save_strategy="no",
    )
    frames = PatchLabelFrames(seed=arguments.seed, size=vision.image_size, grid=model.config.patch_grid_size)
    labels = PatchLabels(model.model.vision_tower, vision.hidden_size)
    Trainer(model=labels, args=options, train_dataset=frames).train()


def train_language(
    arguments: TinyArguments, model: CrossLMMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Phase 2: all of `model` but its tower, in place."""
    model.model.vision_tower.requires_grad_(False)
    options = training_arguments(
        arguments,
        "language",
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch_size,
        save_steps=arguments.save_steps,
        save_only_model=True,
    )
    chats = VideoChats(arguments=arguments, tokenizer=tokenizer, config=model.config)
    collator = VideoChatCollator(pad_token_id=tokenizer.pad_token_id)
    accuracy = HeldOutAccuracy(chats, collator, every=arguments.evaluation_steps)
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
    train_language(arguments, model, tokenizer)
    model.config.use_cache = True  # the Trainer turns it off, and it would be saved so
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
