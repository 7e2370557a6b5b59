"""Training with `transformers.Trainer`: which parts learn, at which rates, and checkpoints that survive a kill.

    crosslmm train stage2_instruct --model MODEL --train_data DATA --media_root FOLDER --output_dir runs/mine
    torchrun --nproc-per-node 8 -m transformers_crosslmm.training.trainer stage2_instruct --model …

A recipe is a YAML file of options; options on the command line override it. They are the fields of
`CrossLMMTrainingArguments`. `recipes/` has the paper's numbers. The same command resumes a stopped run.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints
from transformers.utils import logging

from ..checkpoints.folder import checksum
from ..checkpoints.load import load_processor
from ..dialect_crosslmm import CHECKPOINTING
from ..modeling_crosslmm import CrossLMMPreTrainedModel
from ..processing_crosslmm import CrossLMMProcessor
from .datasets import CrossLMMDataset, find_broken, stream_samples
from .records import RecordMixture, load_records, read_yaml
from .samples import CrossLMMDataCollator

logger = logging.get_logger(__name__)

RECIPES = Path(__file__).parent / "recipes"
COMPLETE = "checkpoint-is-complete.json"
WHAT_LEARNS = "what-learns.txt"
"""File of a checkpoint with the table of `describe` that its optimiser state belongs to."""
FEW_STEPS = 50
IN_PROGRESS = "checkpoint-is-incomplete.txt"
"""File that Transformers writes and removes while it saves after a SIGTERM."""


# --- what learns ----------------------------------------------------------------------------------------------------

PATTERNS = {
    "vision_tower": r"\bvision_tower\.",
    "projector": r"\bmulti_modal_projector\.",
    "v2v": r"\bcross_attention\.(v2v|input_layernorm)\.",
    "t2v": r"\bcross_attention\.(t2v|input_layernorm)\.",
}
PARTS = (*PATTERNS, "language_model")
"""Parts that a stage trains or freezes, by parameter names; the language model is the rest. V2V and T2V of a layer
share a norm, which learns with either."""

GATE = re.compile(r"\bcross_attention\.[vt]2v\.gate\.")


def parts_of(name: str) -> list[str]:
    """The parts (`PARTS`) that a parameter belongs to."""
    return [part for part, pattern in PATTERNS.items() if re.search(pattern, name)] or ["language_model"]


def train_only(model: nn.Module, parts: Sequence[str]) -> None:
    """Freezes the model except for these parts (see `PARTS`). Raises ValueError for none, or one that it lacks."""
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise ValueError(f"A stage trains at least one of {', '.join(PARTS)}; got {', '.join(unknown) or 'nothing'}.")
    found = set()
    for name, parameter in model.named_parameters():
        trained = set(parts_of(name)) & set(parts)
        parameter.requires_grad_(bool(trained))
        found |= trained if "cross_attention.input_layernorm" not in name else set()
    if missing := sorted(set(parts) - found):
        raise ValueError(f"The model has no {' and no '.join(missing)} to train. Take it out of `trained_parts`.")


def refuse_random_branches(model: CrossLMMPreTrainedModel) -> None:
    """Raises ValueError if V2V or T2V is frozen with open gates that were never trained.

    Its random output would be added to every token, and the other parts would adapt to it.
    """
    gate_init = model.config.gate_init
    for branch in ("v2v", "t2v"):
        gates = [gate for name, gate in model.named_parameters() if name.endswith(f".{branch}.gate.weight")]
        is_frozen = not any(gate.requires_grad for gate in gates)
        if gate_init and gates and is_frozen and all((gate == gate_init).all() for gate in gates):
            raise ValueError(
                f"{branch.upper()} is frozen in this stage but was never trained, and its gates are open: they are at "
                f"`gate_init` {gate_init:g}. Start with gates of 0 or without {branch.upper()} "
                f"(`use_{branch}=False`), or name {branch} in `trained_parts`."
            )


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    gate_learning_rate: float,
    vision_learning_rate: float | None = None,
    language_model_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    decayed: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: first the rest of the model, then the parts with their own rates.

    vision_learning_rate, language_model_learning_rate: None for `learning_rate`, in the group of the rest.
    decayed: names of parameters with weight decay; None for all matrices. Gates never decay, because decay would
        close them. Raises ValueError if nothing learns.
    """
    rates = {
        "rest": learning_rate,  # first: a Trainer logs the rate of the first group
        "vision_tower": vision_learning_rate,
        "language_model": language_model_learning_rate,
        "gates": gate_learning_rate,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {(k, decays): [] for k in rates for decays in (True, False)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if GATE.search(name):
            groups["gates", False].append(parameter)
            continue
        part = parts_of(name)[0]
        decays = name in decayed if decayed is not None else parameter.ndim > 1
        groups["rest" if rates.get(part) is None else part, decays].append(parameter)
    if not any(groups.values()):
        raise ValueError("At least one parameter must learn; all are frozen. Name parts in `trained_parts`.")
    return [
        {
            "params": parameters,
            "lr": rates[kind],
            "weight_decay": weight_decay if decays else 0.0,
            "name": kind if decays or kind == "gates" else f"{kind}, no decay",
        }
        for (kind, decays), parameters in groups.items()
        if parameters
    ]


def count_parts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Trained and total parameters of each part; the norm that V2V and T2V share is counted as V2V's."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        part = parts_of(name)[0]
        learning, all_of_it = counts[part]
        counts[part] = (learning + size_of(parameter) * parameter.requires_grad, all_of_it + size_of(parameter))
    return counts


def size_of(parameter: nn.Parameter) -> int:
    """Number of elements of a parameter, also if ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def describe(model: nn.Module, groups: Sequence[dict[str, Any]]) -> str:
    """A table of the trained parameters, and of the rate of each group."""
    counts = count_parts(model)
    total = tuple(sum(column) for column in zip(*counts.values(), strict=True))
    lines = [f"{'part':<20}{'learns':>16}{'of':>16}"]
    lines += [f"{part:<20}{learning:>16,}{of:>16,}" for part, (learning, of) in (*counts.items(), ("together", total))]
    lines += ["", f"{'group':<20}{'parameters':>16}{'rate':>16}{'weight decay':>16}"]
    for group in groups:
        count = sum(size_of(parameter) for parameter in group["params"])
        lines.append(f"{group['name']:<20}{count:>16,}{group['lr']:>16g}{group['weight_decay']:>16g}")
    return "\n".join(lines)


# --- options --------------------------------------------------------------------------------------------------------


@dataclass
class CrossLMMTrainingArguments(TrainingArguments):
    """Transformers' `TrainingArguments` with CrossLMM's own options."""

    model: str | None = field(default=None, metadata={"help": "Checkpoint to train: a folder or a name on the Hub."})
    train_data: str | None = field(
        default=None,
        metadata={"help": "LLaVA's .json or .jsonl, a mixture .yaml, or a folder or repository for `datasets`."},
    )
    media_root: str | None = field(
        default=None, metadata={"help": "Folder that the names of media files are relative to."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read a dataset in order, without loading it."})
    unusable: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "For a sample that is broken, too long or does not decode: raise or skip."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a sample, frames' included."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of each video, at equal intervals."})
    fps: float | None = field(default=None, metadata={"help": "Frames per second, instead of --num_frames."})
    max_frames: int | None = field(default=None, metadata={"help": "With --fps: the most frames of a video."})
    add_timestamps: bool | None = field(
        default=None, metadata={"help": "Write each frame's time before it; default: the processor's setting."}
    )
    trained_parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": f"Parts to train, of {', '.join(PARTS)}."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of the vision tower; default: --learning_rate."}
    )
    language_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of the language model; default: --learning_rate. New parts need more."}
    )
    gate_learning_rate: float = field(
        default=1e-2, metadata={"help": "Rate of the gates: Adam moves a gate by at most this much in a step."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Samples per step over all processes; sets the gradient accumulation."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager, …"})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Always False: the collator reads columns that the model does not."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the collator needs columns the model does not.")
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches` must be False: it truncates the frames of a batch to its number of samples."
            )
        self.accelerator_config.dispatch_batches = False
        if self.n_gpu > 1:  # torch.nn.DataParallel
            raise ValueError(
                f"Each process must have one GPU; this one sees {self.n_gpu}, and DataParallel would split videos in "
                "the middle. Start with `torchrun --nproc-per-node`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        if self.global_batch_size is not None:
            at_once = self.per_device_train_batch_size * self.world_size
            if self.global_batch_size % at_once:
                raise ValueError(
                    f"`global_batch_size` must be a multiple of the {at_once} samples of one forward pass of all "
                    f"processes; got {self.global_batch_size}. Change `per_device_train_batch_size`."
                )
            self.gradient_accumulation_steps = self.global_batch_size // at_once


def parse_recipe(argv: Sequence[str]) -> CrossLMMTrainingArguments:
    """Parses a recipe (a YAML file, or the name of one in `recipes/`) and the options after it.

    Like `argparse`, ends the program on --help, and on wrong options with a line on stderr and code 2. Raises
    FileNotFoundError for an unknown recipe, ValueError for an invalid file.
    """
    usage = "crosslmm train RECIPE [--option value ...]"
    parser = HfArgumentParser(
        cast(Any, CrossLMMTrainingArguments), prog="crosslmm train", usage=usage, allow_abbrev=False
    )
    known = ", ".join(path.stem for path in sorted(RECIPES.glob("*.yaml")))
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            parser.parse_args(["--help"])
        parser.error(f"the first argument is a recipe: a YAML file, or one of {known}.")
    path = Path(argv[0])
    if not path.is_file() and path.name == argv[0]:
        path = RECIPES / f"{path.stem}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {argv[0]!r}; a recipe is a YAML file, or one of {known}.")
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold options and their values; got {type(recipe).__name__}.")
    if not torch.accelerator.is_available():
        recipe["use_cpu"] = True
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.11 on
        if not capabilities.get("amx_bf16"):
            recipe.pop("bf16", None)  # slow on other CPUs
    behind = {word.partition("=")[0].strip("-").replace("-", "_") for word in argv[1:] if word.startswith("--")}
    for name, other in (("fps", "num_frames"), ("num_frames", "fps")):  # they exclude each other
        if name in behind:
            recipe.pop(other, None)
    newest = "--activation_checkpointing"
    options = [word.replace(newest, f"--{CHECKPOINTING}") for word in (*_as_options(recipe), *argv[1:])]
    arguments, unknown = parser.parse_args_into_dataclasses(options, return_remaining_strings=True)
    if unknown:
        names = [f"--{option.name}" for option in fields(CrossLMMTrainingArguments)]
        similar = get_close_matches(unknown[0], names, n=1)
        all_of_them = "`python -m transformers_crosslmm.training.trainer --help` lists all options."
        parser.error(f"there is no option {unknown[0]}; {f'did you mean {similar[0]}?' if similar else all_of_them}")
    missing = [name for name in ("model", "train_data", "output_dir") if getattr(arguments, name) is None]
    if missing:
        parser.error(f"give {' and '.join('--' + name for name in missing)}, in the recipe or after it.")
    return arguments


def _as_options(recipe: dict[str, Any]) -> Iterator[str]:
    """Converts a recipe to command-line options, so that one parser reads both."""
    for name, value in recipe.items():
        if value is None:
            continue
        yield f"--{name}"
        if isinstance(value, list):
            yield from map(str, value)
        else:
            yield json.dumps(value) if isinstance(value, dict) else str(value)


# --- the trainer ----------------------------------------------------------------------------------------------------


class CrossLMMTrainer(Trainer):
    """`Trainer` with the rates of `CrossLMMTrainingArguments`, which marks checkpoints as complete."""

    args: CrossLMMTrainingArguments
    unmarked_checkpoint: Path | None = None
    """The checkpoint that is not yet marked as complete, if any."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Transformers' optimiser on our `parameter_groups`."""
        if self.optimizer is None:
            model = cast(nn.Module, self.model if model is None else model)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, model))
            self.optimizer = kind(self.parameter_groups(model), **options)
        return self.optimizer

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of a model, with the arguments' rates."""
        return parameter_groups(
            model,
            learning_rate=self.args.learning_rate,
            vision_learning_rate=self.args.vision_learning_rate,
            language_model_learning_rate=self.args.language_model_learning_rate,
            gate_learning_rate=self.args.gate_learning_rate,
            weight_decay=self.args.weight_decay,
            decayed=self.get_decay_parameter_names(model),
        )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Trains as in Transformers. True resumes from the newest complete checkpoint; a path must be a complete one.

        Raises ValueError if there is none, if trained parameters or rates differ from the checkpoint's, if processes
        would resume from different checkpoints, and if no sample of the data could be used.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(cast(str, self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
        elif resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} cannot be resumed: it is incomplete, damaged, or not from CrossLMMTrainer. "
                "Name another."
            )
        self._agree_on(resume_from_checkpoint)
        model = cast(nn.Module, self.model)
        self.what_learns = describe(model, self.parameter_groups(model))
        if resume_from_checkpoint:
            self._refuse_another_recipe(Path(cast(str, resume_from_checkpoint)))
        self._warn_of_few_steps()
        self.model.config.untrained = False
        # Otherwise Transformers deletes older checkpoints before the new one is marked as complete.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        callback = FinishCheckpoints(self)
        self.add_callback(callback)
        try:
            output = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        finally:
            self.args.save_total_limit = self.save_total_limit
            self.remove_callback(callback)
        if self.state.global_step == 0:
            raise ValueError("No step was made: no sample of the data can be used. Try `crosslmm data check`.")
        return output

    def _warn_of_few_steps(self) -> None:
        at_once = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        if self.args.max_steps > 0 or not has_length(self.train_dataset):
            return
        num_steps = math.ceil(len(self.train_dataset) * self.args.num_train_epochs / at_once)
        if num_steps < FEW_STEPS:
            logger.warning(
                f"{len(self.train_dataset)} records, {self.args.num_train_epochs:g} epochs, {at_once} samples a step: "
                f"the run makes {num_steps} steps, and below {FEW_STEPS} hardly anything is learned. Lower "
                "`global_batch_size`, or raise `num_train_epochs`, and keep the rates."
            )

    def _refuse_another_recipe(self, checkpoint: Path) -> None:
        """Raises if trained parameters or rates changed: a resumed optimiser would have its old state and rates."""
        table = checkpoint / WHAT_LEARNS
        if table.is_file() and (before := table.read_text()) != self.what_learns:
            raise ValueError(
                f"A resumed run must train the same parameters at the same rates as in {checkpoint}.\n"
                f"Then:\n{before}\n\nNow:\n{self.what_learns}\n\n"
                "Give the earlier options, or start a new run with that checkpoint as `model` and another "
                "`output_dir`."
            )

    def _agree_on(self, checkpoint: str | bool | None) -> None:
        from accelerate.utils import gather_object

        names = gather_object([Path(str(checkpoint)).name if checkpoint else "the beginning"])
        if len(set(names)) > 1:
            places = ", ".join(f"process {number} at {name}" for number, name in enumerate(names))
            raise ValueError(
                f"All processes must resume from one checkpoint; got {places}. `output_dir` must be one folder that "
                "all machines share."
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as in Transformers, with the number of samples that this process has skipped, if any."""
        if num_skipped := getattr(self.train_dataset, "num_skipped", 0):
            logs["skipped_samples"] = num_skipped
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Saves as in Transformers, with `use_cache` on, which training turns off."""
        folder = Path(output_dir or cast(str, self.args.output_dir))
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):  # the first part of a checkpoint that is written
            self.unmarked_checkpoint = folder
            if self.args.should_save:
                (folder / COMPLETE).unlink(missing_ok=True)
        self.model.config.use_cache = True
        super().save_model(output_dir, *args, **kwargs)
        self.model.config.use_cache = self.args.use_cache

    def finish_checkpoint(self) -> None:
        """Marks the last checkpoint as complete, then deletes older ones over the limit."""
        folder, self.unmarked_checkpoint = self.unmarked_checkpoint, None
        if folder is None:
            return
        self.accelerator.wait_for_everyone()  # every process writes a part
        if self.args.should_save:
            (folder / WHAT_LEARNS).write_text(self.what_learns)
            mark_complete(folder)
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=self.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


class FinishCheckpoints(TrainerCallback):
    """Calls `finish_checkpoint` after each save.

    `on_train_end` covers the checkpoint that Transformers saves after a SIGTERM, without calling `on_save`.
    """

    def __init__(self, trainer: CrossLMMTrainer) -> None:
        self.trainer = trainer

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.finish_checkpoint()

    on_train_end = on_save


def mark_complete(folder: Path) -> None:
    """Marks a checkpoint as complete with a file of all SHA-256, after all files are synced to disk."""
    unfinished = folder / f"{COMPLETE}.tmp"  # may be left from a killed run
    others = (COMPLETE, unfinished.name, IN_PROGRESS)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in others)
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    unfinished.write_text(json.dumps({str(path.relative_to(folder)): checksum(path) for path in files}, indent=1))
    unfinished.replace(folder / COMPLETE)


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint is marked as complete and all its files have their recorded SHA-256."""
    try:
        checksums = json.loads((Path(folder) / COMPLETE).read_text())
        return all(checksum(Path(folder) / name) == expected for name, expected in checksums.items())
    except (OSError, ValueError):
        return False


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint of a run, or None. Incomplete ones are skipped with a warning."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    by_step = {int(path.name.rpartition("-")[2]): path for path in folders if path.name.rpartition("-")[2].isdigit()}
    for step in sorted(by_step, reverse=True):
        if is_complete(by_step[step]):
            return str(by_step[step])
        logger.warning(f"{by_step[step]} is incomplete or damaged, and is skipped.")
    return None


# --- a run ----------------------------------------------------------------------------------------------------------


def train(arguments: CrossLMMTrainingArguments) -> CrossLMMTrainer:
    """Runs or resumes a stage, and saves model and processor in `output_dir`."""
    set_seed(arguments.seed)
    processor = load_processor(cast(str, arguments.model))
    choose_frames(processor, arguments)
    dataset = load_dataset(arguments, processor)

    # Float32, because small updates are rounded away in 16-bit weights; `bf16` still computes in bfloat16.
    model: Any = AutoModelForImageTextToText.from_pretrained(
        cast(str, arguments.model), dtype=torch.float32, attn_implementation=arguments.attn_implementation
    )
    train_only(model, arguments.trained_parts)
    refuse_random_branches(model)
    trainer = CrossLMMTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=CrossLMMDataCollator(processor),
        processing_class=processor,
    )
    if trainer.is_world_process_zero():
        print(describe(model, trainer.parameter_groups(model)))
    begin_at = arguments.resume_from_checkpoint or last_complete_checkpoint(cast(str, arguments.output_dir))
    trainer.train(resume_from_checkpoint=begin_at)
    trainer.save_model()
    trainer.save_state()
    return trainer


def choose_frames(processor: CrossLMMProcessor, arguments: CrossLMMTrainingArguments) -> None:
    """Writes the arguments' frame sampling and timestamps into the processor, so that inference is like training."""
    given = {name: getattr(arguments, name) for name in ("num_frames", "fps", "max_frames")}
    if given["num_frames"] is not None and given["fps"] is not None:
        raise ValueError("`num_frames` and `fps` exclude each other; give one.")
    if given["num_frames"] is not None or given["fps"] is not None:
        processor.video_processor.num_frames = given["num_frames"]
        processor.video_processor.fps = given["fps"]
    if given["max_frames"] is not None:
        processor.video_processor.max_frames = given["max_frames"]
    if arguments.add_timestamps is not None:
        processor.add_timestamps = arguments.add_timestamps


def load_dataset(arguments: CrossLMMTrainingArguments, processor: CrossLMMProcessor) -> Any:
    """The samples of `train_data`. Broken records of files are logged before training begins, and raise ValueError
    unless `unusable` is "skip"."""
    options: dict[str, Any] = {
        "media_root": arguments.media_root,
        "max_length": arguments.max_length,
        "unusable": arguments.unusable,
    }
    records = load_records(cast(str, arguments.train_data), streaming=arguments.streaming, seed=arguments.seed)
    if arguments.streaming:
        # Endless, because Transformers ends at a stream's end, and resumes by counting the batches taken from it.
        return stream_samples(records.shuffle(seed=arguments.seed).repeat(None), processor, **options)
    dataset = CrossLMMDataset(records, processor, **options)
    if isinstance(records, RecordMixture) and arguments.process_index == 0:
        broken, is_broken = find_broken(records, arguments.media_root), False
        for line in islice(broken, 20) if arguments.unusable == "raise" else broken:
            logger.warning(line)
            is_broken = True
        if is_broken and arguments.unusable == "raise":
            raise ValueError(
                "The data has broken records; the first are listed above. `crosslmm data check` lists all, and "
                "--unusable skip leaves them out."
            )
    return dataset


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: a recipe and options that override it."""
    train(parse_recipe(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
