"""Keeps the ranks of distributed training in step when their batches hold different media.

All ranks must reduce gradients and gather sharded weights together and in the same order. If a rank without media
skipped a module, the others would wait forever, so it runs every module once on a black frame and multiplies the
result by zero.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from .cache_crosslmm import VisualMemory


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether parameters are sharded (FSDP, FSDP2, ZeRO-3); `fully_shard` may wrap some modules only."""
    if not dist.is_initialized():  # the usual case; checking every module takes milliseconds
        return False
    is_fsdp = is_fsdp_managed_module(model) or any(isinstance(module, FSDPModule) for module in model.modules())
    return is_fsdp or is_deepspeed_zero3_enabled()


def must_run_every_module(model: torch.nn.Module) -> bool:
    """Whether a batch without media must still run every module."""
    return model.training or is_sharded(model)


@torch.compiler.disable
def run_encoder_equally_often(model: Any, inputs_embeds: torch.Tensor, frames: list[int]) -> torch.Tensor:
    """Encodes black frames, with weight zero, until this rank has run encoder and projector as often as the rank with
    the most frames. Returns `inputs_embeds` with the zeros added.

    frames: the number of frames of each modality on this rank.
    """
    runs = max(1, sum(-(-count // model.config.vision_chunk_size) for count in frames))
    most = torch.tensor(runs, device=inputs_embeds.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    for _ in range(int(most) - runs):
        inputs_embeds, _ = _encode_black_frame(model, inputs_embeds)
    return inputs_embeds


def black_frame_memory(model: Any, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor, VisualMemory]:
    """For a rank without media: returns `inputs_embeds` with zeros added, and a memory of one frame of no row."""
    inputs_embeds, original = _encode_black_frame(model, inputs_embeds)
    states, _ = model.normalise(original, torch.zeros(1), is_lazy=False)
    memory = VisualMemory(
        form="kv",
        patches_per_frame=len(states),
        tokens_per_frame=model.config.tokens_per_frame,
        rows=[],
        states=states,
        num_patches=len(states),
        is_placeholder=True,
    )
    return inputs_embeds, memory


def _encode_black_frame(model: Any, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    vision = model.config.vision_config
    frame = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, dtype=model.vision_tower.dtype)
    output = model.encode(frame.to(inputs_embeds.device), [1])
    return inputs_embeds + 0.0 * output.pooler_output[0].sum().to(inputs_embeds.dtype), output.last_hidden_state
