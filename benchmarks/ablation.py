"""Which parts of CrossLMM earn their place: the paper's Table 2 in miniature, and what the paper leaves open.

    python benchmarks/ablation.py                          # all arms, three seeds; goes on where it stopped
    python benchmarks/ablation.py --arms both none --seeds 0

Every arm trains a small CrossLMM from scratch on procedural videos, one token per frame, and changes one thing of the
arm it is compared with. The vision tower is trained once and frozen. All arms of a seed see the same batches, begin
with the same weights wherever they share a parameter, and answer the same questions about videos that no run has
trained on. Each run is written to ablation.json beside this file as soon as it is done.
"""

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerFast, set_seed

from transformers_crosslmm import CrossLMMConfig, CrossLMMForConditionalGeneration
from transformers_crosslmm.media_crosslmm import CrossLMMEncodedMedia
from transformers_crosslmm.tiny import procedural_videos
from transformers_crosslmm.tiny.procedural_videos import (
    ProceduralVideo,
    Question,
    ask,
    random_generator,
    random_video,
    render_frame,
)
from transformers_crosslmm.tiny.train import (
    TinyArguments,
    build_tokenizer,
    degrade,
    tiny_config,
    train_vision,
)
from transformers_crosslmm.training.samples import IGNORED, chat_sample
from transformers_crosslmm.training.trainer import PARTS, CrossLMMTrainer, CrossLMMTrainingArguments, train_only

RESULTS = Path(__file__).with_suffix(".json")
TOWER = Path(__file__).parent.parent / "runs" / "ablation" / "vision_tower.pt"
KINDS = ("colour", "shape", "place")
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{% for part in message.content %}"
    "{{ '<|video_pad|>' if part.type == 'video' else part.text }}{% endfor %}"
    "{% else %}{% generation %}{{ ' ' + message.content }}{% endgeneration %}{% endif %}{% endfor %}"
)
"""Nothing but the question and the one token of its answer: a chat's marks would be half of all tokens."""
LEVELS = ((1, 1), (2, 1))
"""Scenes of a video and things per scene: what a run begins with, and what it ends and is asked about."""
LEVEL_ENDS = (0.25, 1.0)
"""The share of a run's steps after which each level ends; it is the same for all arms, whatever they have learned."""
SIZES = {"num_hidden_layers": 4, "cross_attention_interval": 2, "hidden_size": 64, "intermediate_size": 128}
BATCH_SIZE = 64
LEARNING_RATE = 4e-3
LEARNING = [part for part in PARTS if part != "vision_tower"]


@dataclass(frozen=True)
class Arm:
    """What a run changes.

    about: in words. against: the arm that it changes one thing of. text: fields of its config.
    question: where the question stands, seen from the video. gate_learning_rate: the gates' own.
    first_stage: what learns in the first half, with a language model that has learned the language alone before.
    """

    about: str
    against: str = "both"
    text: Mapping[str, Any] = field(default_factory=dict)
    pooling_mode: str = "bilinear"
    question: Literal["after", "before", "both"] = "after"
    gate_learning_rate: float = LEARNING_RATE
    first_stage: Sequence[str] = ()


PAPER = {
    "cross_attention_interval": 4,
    "v2v_scope": "video",
    "visual_norm": "none",
    "visual_time": "none",
    "gate_init": 0.0,
}
ARMS = {
    "both": Arm("V2V and T2V in every 2nd of 4 layers, the base"),
    "none": Arm("neither V2V nor T2V", text={"use_v2v": False, "use_t2v": False}),
    "t2v": Arm("T2V alone", text={"use_v2v": False}),
    "v2v": Arm("V2V alone", text={"use_t2v": False}),
    "no_time": Arm("visual_time none", text={"visual_time": "none"}),
    "no_norm": Arm("visual_norm none", against="no_time", text={"visual_time": "none", "visual_norm": "none"}),
    "question_before": Arm("question before the video", question="before"),
    "question_both": Arm("question on both sides of the video", question="both"),
    "v2v_question_before": Arm(
        "V2V alone, question before the video", against="v2v", text={"use_t2v": False}, question="before"
    ),
    "interval_1": Arm("K = 1", text={"cross_attention_interval": 1}),
    "interval_4": Arm("K = 4", text={"cross_attention_interval": 4}),
    "stages": Arm("two stages, T2V only in the second", first_stage=("projector", "v2v")),
    "stages_t2v": Arm("two stages, T2V in the first too", against="stages", first_stage=("projector", "v2v", "t2v")),
    "scope_video": Arm("v2v_scope video", text={"v2v_scope": "video"}),
    "scope_causal": Arm("v2v_scope causal", text={"v2v_scope": "causal"}),
    "paper": Arm("the paper's defaults", text=PAPER),
    "gate_0": Arm("gate_init 0", text={"gate_init": 0.0}),
    "average": Arm("average pooling", pooling_mode="average"),
    "gate_0_fast": Arm(
        "gate_init 0, gates learn 10 × as fast",
        against="gate_0",
        text={"gate_init": 0.0},
        gate_learning_rate=10 * LEARNING_RATE,
    ),
    "gate_still": Arm("gates hardly learn (1e-5)", gate_learning_rate=1e-5),
}


@dataclass
class Options:
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Of {', '.join(ARMS)}."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of weights and videos."})
    steps: int = field(default=120, metadata={"help": f"Steps of {BATCH_SIZE} questions."})


# --- the world ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A question about a video, and the video as the frozen tower sees it: (T, N, D)."""

    question: Question
    features: torch.Tensor


class World:
    """The videos and questions of one seed, the same for every arm.

    test: for each video that is never trained on, a question of each of `KINDS`, None where it gives none.
    """

    def __init__(self, tower: torch.nn.Module, *, seed: int, pool: int = 500, test_videos: int = 300):
        self.seed = seed
        self.levels = [
            [self._video(tower, level, index=level * pool + i) for i in range(pool)] for level in range(len(LEVELS))
        ]
        self.test: list[list[Asked | None]] = []
        for index in range(test_videos):
            video, features = self._video(tower, len(LEVELS) - 1, index=10**6 + index)
            rng = np.random.default_rng([seed, 10**6 + index])
            questions = [ask(rng, video, kind=kind) for kind in KINDS]
            self.test.append([question and Asked(question, features) for question in questions])

    @torch.no_grad()
    def _video(self, tower: torch.nn.Module, level: int, *, index: int) -> tuple[ProceduralVideo, torch.Tensor]:
        rng = random_generator(seed=self.seed, split="train", index=index)
        num_seconds, things_per_scene = LEVELS[level]
        video = random_video(rng, num_seconds=num_seconds, things_per_scene=things_per_scene)
        moments = np.arange(num_seconds) + rng.uniform(0.02, 0.98)
        size = tower.config.image_size
        frames = degrade(rng, np.stack([render_frame(video, moment, size=size) for moment in moments]))
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
        return video, tower(pixels).last_hidden_state.half()

    def draw(self, steps: int, *, salt: int = 0) -> list[Asked]:
        """What `steps` batches ask, one after the other: kinds evenly, videos of the level the step has reached."""
        drawn: list[Asked] = []
        for step in range(steps):
            rng = np.random.default_rng([self.seed, salt, step])
            level = next(level for level, end in enumerate(LEVEL_ENDS) if step < end * steps)
            while len(drawn) < (step + 1) * BATCH_SIZE:
                video, features = self.levels[level][rng.integers(len(self.levels[level]))]
                question = ask(rng, video, kind=KINDS[len(drawn) % len(KINDS)])
                if question is not None:
                    drawn.append(Asked(question, features))
        return drawn


class Samples(Dataset):
    """Questions as an arm puts them. is_blind: without their videos."""

    def __init__(self, asked: Sequence[Asked], arm: Arm, *, is_blind: bool = False):
        self.asked, self.arm, self.is_blind = asked, arm, is_blind

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> dict[str, Any]:
        question, features = self.asked[index].question, self.asked[index].features
        if self.is_blind:
            return {**written(question, "after", 0), "features": None}
        return {**written(question, self.arm.question, len(features)), "features": features}


@cache
def tokenizer_and_base() -> tuple[PreTrainedTokenizerFast, CrossLMMConfig]:
    tokenizer = build_tokenizer()
    return tokenizer, tiny_config(tokenizer)


@cache
def written(question: Question, place: str, num_frames: int) -> dict[str, list[int]]:
    """`input_ids` and `labels` of the question, where the arm puts it, and of its answer."""
    tokenizer, config = tokenizer_and_base()
    text, video = {"type": "text", "text": question.text}, {"type": "video"}
    content = {"after": [video, text], "before": [text, video], "both": [text, video, text]}[place]
    return chat_sample(
        tokenizer,
        [
            {"role": "user", "content": content if num_frames else [text]},
            {"role": "assistant", "content": question.answer},
        ],
        chat_template=TEMPLATE,
        placeholder_id=config.video_token_id,
        placeholders=[num_frames],
    )


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch with videos that are encoded already, whose pooled tokens the model makes itself; texts end in padding,
    which causal attention keeps from mattering."""
    ids, labels = ([torch.tensor(sample[name]) for sample in samples] for name in ("input_ids", "labels"))
    batch: dict[str, Any] = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    features = [sample["features"] for sample in samples if sample["features"] is not None]
    if features:
        batch["mm_encoder_outputs"] = {
            "video": CrossLMMEncodedMedia(
                last_hidden_state=torch.cat(features),
                # Of no width, not the language model's: so the model projects its own, and the projector learns.
                pooler_output=tuple(video.new_empty(len(video), 0) for video in features),
            )
        }
    return batch


# --- a run ----------------------------------------------------------------------------------------------------------


def arm_config(arm: Arm) -> CrossLMMConfig:
    """The tiny checkpoint's config with 4 layers, and what the arm changes."""
    base = tokenizer_and_base()[1]
    text = base.text_config.to_dict() | {"layer_types": None, **SIZES, **arm.text}
    return CrossLMMConfig(
        **base.to_dict() | {"text_config": text, "pooling_mode": arm.pooling_mode},
    )


def build(arm: Arm, *, seed: int) -> CrossLMMForConditionalGeneration:
    """A new model, its weights those of one that has every module an arm can have, whichever it has itself."""
    set_seed(seed)
    everything = dataclasses.replace(arm, text={"cross_attention_interval": 1})
    # At these sizes plain matrix products train faster than fused attention.
    whole, model = (
        CrossLMMForConditionalGeneration._from_config(arm_config(a), attn_implementation="eager")
        for a in (everything, arm)
    )
    weights = whole.state_dict()
    model.load_state_dict({k: v if k.endswith("gate.weight") else weights[k] for k, v in model.state_dict().items()})
    return model


def set_gates(model: torch.nn.Module, branch: str, value: float) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(f"{branch}.gate.weight"):
            parameter.data.fill_(value)


def fit(model: CrossLMMForConditionalGeneration, samples: Samples, parts: Sequence[str], *, seed: int) -> list[float]:
    """Trains `parts` of the model on the samples in their order, once; returns the losses of the steps."""
    has = {"v2v": model.config.use_v2v, "t2v": model.config.use_t2v}
    train_only(model, [part for part in parts if has.get(part, True)])
    with tempfile.TemporaryDirectory() as folder:
        arguments = CrossLMMTrainingArguments(
            output_dir=folder,
            seed=seed,
            use_cpu=True,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_SIZE,
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE,
            gate_learning_rate=samples.arm.gate_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            weight_decay=0.02,
            adam_beta2=0.98,
            logging_steps=0.1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = CrossLMMTrainer(model=model, args=arguments, train_dataset=samples, data_collator=collate)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(arm: Arm, world: World, *, steps: int) -> tuple[CrossLMMForConditionalGeneration, list[float]]:
    """One run of an arm; the losses are those of steps with videos."""
    model, asked = build(arm, seed=world.seed), world.draw(steps)
    if not arm.first_stage:
        return model, fit(model, Samples(asked, arm), LEARNING, seed=world.seed)
    language_alone = Samples(world.draw(steps // 4, salt=1), arm, is_blind=True)
    fit(model, language_alone, ["language_model"], seed=world.seed)
    left_out = [branch for branch in ("v2v", "t2v") if branch not in arm.first_stage]
    for branch in left_out:
        set_gates(model, branch, 0.0)
    half = steps // 2 * BATCH_SIZE
    losses = fit(model, Samples(asked[:half], arm), arm.first_stage, seed=world.seed)
    for branch in left_out:
        set_gates(model, branch, model.config.gate_init)
    return model, losses + fit(model, Samples(asked[half:], arm), LEARNING, seed=world.seed)


@torch.no_grad()
def examine(model: CrossLMMForConditionalGeneration, arm: Arm, world: World) -> dict[str, str]:
    """For each kind, whether the answer is the right one: "1", "0", or "-" where nothing is asked."""
    model.eval()
    marks = {}
    for column, kind in enumerate(KINDS):
        asked = [questions[column] for questions in world.test]
        samples = Samples([question for question in asked if question is not None], arm)
        right: list[bool] = []
        for start in range(0, len(samples), 100):
            batch = collate([samples[i] for i in range(start, min(start + 100, len(samples)))])
            labels = batch.pop("labels")
            rows, first = torch.arange(len(labels)), (labels != IGNORED).int().argmax(-1)
            predicted = model(**batch).logits[rows, first - 1].argmax(-1)
            right += (predicted == labels[rows, first]).tolist()
        answers = iter(right)
        marks[kind] = "".join("-" if question is None else str(int(next(answers))) for question in asked)
    return marks


# --- all runs --------------------------------------------------------------------------------------------------------


def load_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"about": {}, "runs": []}


def save_results(results: Mapping[str, Any]) -> None:
    """A run on each line, and never half a file."""
    runs = ",\n".join("  " + json.dumps(run) for run in results["runs"])
    part = RESULTS.with_suffix(".part")
    part.write_text(
        f'{{"about": {json.dumps(results["about"], indent=1)},\n "runs": [\n{runs}\n]}}\n', encoding="utf-8"
    )
    part.replace(RESULTS)


def trained_tower() -> torch.nn.Module:
    """The tiny checkpoint's vision phase, done once and kept in `TOWER`."""
    config = tokenizer_and_base()[1]
    set_seed(0)
    model = CrossLMMForConditionalGeneration._from_config(config, attn_implementation="eager")
    if not TOWER.exists():
        train_vision(TinyArguments(output_dir=str(TOWER.parent)), model)
        torch.save(model.model.vision_tower.state_dict(), TOWER)
    model.model.vision_tower.load_state_dict(torch.load(TOWER))
    return model.model.vision_tower.eval().requires_grad_(False)


def main() -> None:
    from origin import origin  # here, as the docs read ARMS from their own folder

    (options,) = HfArgumentParser(cast(Any, Options), description=__doc__).parse_args_into_dataclasses()
    if unknown := sorted(set(options.arms) - set(ARMS)):
        raise SystemExit(f"There is no arm {', '.join(unknown)}; there are {', '.join(ARMS)}.")
    torch.set_num_threads(1)
    tower, results = trained_tower(), load_results()
    world = {
        "tower_sha256": hashlib.sha256(TOWER.read_bytes()).hexdigest(),
        "videos_sha256": hashlib.sha256(Path(procedural_videos.__file__).read_bytes()).hexdigest(),
    }
    results["about"] = results["about"] or origin(__file__) | {
        "batch_size": BATCH_SIZE,
        **world,
    }
    if not world.items() <= results["about"].items():
        raise SystemExit(f"{RESULTS} holds runs of another vision tower or other videos: move it away, or {TOWER}.")
    done = {(run["arm"], run["seed"], run["steps"]) for run in results["runs"]}
    queue = [(arm, seed) for arm in options.arms for seed in options.seeds if (arm, seed, options.steps) not in done]
    worlds = {seed: World(tower, seed=seed) for seed in tqdm(options.seeds, desc="videos")}
    for name, seed in (progress := tqdm(queue, desc="runs")):
        progress.set_postfix_str(f"{name}, seed {seed}")
        begin = time.process_time()
        model, losses = train(ARMS[name], worlds[seed], steps=options.steps)
        results["runs"].append(
            {
                "arm": name,
                "seed": seed,
                "steps": options.steps,
                "cpu_seconds": round(time.process_time() - begin),
                "loss": round(losses[-1], 3),
                "right": examine(model, ARMS[name], worlds[seed]),
            }
        )
        save_results(results)
        right = results["runs"][-1]["right"].items()
        shares = (f"{kind} {marks.count('1') / len(marks.replace('-', '')):.0%}" for kind, marks in right)
        tqdm.write(f"{name}, seed {seed}: {', '.join(shares)}")


if __name__ == "__main__":
    main()
