"""From frames to tokens: the vision tower, the projector, what normalises and dates original tokens, and how chunks of
frames become one tensor.

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
"""Of the LayerNorm that `visual_norm` names."""

FRAMES_AT_ONCE = 16
"""Frames whose original tokens are in float32 at a time, while they are normalised."""


@dataclass(frozen=True)
class TowerLayout:
    """Where the parts of an encoder of Transformers lie.

    blocks: the list of its blocks. final_norm: what follows the last block. registers: the config's fields that count
    tokens between the class token and the patches; None where there is no class token either.
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
    """Transformers' own encoder up to the hidden state that CrossLMM reads; what follows it is not built.

    The blocks after that state go, and the final norm becomes the identity; loading a whole encoder skips the tensors
    of both without a word.
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
    # The class may name parts that are not built (SigLIP's pooling head), which FSDP would look for.
    built = {type(module).__name__ for module in tower.modules()}
    tower._no_split_modules = set(tower._no_split_modules) & built
    mask_token = getattr(tower.embeddings, "mask_token", None)
    if mask_token is not None:
        mask_token.requires_grad_(False)  # DINO's, for its own pretraining: nothing here reads it
    tower.embeddings.register_forward_hook(_contiguous)
    return tower


def _contiguous(module: nn.Module, inputs: tuple, embedded: torch.Tensor) -> torch.Tensor:
    """Hook: lays embedded patches out token by token. The convolution's strides would make every LayerNorm of every
    block copy its input."""
    return embedded.contiguous()


def upload(chunk: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A chunk of pixels on a device. From pinned memory a GPU fetches it while the CPU prepares the next one."""
    if device.type == "cuda" and chunk.device.type == "cpu" and torch.cuda.is_available():
        chunk = chunk.pin_memory()
    return chunk.to(device, non_blocking=True)


def encode_frames(tower: PreTrainedModel, pixels: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
    """What a tower gives for a chunk of frames (F, 3, S, S): `last_hidden_state` is V of Eq. 1, (F, N, D), without the
    tokens that stand before the patches.

    Under checkpointing a chunk is kept as pixels. Checkpointed by block alone, it would keep the input of every block:
    26 times as much as the original tokens. A frozen tower keeps nothing and has no backward pass; Transformers'
    checkpointing makes its embeddings ask for gradients, which would run through all of it.
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
    """Tokens before the patches: a class token and registers, where the encoder has them."""
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
        variances = (to_float32(some).var(-1, correction=0) for some in original.split(FRAMES_AT_ONCE))
        return cls((concat_parts(variances, len(original)) + NORM_EPS).rsqrt(), codes)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device) -> "TokenNorm":
        return TokenNorm(self.scale.to(device), self.codes.to(device))

    def concat(self, other: "TokenNorm") -> "TokenNorm":
        """That of these frames followed by others."""
        return TokenNorm(torch.cat([self.scale, other.scale]), torch.cat([self.codes, other.codes]))

    def clip_to_tokens(self, first: int, last: int) -> "TokenNorm":
        """That of the tokens [first, last), counted through all frames; whole frames."""
        frames = slice(first // self.scale.shape[1], last // self.scale.shape[1])
        return TokenNorm(self.scale[frames], self.codes[frames])

    def apply(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (F x N, D), normalised and with the codes of their frames added."""
        return normalised_tokens(tokens.view(*self.scale.shape, -1), self.codes).flatten(0, 1)


def to_float32(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def normalised_tokens(original: torch.Tensor, codes: torch.Tensor, *, is_checkpointed: bool = False) -> torch.Tensor:
    """LayerNorm of original tokens (F, N, D) without parameters, and the codes (F, D) of their frames on top; made
    again in the backward pass when `is_checkpointed`."""

    def normalised(some: torch.Tensor, its_codes: torch.Tensor) -> torch.Tensor:
        states = F.layer_norm(to_float32(some), some.shape[-1:], eps=NORM_EPS)
        return (states + its_codes[:, None]).to(some.dtype)

    make = partial(checkpoint, normalised, use_reentrant=False) if is_checkpointed else normalised
    chunks = zip(original.split(FRAMES_AT_ONCE), codes.split(FRAMES_AT_ONCE), strict=True)
    return concat_parts((make(*chunk) for chunk in chunks), len(original))


def frame_codes(frame_numbers: torch.Tensor, width: int, *, visual_time: str) -> torch.Tensor:
    """What the date of each frame (f,), its number within its medium, adds to its tokens: (f, width), float64."""
    if visual_time == "none":
        return torch.zeros(len(frame_numbers), width, dtype=torch.float64)
    steps = torch.arange(width // 2, dtype=torch.float64) * (2.0 / width)
    angles = frame_numbers.double()[:, None] * 10_000.0**-steps
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def concat_parts(parts: Iterator[torch.Tensor], length: int) -> torch.Tensor:
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
