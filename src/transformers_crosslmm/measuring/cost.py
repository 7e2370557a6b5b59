"""Counts and times the cost of a video, for CrossLMM and video models of Transformers.

    crosslmm bench --output cost.json                 # counts, and on a GPU times
    crosslmm bench --size toy --output cost.json      # counts, and times of small models on a CPU

Multiply-accumulates are counted by running the models on PyTorch's meta device, and bytes from their shapes: both hold
on any machine. Times are of one run on one device, the models in turns: only their ratios carry over to other devices.
Weights are random, because no time depends on their values.

Shapes: T frames, N patches per frame, D vision width, s x s pooled tokens per frame, L language tokens, C language
        width, H query heads, G key/value heads, E head width.
"""

import copy
import gc
import json
import multiprocessing
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .. import TINY_CHECKPOINT
from ..checkpoints.costs import CheckpointCosts
from ..checkpoints.inspect import count_costs
from ..checkpoints.load import load_processor
from ..checkpoints.model_card import PAPER_COSTS
from ..configuration_crosslmm import CrossLMMConfig
from ..dialect_crosslmm import CHECKPOINTING
from ..processing_crosslmm import CrossLMMProcessor
from ..training.trainer import parameter_groups
from ..video_decoding import decode_video
from ..video_processing_crosslmm import CrossLMMVideoProcessor
from .contenders import Contender, CrossLMM, QwenVL, contenders

FRAMES = (32, 64, 128, 256)
"""Numbers of frames in the paper's Figure 4."""
LONG = (512, 1024, 3600)
"""Counted for CrossLMM only; the last is an hour at one frame per second."""
TEXT_TOKENS = 64
"""Tokens of the first question, which follow the video."""
QUESTION_TOKENS = 32
"""Tokens of the second question."""
NEW_TOKENS = 16
"""Tokens over which decoding is timed."""

PAPER: dict[str, dict[str, Sequence[float]]] = {
    # Figure 4 and Table 6, at `FRAMES`, on an H800: multiply-accumulates in T (there "TFLOPs"), memory in MB, prefill
    # in ms.
    "LLaVA-OneVision-7B": {
        "macs": (57, 113.56, 226.67, 316.88),
        "memory": (4858, 8640, 16206, 20208),
        "prefill": (554, 1129, 2504, 3978),
    }
}
for _preset, _macs in {"2B": (10.93, 21.77, 43.46, 86.82), "7B": (13.17, 25.92, 51.43, 102.42)}.items():
    _, _memory, _prefill = zip(*PAPER_COSTS[_preset], strict=True)
    PAPER[f"CrossLMM-{_preset}"] = {"macs": _macs, "memory": _memory, "prefill": _prefill}
NOT_COUNTED_BY_THE_PAPER = ("self-attention scores", "V2V scores")
"""Parts that grow faster than linearly with the number of frames, which the paper's figures do not."""


# --- the closed form ------------------------------------------------------------------------------------------------


def multiply_accumulates(
    config: CrossLMMConfig, frames: int, *, distinct: int | None = None, text_tokens: int = TEXT_TOKENS
) -> dict[str, int]:
    """Multiply-accumulates of one prefill by part, in closed form (docs/cost.md): a video, then text, and the logits
    of the last position.

    distinct: number of different pictures, each shown for the same time and at least four frames, with
    `skip_unchanged` and the form "features". Causal self-attention is counted in full, as a kernel without causal
    skipping computes it.
    """
    distinct, dates = (frames, 0) if distinct is None else (distinct, frames)  # a date is a key too
    vision, text = config.vision_config, config.text_config
    num_patches, patch_values = config.patch_grid_size**2, vision.num_channels * vision.patch_size**2
    visual = frames * config.tokens_per_frame
    length = visual + text_tokens
    query_width, key_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    num_cross = len(config.cross_attention_layer_indices)
    v2v, t2v = num_cross * config.use_v2v, num_cross * config.use_t2v
    block = (
        num_patches * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
        + 2 * num_patches**2 * vision.hidden_size
    )
    hidden_size = config.projector_hidden_size or text.hidden_size
    keys = distinct * num_patches + dates
    keys_seen = {
        "video": frames * keys,
        "frame": frames * num_patches + dates,
        "causal": (frames * (distinct + 1) * num_patches + dates * (frames + 1)) // 2,
    }[config.v2v_scope]
    return {
        "vision": distinct * (num_patches * patch_values * vision.hidden_size + config.num_vision_blocks * block),
        "projector": distinct * config.tokens_per_frame * hidden_size * (vision.hidden_size + text.hidden_size),
        "language model": length
        * text.num_hidden_layers
        * text.hidden_size
        * (2 * query_width + 2 * key_width + 3 * text.intermediate_size),
        "self-attention scores": text.num_hidden_layers * 2 * length**2 * query_width,
        "keys and values": (v2v + t2v) * 2 * keys * vision.hidden_size * key_width,
        "queries and outputs": (v2v * visual + t2v * text_tokens) * 2 * text.hidden_size * query_width,
        "T2V scores": t2v * 2 * text_tokens * keys * query_width,
        "folding": t2v
        * 2
        * (vision.hidden_size + 1)
        * vision.hidden_size
        * key_width
        * (config.cross_attention_cache == "features"),
        "V2V scores": v2v * 2 * config.tokens_per_frame * keys_seen * query_width,
        "head": text.hidden_size * text.vocab_size,
    }


def paper_macs(config: CrossLMMConfig, frames: int) -> int:
    """Multiply-accumulates without the parts that the paper's figures leave out."""
    parts = multiply_accumulates(config, frames)
    return sum(macs for part, macs in parts.items() if part not in NOT_COUNTED_BY_THE_PAPER)


# --- counted --------------------------------------------------------------------------------------------------------


_META_MODELS: dict[tuple[str, str], Any] = {}


def _meta_model(contender: Contender, size: str) -> Any:
    key = (contender.model_name, size)
    if key not in _META_MODELS:
        with torch.device("meta"):
            model = contender.model_class(contender.config(size)).eval()
        model.set_attn_implementation("eager")  # the counter does not know every fused kernel
        _META_MODELS[key] = model
    return _META_MODELS[key]


@cache
def _costs(preset: str, size: str) -> CheckpointCosts:
    return count_costs(CrossLMM(preset).config(size))


def _counted(function: Callable[[], Any]) -> tuple[int, Any]:
    # With gradients on, attention is one product instead of many chunks: the same counts in less time.
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        result = function()
    return counter.get_total_flops() // 2, result


def count(contender: Contender, frames: int, *, size: str = "full") -> dict[str, Any]:
    """Counts a prefill on the meta device, and the bytes of weights and cache in bfloat16.

    CrossLMM's forward runs whole. The other models read tensor values, which meta tensors lack, so their encoder,
    language model and head run separately. Their encoder runs on `frames_at_once` frames, which do not attend to
    others.
    """
    model = _meta_model(contender, size)
    config, meta = model.config, torch.device("meta")
    text = config.get_text_config()
    prompt = contender.prompt(config, frames)
    tokens = len(prompt)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    position_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * torch.bfloat16.itemsize
    row: dict[str, Any] = {"model": contender.name, "frames": frames, "video_tokens": tokens}
    if isinstance(contender, CrossLMM):
        contender.prepare(model)
        config.vision_chunk_size = frames
        ids = torch.tensor([prompt + [1] * TEXT_TOKENS])
        video = contender.video(config, frames, meta, torch.float32)
        total, _ = _counted(lambda: model(input_ids=ids, **video, use_cache=True, logits_to_keep=1))
        costs = _costs(contender.preset, size)
        row["macs"] = {"total": total}
        row["closed_form"] = multiply_accumulates(config, frames)
        row["weight_bytes"] = costs.weight_bytes
        row["cache_bytes"] = frames * (costs.cache_bytes_per_frame[contender.form] + costs.language_bytes_per_frame)
        return row
    step = contender.frames_at_once
    video = contender.video(config, step, meta, torch.float32)
    vision, _ = _counted(lambda: model.get_video_features(**video))
    embeds = torch.empty(1, tokens + TEXT_TOKENS, text.hidden_size, device=meta)
    language, states = _counted(lambda: model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    head, _ = _counted(lambda: model.lm_head(states[:, -1:]))
    vision = vision * -(-frames // step)
    row["macs"] = {"vision": vision, "language model": language + head, "total": vision + language + head}
    row["weight_bytes"] = sum(parameter.numel() for parameter in model.parameters()) * torch.bfloat16.itemsize
    row["cache_bytes"] = tokens * position_bytes
    return row


# --- timed ----------------------------------------------------------------------------------------------------------


class Clock:
    """Measures seconds: a GPU's time, or on a CPU the process's CPU time, which other load disturbs least."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # `self.device` need not be the current device
        return event

    def between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def seconds(self, function: Callable[[], Any]) -> float:
        start = self.now()
        function()
        return self.between(start, self.now())


class PartTimer:
    """Divides the time inside `with` among parts: it counts for the innermost running part, or for "rest".

    patterns: per part, the pattern of its modules' names.
    """

    def __init__(self, model: torch.nn.Module, patterns: dict[str, str], clock: Clock) -> None:
        self.model, self.patterns, self.clock = model, patterns, clock
        self.running = ["rest"]
        self.marks: list[tuple[str, Any]] = []

    def __enter__(self) -> "PartTimer":
        self.hooks = []
        for name, module in self.model.named_modules():
            for part, pattern in self.patterns.items():
                if re.fullmatch(pattern, name):
                    self.hooks.append(module.register_forward_pre_hook(partial(self._begin, part)))
                    self.hooks.append(module.register_forward_hook(self._end))
        self._mark()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mark()
        for hook in self.hooks:
            hook.remove()

    def _begin(self, part: str, *_: Any) -> None:
        self.running.append(part)
        self._mark()

    def _end(self, *_: Any) -> None:
        self.running.pop()
        self._mark()

    def _mark(self) -> None:
        self.marks.append((self.running[-1], self.clock.now()))

    def seconds(self) -> dict[str, float]:
        total = dict.fromkeys([*self.patterns, "rest"], 0.0)
        for (part, start), (_, end) in pairwise(self.marks):
            total[part] += self.clock.between(start, end)
        return total


def build(contender: Contender, size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Builds a model with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return contender.model_class._from_config(contender.config(size), dtype=dtype).eval()


class Runner:
    """Runs a model on one video at a time."""

    def __init__(self, contender: Contender, model: Any) -> None:
        self.contender, self.model, self.clock = contender, model, Clock(model.device)
        self.inputs: dict[str, torch.Tensor] = {}
        self.cache: Any = None

    def show(self, frames: int) -> None:
        """Makes the inputs of a random video and the first question."""
        config, device = self.model.config, self.model.device
        ids = torch.tensor([self.contender.prompt(config, frames) + [1] * TEXT_TOKENS], device=device)
        video = self.contender.video(config, frames, device, self.model.dtype)
        self.inputs = video | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if isinstance(self.contender, QwenVL):
            self.inputs["mm_token_type_ids"] = 2 * (ids == config.video_token_id).int()

    def prefill(self) -> None:
        self.contender.prepare(self.model)
        self.cache = self.model(**self.inputs, use_cache=True, logits_to_keep=1).past_key_values

    def answer(self, new_tokens: int) -> None:
        """Answers the first question from pixels."""
        self.contender.prepare(self.model)
        self._generate(self.inputs, new_tokens)

    def answer_another(self, new_tokens: int) -> None:
        """Answers a second question in a copy of the prefill's cache."""
        self.contender.prepare(self.model)
        ids = torch.nn.functional.pad(self.inputs["input_ids"], (0, QUESTION_TOKENS), value=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self._generate(inputs | {"past_key_values": copy.deepcopy(self.cache)}, new_tokens)

    def _generate(self, inputs: dict[str, Any], new_tokens: int) -> None:
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        self.model.generate(**inputs, **length, do_sample=False, pad_token_id=0)

    @torch.no_grad()
    def times(self) -> dict[str, float]:
        """Seconds of a prefill, of `generate` to the first token of a first and a second question, per decoded token,
        and of the prefill's parts."""
        seconds = {"prefill": self.clock.seconds(self.prefill)}
        seconds["first_token"] = self.clock.seconds(partial(self.answer, 1))
        seconds["second_question"] = self.clock.seconds(partial(self.answer_another, 1))
        longer = self.clock.seconds(partial(self.answer_another, 1 + NEW_TOKENS))
        seconds["decode_step"] = (longer - seconds["second_question"]) / NEW_TOKENS
        with PartTimer(self.model, self.contender.parts, self.clock) as timer:
            self.prefill()
        self.cache = None
        return seconds | {f"part: {part}": value for part, value in timer.seconds().items()}

    @torch.no_grad()
    def peak_bytes(self) -> int:
        """Peak memory of an answer of `NEW_TOKENS`, without weights and pixels: of the GPU's allocator, or the
        process's resident memory (Linux)."""
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self.answer(NEW_TOKENS)
            return torch.cuda.max_memory_allocated(device) - before
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident_bytes("VmRSS")
        self.answer(NEW_TOKENS)
        return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def _peaks(name: str, frames: Sequence[int], size: str, device: str) -> list[int]:
    """`Runner.peak_bytes` for each number of frames."""
    [contender] = [contender for contender in contenders() if contender.name == name]
    runner = Runner(contender, build(contender, size, torch.device(device), _dtype(torch.device(device))))
    runner.show(2)
    runner.peak_bytes()
    peaks = []
    for count_of_frames in frames:
        runner.show(count_of_frames)
        peaks.append(runner.peak_bytes())
    return peaks


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def time_models(
    chosen: Sequence[Contender],
    frames: Sequence[int],
    *,
    size: str,
    device: torch.device,
    repeats: int,
    on_step: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Times all models in turns; returns a row per model and number of frames, with medians of `repeats` rounds. Rows
    of models that ran out of memory have the error."""
    models = {}
    for contender in chosen:
        if contender.model_name not in models:
            models[contender.model_name] = build(contender, size, device, _dtype(device))
    runners = [Runner(contender, models[contender.model_name]) for contender in chosen]
    rows = []
    for count_of_frames in frames:
        rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
        too_large: dict[str, dict[str, Any]] = {}
        for turn in range(1 + repeats):  # the first warms up
            for runner in runners:
                name = runner.contender.name
                if name in too_large:
                    continue
                on_step(f"{name}, {count_of_frames} frames, round {turn} of {repeats}")
                try:
                    runner.show(count_of_frames)
                    rounds[name].append(runner.times())
                except torch.OutOfMemoryError as error:
                    too_large[name] = {"out_of_memory": str(error)}
                runner.inputs, runner.cache = {}, None
        for runner in runners:
            name = runner.contender.name
            row = {"model": name, "frames": count_of_frames}
            if name not in too_large:
                _, *measured = rounds[name]
                row["seconds"] = {what: statistics.median(times[what] for times in measured) for what in measured[0]}
            rows.append(row | too_large.get(name, {}))
    return rows


def unless_too_large(measure: Callable[..., dict[str, Any]], contender: Any, *args: Any, **kwargs: Any) -> dict:
    """The result of `measure`, or a row with the error if memory is too small, so that earlier results are kept."""
    _free_memory()
    try:
        return measure(contender, *args, **kwargs)
    except torch.OutOfMemoryError as error:
        return {"model": contender.name, "out_of_memory": str(error)}


def measure_memory(
    chosen: Sequence[Contender],
    frames: Sequence[int],
    *,
    size: str,
    device: torch.device,
    on_step: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Peak memory of each model, in a process of its own, and the bytes that each frame adds."""

    def measured(contender: Contender) -> dict[str, Any]:
        on_step(f"{contender.name}, memory")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            peaks = process.submit(_peaks, contender.name, frames, size, str(device)).result()
        growth = (peaks[-1] - peaks[0]) / (frames[-1] - frames[0]) if len(frames) > 1 else None
        by_frames = dict(zip(frames, peaks, strict=True))
        return {"model": contender.name, "peak_bytes": by_frames, "bytes_per_frame": growth}

    return [unless_too_large(measured, contender) for contender in chosen]


def _free_memory() -> None:
    """Releases the GPU memory of deleted models, for other processes and larger models."""
    gc.collect()
    torch.cuda.empty_cache()


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product, an upper bound for a model."""
    # On a GPU about a quarter of a second; only the second half counts, because the clock rises slowly.
    side, times = (8192, 200) if device.type == "cuda" else (1024, 8)
    one, other = torch.randn(2, side, side, device=device, dtype=_dtype(device))
    clock = Clock(device)
    seconds = [clock.seconds(lambda: one @ other) for _ in range(times)]
    return 2 * side**3 / statistics.median(seconds[times // 2 :])


def time_file(frames: int, folder: Path) -> dict[str, float]:
    """CPU seconds to decode frames from a file, and to process them to pixels."""
    path = write_clip(folder / "clip.mp4", frames)
    clock, processor = Clock(torch.device("cpu")), CrossLMMVideoProcessor()
    start = clock.now()
    decoded = decode_video(path, num_frames=frames)
    read = clock.now()
    processor([decoded.frames], num_frames=frames)
    return {"decode": clock.between(start, read), "preprocess": clock.between(read, clock.now())}


def write_clip(path: Path, seconds: int) -> Path:
    """Writes a video of a moving picture, 640 x 360 at 4 frames per second."""
    picture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=4, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for step in range(4 * seconds):
            moved = np.ascontiguousarray(np.roll(picture, step * 8, axis=1)[:360])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        file.mux(stream.encode())
    return path


@torch.no_grad()
def time_long_video(contender: Contender, frames: int, *, size: str, device: torch.device) -> dict[str, Any]:
    """Seconds from pixels to the end of an answer of 64 tokens; one run after a short warm-up."""
    runner = Runner(contender, build(contender, size, device, _dtype(device)))
    runner.show(2)
    runner.answer(2)
    runner.show(frames)
    return {"model": contender.name, "frames": frames, "seconds": runner.clock.seconds(partial(runner.answer, 64))}


def time_training_step(
    contender: CrossLMM, frames: int, *, size: str, device: torch.device, rate: float
) -> dict[str, Any]:
    """Times a training step of stage 2 with one sample: all parameters learn, bfloat16 on float32 weights, activations
    recomputed."""
    model = build(contender, size, device, torch.float32).train()
    getattr(model, f"{CHECKPOINTING}_enable")()
    groups = parameter_groups(model, learning_rate=1e-5, gate_learning_rate=1e-3, vision_learning_rate=2e-6)
    optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
    runner = Runner(contender, model)
    runner.show(frames)
    contender.prepare(model)
    labels = runner.inputs["input_ids"].masked_fill(runner.inputs["input_ids"] == model.config.video_token_id, -100)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**runner.inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = statistics.median([runner.clock.seconds(step) for _ in range(4)][1:])
    parts = multiply_accumulates(model.config, frames) | {"folding": 0}
    macs = 3 * (sum(parts.values()) + (labels.shape[1] - 1) * parts["head"])  # backward takes twice the forward
    return {
        "model": contender.name,
        "frames": frames,
        "seconds": seconds,
        "macs": macs,
        "share_of_matrix_rate": 2 * macs / seconds / rate,
    }


COLD_START = """
import json, sys, time
start = time.perf_counter()
import transformers_crosslmm
from transformers import AutoModel, pipeline
imported = time.perf_counter()
what, folder, device, clip = sys.argv[1:]
if what == "AutoModel":
    AutoModel.from_pretrained(folder, dtype="auto", device_map=device)
else:
    pipe = pipeline("video-text-to-text", model=folder, dtype="auto", device_map=device)
loaded = answered = time.perf_counter()
if what == "pipeline":
    pipe(videos=clip, text="What happens?", max_new_tokens=1, processor_kwargs={"num_frames": 8})
    answered = time.perf_counter()
print(json.dumps({"import": imported - start, "load": loaded - imported, "first_answer": answered - loaded}))
"""


def time_cold_start(contender: CrossLMM, folder: Path, *, size: str, device: torch.device) -> dict[str, Any]:
    """Saves the model in shards with a processor, then measures wall seconds, each in a new process, of
    `AutoModel.from_pretrained(…, device_map=…)` and of `pipeline("video-text-to-text")` up to a first answer."""
    tokenizer = load_processor(TINY_CHECKPOINT).tokenizer
    config = contender.config(size)
    image_size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    processor = CrossLMMProcessor(
        SiglipImageProcessorPil(size=image_size),
        tokenizer,
        CrossLMMVideoProcessor(size=image_size),
        pooled_grid_size=config.pooled_grid_size,
        patch_size=config.vision_config.patch_size,
    )
    processor.save_pretrained(folder)
    model = build(contender, size, device, torch.bfloat16)
    model.config.image_token_id, model.config.video_token_id = processor.image_token_id, processor.video_token_id
    model.save_pretrained(folder, max_shard_size="5GB" if size == "full" else "20MB")
    del model
    _free_memory()
    clip = write_clip(folder / "clip.mp4", 8)
    row: dict[str, Any] = {"model": contender.name, "shards": len(list(folder.glob("*.safetensors")))}
    for what in ("AutoModel", "pipeline"):
        command = [sys.executable, "-c", COLD_START, what, str(folder), str(device), str(clip)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row[what] = json.loads(done.stdout.splitlines()[-1])
    return row


# --- a run ----------------------------------------------------------------------------------------------------------


def choose(names: Sequence[str]) -> list[Contender]:
    """The contenders with these names or model names; all for none. Raises ValueError for an unknown name."""
    every = contenders()
    known = list(dict.fromkeys(name for each in every for name in (each.model_name, each.name)))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"There is no model {', '.join(map(repr, unknown))} to compare; there are {'; '.join(known)}."
        )
    return [each for each in every if not names or each.name in names or each.model_name in names]


def about(device: torch.device) -> dict[str, Any]:
    """The command, commit, device and versions of a run."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    is_cuda = device.type == "cuda"
    return {
        "command": shlex.join(["crosslmm", *sys.argv[1:]]),
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name(device) if is_cuda else (names or [platform.processor()])[0],
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "transformers-crosslmm")}
        | {"python": platform.python_version()},
    }


def run(
    names: Sequence[str] = (),
    frames: Sequence[int] = (),
    *,
    size: str = "full",
    device: str | None = None,
    repeats: int = 3,
    on_step: Callable[[str], None] = lambda step: None,
    on_results: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Runs the whole benchmark: counts, and at toy size or on a GPU times and memory.

    names: of models; all by default. frames: by default `FRAMES`, for CrossLMM also `LONG`.
    on_results: called with all results so far after each part, because a run on a GPU takes long.
    """
    chosen, place = choose(names), torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ours = [contender for contender in chosen if isinstance(contender, CrossLMM)]
    results: dict[str, Any] = {"about": about(place), "size": size, "counted": []}
    for contender in chosen:
        for number in frames or (FRAMES + LONG if contender in ours else FRAMES):
            on_step(f"Counting {contender.name}, {number} frames")
            results["counted"].append(count(contender, number, size=size))
    on_results(results)
    if size == "full" and place.type != "cuda":
        return results

    def keep(part: str, found: Any) -> None:
        results[part] = found
        on_results(results)

    frames = frames or (FRAMES if size == "full" else (8, 16))
    keep("matrix_rate", rate := matrix_rate(place))
    timed = time_models(chosen, frames, size=size, device=place, repeats=repeats, on_step=on_step)
    macs = {(row["model"], row["frames"]): row["macs"]["total"] for row in results["counted"]}
    for row in (row for row in timed if "seconds" in row):
        row["share_of_matrix_rate"] = 2 * macs[row["model"], row["frames"]] / row["seconds"]["prefill"] / rate
    keep("timed", timed)
    keep("memory", measure_memory(chosen, frames, size=size, device=place, on_step=on_step))
    long_frames = LONG[-1] if size == "full" else 4 * max(frames)
    place_and_size = {"size": size, "device": place}
    with tempfile.TemporaryDirectory() as folder:
        on_step("A video from its file")
        keep("file", [{"frames": number, "seconds": time_file(number, Path(folder))} for number in frames])
        for contender in ours:
            on_step(f"{contender.name}, {long_frames} frames")
            found = unless_too_large(time_long_video, contender, long_frames, **place_and_size)
            keep("long_video", [*results.get("long_video", ()), found])
        for contender in ours[:1]:  # a 7B's optimiser does not fit one GPU
            on_step(f"{contender.name}, a training step")
            found = unless_too_large(time_training_step, contender, min(frames), **place_and_size, rate=rate)
            keep("training_step", found)
        for contender in ([one for one in ours if one.preset == "7B"] or ours)[:1]:
            on_step(f"{contender.name}, from disk")
            found = unless_too_large(time_cold_start, contender, Path(folder) / "model", **place_and_size)
            keep("cold_start", found)
    return results


def table(results: dict[str, Any]) -> list[list[str]]:
    """The results as rows of a table with a heading: counts, and times if there are any."""
    timed = {(row["model"], row["frames"]): row.get("seconds") for row in results.get("timed", ())}
    whats = ("prefill", "second_question", "decode_step") if timed else ()
    rows = [["", "frames", "video tokens", "T multiply-accumulates", "MB kept", *(f"{what}, s" for what in whats)]]
    for row in results["counted"]:
        seconds = timed.get((row["model"], row["frames"]))
        rows.append(
            [
                row["model"],
                f"{row['frames']:,}",
                f"{row['video_tokens']:,}",
                f"{row['macs']['total'] / 1e12:,.2f}",
                f"{row['cache_bytes'] / 1e6:,.0f}",
                *(f"{seconds[what]:.3g}" if seconds else "" for what in whats),
            ]
        )
    return rows


__all__ = ["FRAMES", "PAPER", "count", "multiply_accumulates", "paper_macs", "run", "table"]
