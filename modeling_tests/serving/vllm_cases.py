"""Mixed requests for vLLM, what `generate` answers to them, and engines on a CPU."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from factories import random_frames, save_checkpoint, tiny_processor
from transformers_crosslmm import CrossLMMForConditionalGeneration, CrossLMMProcessor

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

VIDEO, IMAGE = "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
TEXT = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
MAX_TOKENS = 12

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "qwen2": {"text_config": TEXT},
    "qwen2, one token per frame": {"text_config": TEXT, "pooled_grid_size": 1, "v2v_scope": "frame"},
    "qwen3, causal": {
        "text_config": TEXT | {"model_type": "qwen3", "head_dim": 64},
        "pooled_grid_size": 2,
        "v2v_scope": "causal",
        "visual_norm": "layernorm",
    },
    "llama, dated frames": {
        "text_config": TEXT | {"model_type": "llama", "tie_word_embeddings": True},
        "visual_norm": "layernorm",
        "visual_time": "sinusoidal",
    },
    "mistral, by frame": {
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        "pooled_grid_size": 2,
        "v2v_scope": "frame",
        "visual_norm": "layernorm",
        "visual_time": "sinusoidal",
    },
}
"""By name, what differs from the tiny checkpoint: s = 1, 2, 3, all scopes, norm and time on and off, tied and not."""


@dataclass
class Request:
    text: str
    videos: list[np.ndarray] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    def for_vllm(self) -> dict[str, Any]:
        media = {"video": self.videos, "image": self.images}
        return {"prompt": self.text, "multi_modal_data": {name: given for name, given in media.items() if given}}


def mixed_requests(count: int, *, seed: int = 0, longest_video: int = 40) -> list[Request]:
    """Text alone, images, one to three videos, long texts before, between and behind them, and questions about a video
    that another request has shown: the same beginning, another end."""
    generator = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz  .,?")
    requests: list[Request] = []

    def words(most: int) -> str:
        return "".join(generator.choice(letters, int(generator.integers(1, most))))

    def frames() -> np.ndarray:
        count = int(min(longest_video, 1 + generator.exponential(longest_video / 4)))
        return random_frames(count, seed=int(generator.integers(2**31)))

    for number in range(count):
        kind = number % 8
        if kind in (0, 5) and len(requests) > 2 and (earlier := requests[int(generator.integers(len(requests)))]).text:
            kept = earlier.text.rfind("<|vision_end|>") + len("<|vision_end|>") if "<|" in earlier.text else 20
            requests.append(Request(earlier.text[:kept] + words(30), earlier.videos, earlier.images))
        elif kind == 1:
            requests.append(Request(words(300)))
        elif kind == 2:
            images = [Image.fromarray(random_frames(1, seed=int(generator.integers(2**31)))[0]) for _ in range(2)]
            requests.append(Request(words(20) + IMAGE + words(20) + IMAGE + words(20), [], images))
        elif kind == 3:
            videos = [frames() for _ in range(3)]
            text = VIDEO + words(30) + VIDEO + VIDEO + words(30)
            requests.append(Request(text, videos))
        elif kind == 4:
            image = Image.fromarray(random_frames(1, seed=int(generator.integers(2**31)))[0])
            requests.append(Request(words(200) + VIDEO + words(20) + IMAGE + words(200), [frames()], [image]))
        else:
            requests.append(Request(words(20) + VIDEO + words(60), [frames()]))
    return requests


def save(name: str, folder: Path) -> Path:
    """The checkpoint of a name, in its folder."""
    save_checkpoint(folder, **CHECKPOINTS[name])
    processor = tiny_processor(pooled_grid_size=CHECKPOINTS[name].get("pooled_grid_size", 3))
    processor.video_processor.max_frames = 300
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def answers(folder: Path, requests: list[Request], *, dtype: torch.dtype = torch.float32) -> list[list[int]]:
    """What `generate` writes, one by one."""
    model = CrossLMMForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    processor = CrossLMMProcessor.from_pretrained(folder)
    written = []
    for request in requests:
        inputs = processor(
            text=[request.text], videos=request.videos or None, images=request.images or None, return_tensors="pt"
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=None)
        written.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return written


def as_messages(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages; parts of one are a user's message."""
    return content if "role" in content[0] else [{"role": "user", "content": content}]


@torch.no_grad()
def answer_to_chat(folder: Path, content: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """The prompt that the package's processor makes of a message with these parts, or of messages, and what `generate`
    writes."""
    processor = CrossLMMProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        as_messages(content),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    model = CrossLMMForConditionalGeneration.from_pretrained(folder).eval()
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=None)[0].tolist()
    length = inputs["input_ids"].shape[1]
    return ids[:length], ids[length:]


@contextlib.contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[Any]:
    """vLLM's `LLM` in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    from transformers_crosslmm.serving.vllm.rules import ARCHITECTURE

    load_general_plugins()
    from transformers_crosslmm.serving.vllm.model import CrossLMMForVllm

    # The class itself: by its name vLLM would look at it in another process, for a minute.
    ModelRegistry.register_model(ARCHITECTURE, CrossLMMForVllm)
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 1024,
        "block_size": 32,
        "limit_mm_per_prompt": {"video": {"count": 3, "num_frames": 300}, "image": 3},
        "disable_log_stats": False,
        "seed": 0,
    }
    # Once n-grams have imported llvmlite, vLLM stumbles over this module when it looks through all for its kernels.
    hidden = sys.modules.pop("llvmlite.binding.ffi", None)
    try:
        llm = LLM(str(folder), **defaults | settings)
    finally:
        if hidden is not None:
            sys.modules["llvmlite.binding.ffi"] = hidden
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def ask(llm: Any, requests: list[Request], *, one_by_one: bool = False) -> list[list[int]]:
    """What vLLM writes, all at once or one by one."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    batches = [[request] for request in requests] if one_by_one else [requests]
    return [
        list(output.outputs[0].token_ids)
        for batch in batches
        for output in llm.generate([request.for_vllm() for request in batch], sampling, use_tqdm=False)
    ]


@torch.no_grad()
def margins(folder: Path, request: Request, expected: list[int], written: list[int]) -> tuple[float, float]:
    """Where two answers part: by how much the reference, in float32, rates one token above the other, and what
    bfloat16 changes of its logits there at most."""
    place = next(i for i, pair in enumerate(zip(expected, written, strict=True)) if pair[0] != pair[1])
    processor = CrossLMMProcessor.from_pretrained(folder)
    inputs = processor(
        text=[request.text], videos=request.videos or None, images=request.images or None, return_tensors="pt"
    )
    ids = torch.cat([inputs["input_ids"], torch.tensor([expected[:place]], dtype=torch.long)], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exact, rounded = (
        CrossLMMForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        .eval()(**inputs, logits_to_keep=1)
        .logits[0, -1]
        .float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    return float((exact[expected[place]] - exact[written[place]]).abs()), float((exact - rounded).abs().max())
