"""From frames to tokens: the vision tower, the projector, and how chunks of frames become one tensor."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from .configuration_crosslmm import CrossLMMConfig


class CrossLMMVisionEmbeddings(SiglipVisionEmbeddings):
    """SigLIP's, a patch behind the other in memory. The convolution leaves channel behind channel, which every block
    would inherit: each of its norms copied its input, and so did whoever reads the original tokens."""

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        return super().forward(pixel_values, **kwargs).contiguous()


class CrossLMMVisionTower(SiglipVisionModel):
    """SigLIP up to the hidden state that CrossLMM reads; what lies behind it is not built."""

    # SigLIP's own list names parts that are not built, which FSDP would look for.
    _no_split_modules = ["SiglipEncoderLayer"]

    def __init__(self, config: SiglipVisionConfig, num_blocks: int):
        super().__init__(config)
        self.embeddings = CrossLMMVisionEmbeddings(config)
        left_out = "|".join(str(block) for block in range(num_blocks, len(self.encoder.layers)))
        del self.encoder.layers[num_blocks:]
        self.post_layernorm = nn.Identity()
        # A whole SigLIP may be loaded without a word about what is not built.
        self._keys_to_ignore_on_load_unexpected.add(r"vision_tower\.(post_layernorm|head)\.")
        if left_out:
            self._keys_to_ignore_on_load_unexpected.add(rf"vision_tower\.encoder\.layers\.({left_out})\.")

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Under checkpointing a chunk is kept as pixels. Checkpointed by block alone, it would keep the input of every
        block: as much as the original tokens, 26 times."""
        if self.training and self.encoder.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(super().forward, pixel_values, use_reentrant=False, **kwargs)
        return super().forward(pixel_values, **kwargs)


class CrossLMMMultiModalProjector(nn.Module):
    """Two linear layers with GELU between them, on pooled tokens only: D -> hidden -> C."""

    def __init__(self, config: CrossLMMConfig):
        super().__init__()
        width = config.text_config.hidden_size
        hidden_size = config.projector_hidden_size or width
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, width)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(pooled)))


def normalised_tokens(
    original: torch.Tensor, frame_numbers: torch.Tensor, *, visual_time: str, dtype: torch.dtype
) -> torch.Tensor:
    """LayerNorm of the original tokens (f, N, D) without parameters, and the date of their frames (f,) if
    `visual_time` says so."""
    precise = original if original.dtype == torch.float64 else original.float()
    states = F.layer_norm(precise, precise.shape[-1:], eps=1e-6)
    if visual_time == "sinusoidal":
        half = states.shape[-1] // 2
        steps = torch.arange(half, dtype=torch.float64) * (2.0 / states.shape[-1])
        angles = frame_numbers.double()[:, None] * 10_000.0**-steps
        code = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (f, D)
        states += code[:, None].to(states.device, states.dtype)
    return states.to(dtype)


def joined(parts: Iterator[torch.Tensor], length: int) -> torch.Tensor:
    """Parts one after the other, `length` along dim 0; without a gradient, no part is kept until the last has come."""
    if torch.is_grad_enabled():
        return torch.cat(list(parts))
    first = next(parts)
    if len(first) == length:
        return first
    whole = first.new_empty(length, *first.shape[1:])
    done = 0
    for part in chain([first], parts):
        whole[done : done + len(part)] = part
        done += len(part)
    return whole


def per_medium(tokens: torch.Tensor, frames: list[int]) -> tuple[torch.Tensor, ...]:
    """Pooled tokens (F, s x s, C) of all media, apart."""
    return tokens.flatten(0, 1).split([count * tokens.shape[1] for count in frames])
