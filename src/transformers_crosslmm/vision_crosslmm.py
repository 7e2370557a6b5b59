"""From frames to tokens: the vision tower, the projector, and the normalisation and frame codes of original tokens.

Shapes: F frames, N patches per frame, D vision width, C language width.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_crosslmm import CrossLMMConfig

NORM_EPS = 1e-6
"""Epsilon of `visual_norm`'s LayerNorm."""

FRAMES_AT_ONCE = 16
"""Frames normalised at a time: only their original tokens are in float32 at once."""


@dataclass(frozen=True)
class TowerLayout:
    """Names of the parts of an encoder of Transformers.

    blocks: the list of its blocks. final_norm: the norm after the last block. registers: the config's fields that
    count tokens between the class token and the patches; None if there is no class token either.
    """

    blocks: str
    final_norm: str
    registers: tuple[str, ...] | None


TOWERS = {
    "siglip_vision_model": TowerLayout("encoder.layers", "post_layernorm", None),
    "clip_vision_model": TowerLayout("encoder.layers", "post_layernorm", ()),
    "dinov2": TowerLayout("encoder.layer", "layernorm", ()),
    "dinov2_with_registers": TowerLayout("encoder.layer", "layernorm", ("num_register_tokens",)),
    "dinov3_vit": TowerLayout("model.layer", "norm", ("num_register_tokens",)),
}


def build_vision_tower(config: CrossLMMConfig) -> PreTrainedModel:
    """Builds Transformers' own encoder up to the hidden state that CrossLMM reads.

    Later blocks are deleted, and the final norm becomes the identity. Loading a whole encoder skips their tensors
    without a warning.
    """
    tower = AutoModel.from_config(config.vision_config)
    layout = TOWERS[config.vision_config.model_type]
    blocks = tower.get_submodule(layout.blocks)
    dropped = "|".join(str(block) for block in range(config.num_vision_blocks, len(blocks)))
    del blocks[config.num_vision_blocks :]
    setattr(tower, layout.final_norm, nn.Identity())
    ignored = {rf"vision_tower\.({layout.final_norm}|head)\."}
    if dropped:
        ignored.add(rf"vision_tower\.{re.escape(layout.blocks)}\.({dropped})\.")
    tower._keys_to_ignore_on_load_unexpected |= ignored
    # FSDP looks for every class named here, so parts that are not built (SigLIP's pooling head) are removed.
    built = {type(module).__name__ for module in tower.modules()}
    tower._no_split_modules = set(tower._no_split_modules) & built
    mask_token = getattr(tower.embeddings, "mask_token", None)
    if mask_token is not None:
        mask_token.requires_grad_(False)  # used only in DINO's own pretraining
    tower.embeddings.register_forward_hook(_contiguous)
    return tower


def _contiguous(module: nn.Module, inputs: tuple, embedded: torch.Tensor) -> torch.Tensor:
    """Hook: makes embedded patches contiguous. With the convolution's strides every LayerNorm would copy its input."""
    return embedded.contiguous()


def upload(chunk: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a chunk of pixels to a device. From pinned memory, the copy overlaps with preparing the next chunk."""
    if device.type == "cuda" and chunk.device.type == "cpu" and torch.cuda.is_available():
        chunk = chunk.pin_memory()
    return chunk.to(device, non_blocking=True)


def encode_frames(tower: PreTrainedModel, pixels: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
    """Encodes a chunk of frames (F, 3, S, S): `last_hidden_state` is V of Eq. 1, (F, N, D), without the tokens before
    the patches.

    With checkpointing, only the pixels of a chunk are kept; checkpointing per block would keep the input of every
    block, 26 times as much as the original tokens. A frozen tower runs without gradients: Transformers' checkpointing
    makes its embeddings require them, and they would run through the whole tower.
    """
    learns = torch.is_grad_enabled() and (
        pixels.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
    )
    is_checkpointed = learns and any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in tower.modules()
    )
    with torch.set_grad_enabled(learns):
        run = partial(checkpoint, tower, use_reentrant=False) if is_checkpointed else tower
        output = run(pixels, **kwargs)
    return replace(output, last_hidden_state=output.last_hidden_state[:, num_prefix_tokens(tower.config) :])


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """The number of tokens before the patches: class token and registers, if the encoder has them."""
    registers = TOWERS[config.model_type].registers
    return 0 if registers is None else 1 + sum(getattr(config, name) for name in registers)


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
    """LayerNorm without parameters, and frame codes, of original tokens. It is applied when tokens are read, so that
    no normalised copy of all tokens is kept.

    scale: (F, N), one over the standard deviation of each token. codes: (F, D), the code added to each frame's tokens.
    Both in float32 or better.
    """

    scale: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def of(cls, original: torch.Tensor, codes: torch.Tensor) -> "TokenNorm":
        """Computes the norm for tokens (F, N, D) of frames with these codes."""
        if not len(original):  # of a live video whose new frames show nothing new
            return cls(codes.new_empty(original.shape[:2]), codes)
        variances = (to_float32(chunk).var(-1, correction=0) for chunk in original.split(FRAMES_AT_ONCE))
        return cls((concat_parts(variances, len(original)) + NORM_EPS).rsqrt(), codes)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device) -> "TokenNorm":
        return TokenNorm(self.scale.to(device), self.codes.to(device))

    def concat(self, other: "TokenNorm") -> "TokenNorm":
        """The norm of these frames followed by those of `other`."""
        return TokenNorm(torch.cat([self.scale, other.scale]), torch.cat([self.codes, other.codes]))

    def clip_to_tokens(self, first: int, last: int) -> "TokenNorm":
        """The norm of the tokens [first, last), counted through all frames; must be whole frames."""
        frames = slice(first // self.scale.shape[1], last // self.scale.shape[1])
        return TokenNorm(self.scale[frames], self.codes[frames])

    def apply(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalises tokens (F x N, D) and adds the codes of their frames."""
        return normalised_tokens(tokens.view(*self.scale.shape, -1), self.codes).flatten(0, 1)


def to_float32(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def normalised_tokens(original: torch.Tensor, codes: torch.Tensor, *, is_checkpointed: bool = False) -> torch.Tensor:
    """Applies LayerNorm without parameters to original tokens (F, N, D) and adds their frames' codes (F, D); if
    `is_checkpointed`, computes both again in the backward pass."""

    def normalised(chunk: torch.Tensor, chunk_codes: torch.Tensor) -> torch.Tensor:
        states = F.layer_norm(to_float32(chunk), chunk.shape[-1:], eps=NORM_EPS)
        return (states + chunk_codes[:, None]).to(chunk.dtype)

    make = partial(checkpoint, normalised, use_reentrant=False) if is_checkpointed else normalised
    chunks = zip(original.split(FRAMES_AT_ONCE), codes.split(FRAMES_AT_ONCE), strict=True)
    return concat_parts((make(*chunk) for chunk in chunks), len(original))


def frame_codes(frame_numbers: torch.Tensor, width: int, *, visual_time: str) -> torch.Tensor:
    """The code added to the tokens of each frame, from its number within its medium (f,): (f, width), float64."""
    if visual_time == "none":
        return torch.zeros(len(frame_numbers), width, dtype=torch.float64)
    steps = torch.arange(width // 2, dtype=torch.float64) * (2.0 / width)
    angles = frame_numbers.double()[:, None] * 10_000.0**-steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def concat_parts(parts: Iterator[torch.Tensor], length: int) -> torch.Tensor:
    """Concatenates parts to `length` along dim 0; without gradients each part is copied and freed at once."""
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


def split_by_medium(tokens: torch.Tensor, frames: list[int]) -> tuple[torch.Tensor, ...]:
    """Splits the pooled tokens (F, s x s, C) of all media into one tensor per medium."""
    return tokens.flatten(0, 1).split([count * tokens.shape[1] for count in frames])
