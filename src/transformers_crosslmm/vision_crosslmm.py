"""From frames to tokens: the vision tower, the projector, what normalises and dates original tokens, and how chunks of
frames become one tensor.

Shapes: F frames, N patches per frame, D vision width, C language width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from .configuration_crosslmm import CrossLMMConfig

NORM_EPS = 1e-6
"""Of the LayerNorm that `visual_norm` names."""

FRAMES_AT_ONCE = 16
"""Frames whose original tokens are in float32 at a time, while they are normalised."""


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
        block: as much as the original tokens, 26 times. A frozen tower keeps nothing and has no backward pass;
        Transformers' checkpointing makes its embeddings ask for gradients, which would run through all of it."""
        learns = torch.is_grad_enabled() and (
            pixel_values.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        )
        with torch.set_grad_enabled(learns):
            if learns and self.training and self.encoder.gradient_checkpointing:
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


@dataclass(frozen=True)
class TokenNorm:
    """LayerNorm without parameters, and the date, of original tokens: applied where they are read, so that nobody
    keeps a normalised copy of them all.

    scale: (F, N), one over the standard deviation of each token. codes: (F, D), what its date adds to each frame.
    Both in float32 or better.
    """

    scale: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def of(cls, original: torch.Tensor, codes: torch.Tensor) -> "TokenNorm":
        """For tokens (F, N, D) of frames with these codes."""
        variances = (precisely(some).var(-1, correction=0) for some in original.split(FRAMES_AT_ONCE))
        return cls((joined(variances, len(original)) + NORM_EPS).rsqrt(), codes)

    def to(self, device: torch.device) -> "TokenNorm":
        return self if self.codes.device == device else TokenNorm(self.scale.to(device), self.codes.to(device))

    def followed_by(self, other: "TokenNorm") -> "TokenNorm":
        """That of these frames, and others behind them."""
        return TokenNorm(torch.cat([self.scale, other.scale]), torch.cat([self.codes, other.codes]))

    def between(self, first: int, last: int) -> "TokenNorm":
        """That of the tokens [first, last), counted through all frames; whole frames."""
        frames = slice(first // self.scale.shape[1], last // self.scale.shape[1])
        return TokenNorm(self.scale[frames], self.codes[frames])

    def split(self, at_once: int) -> list["TokenNorm"]:
        """That of `at_once` tokens at a time; whole frames."""
        frames = at_once // self.scale.shape[1]
        return [TokenNorm(*part) for part in zip(self.scale.split(frames), self.codes.split(frames), strict=True)]

    def applied(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (F x N, D), normalised and dated."""
        return normalised_tokens(tokens.view(*self.scale.shape, -1), self.codes).flatten(0, 1)


def precisely(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def normalised_tokens(original: torch.Tensor, codes: torch.Tensor, *, is_checkpointed: bool = False) -> torch.Tensor:
    """LayerNorm of original tokens (F, N, D) without parameters, and the codes (F, D) of their frames on top; made
    again in the backward pass when `is_checkpointed`."""

    def normalised(some: torch.Tensor, its_codes: torch.Tensor) -> torch.Tensor:
        states = F.layer_norm(precisely(some), some.shape[-1:], eps=NORM_EPS)
        return (states + its_codes[:, None]).to(some.dtype)

    make = partial(checkpoint, normalised, use_reentrant=False) if is_checkpointed else normalised
    chunks = zip(original.split(FRAMES_AT_ONCE), codes.split(FRAMES_AT_ONCE), strict=True)
    return joined((make(*chunk) for chunk in chunks), len(original))


def frame_codes(frame_numbers: torch.Tensor, width: int, *, visual_time: str) -> torch.Tensor:
    """What the date of each frame (f,), its number within its medium, adds to its tokens: (f, width), float64."""
    if visual_time == "none":
        return torch.zeros(len(frame_numbers), width, dtype=torch.float64)
    steps = torch.arange(width // 2, dtype=torch.float64) * (2.0 / width)
    angles = frame_numbers.double()[:, None] * 10_000.0**-steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def joined(parts: Iterator[torch.Tensor], length: int) -> torch.Tensor:
    """Parts one after the other, `length` along dim 0; without a gradient, no part is kept until the last has come."""
    first = next(parts)
    if torch.is_grad_enabled() and first.requires_grad:
        return torch.cat([first, *parts])
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
