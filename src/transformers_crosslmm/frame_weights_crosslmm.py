"""T2V attention weights of every generated token, summed per frame.

The softmax over all patches, summed per frame, equals the softmax over frames of each frame's log-sum-exp of scores.
So a few frames are processed at a time, and no attention map of all patches is built.

Shapes: B rows (samples, beams), R recorded rows, L tokens of a call, P patches of all media, N patches per frame,
        F frames that a row attends to, H query heads, G key/value heads, E head width, D vision width.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from .attention_crosslmm import Segments, Span, span_length
from .cache_crosslmm import VisualCacheLayer, VisualMemory

CHUNK_ELEMENTS = 2**22
"""The most elements of one chunk of scores, or of the keys for them: 16 MiB in float32."""


@dataclass
class CrossLMMGenerateOutput(GenerateDecoderOnlyOutput):
    """cross_attentions: per sequence, (cross-attention layers, heads, new tokens, frames); a token's frames sum to 1
    in every head."""

    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CrossLMMGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """cross_attentions: as in `CrossLMMGenerateOutput`, of the beam that wrote each token; 0 after its end."""

    cross_attentions: tuple[torch.Tensor, ...] | None = None


class FrameWeights(LogitsProcessor):
    """Context manager that records the frames' weights during one call of `generate`.

    Hooks on the T2V branches record the last token of each row; as a logits processor, the object learns when the
    next token is chosen. Calls in other threads are not recorded.
    """

    def __init__(self, model: Any) -> None:
        layers = model.model.language_model.layers
        indices = model.config.cross_attention_layer_indices if model.config.use_t2v else []
        if not indices:
            raise ValueError(
                "`output_cross_attentions` are T2V's, and this model has none: `use_t2v` is False or no layer has a "
                "cross-attention block. Leave it out."
            )
        self.language_model = model.model.language_model
        self.branches = [layers[index].cross_attention.t2v for index in indices]
        self.latest: dict[int, list[torch.Tensor]] = {}  # of the latest call, per layer, (H, F) of each row
        self.steps: list[list[torch.Tensor]] = []  # per new token, (layers, H, F) of each row

    def __enter__(self) -> "FrameWeights":
        self.thread = threading.get_ident()
        self.hooks = [branch.register_forward_hook(self._record) for branch in self.branches]
        self.hooks.append(self.language_model.register_forward_pre_hook(self._clear_latest))
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _clear_latest(self, language_model: nn.Module, inputs: tuple) -> None:
        """Hook: clears the weights of the previous call when a call begins."""
        if threading.get_ident() == self.thread:
            self.latest = {}

    def _record(self, branch: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Hook: records the weights of the last token of each row, in one layer."""
        if threading.get_ident() == self.thread:
            self.latest[branch.layer_idx] = last_token_weights(branch, *inputs)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Stores the weights of the token about to be chosen; returns `scores` unchanged."""
        layers = [self.latest[branch.layer_idx] for branch in self.branches if self.latest]
        num_heads = self.branches[0].num_heads
        nothing = torch.zeros(len(self.branches), num_heads, 0)
        self.steps.append(
            [torch.stack([layer[row].cpu() for layer in layers]) if layers else nothing for row in range(len(scores))]
        )
        return scores

    def add_to(
        self, output: GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput
    ) -> CrossLMMGenerateOutput | CrossLMMGenerateBeamOutput:
        """Adds `cross_attentions` to the output of `generate`."""
        if isinstance(output, GenerateBeamDecoderOnlyOutput):
            # Entry i of a sequence is the beam that wrote its token i, -1 after its end.
            beams = output.beam_indices.tolist()
            return CrossLMMGenerateBeamOutput(**output, cross_attentions=tuple(map(self._of_beams, beams)))
        rows = range(len(output.sequences))
        weights = tuple(self._of_beams([row] * len(self.steps)) for row in rows)
        return CrossLMMGenerateOutput(**output, cross_attentions=weights)

    def _of_beams(self, beams: list[int]) -> torch.Tensor:
        """Weights (layers, H, tokens, F) of a sequence; row beams[i] wrote token i, and these rows see F frames."""
        seen = self.steps[-1][max(beams)]
        recorded = [step[beam] if beam >= 0 else seen[..., :0] for step, beam in zip(self.steps, beams, strict=False)]
        # Zeros for a token without weights: the prompt ended with a placeholder, or the sequence ended before it.
        return torch.stack([one if one.shape[-1] else torch.zeros_like(seen) for one in recorded], dim=2)


def last_token_weights(
    branch: Any,
    normed: torch.Tensor,
    states: torch.Tensor | None,
    segments: Segments,
    memory: VisualMemory,
    cache_layer: VisualCacheLayer | None,
) -> list[torch.Tensor]:
    """Computes the weights (H, F) that the last token of each row gives to its frames, in a call of a T2V branch.

    The arguments are the branch's. A row without media has F = 0; a row that ends in padding has zeros.
    """
    num_rows, patches_per_frame = len(memory.rows), memory.patches_per_frame
    length = len(normed) // num_rows
    patches_seen = [span_length(tuple(medium.patches for medium in media)) for media in memory.rows]
    weights = [
        normed.new_zeros(branch.num_heads, count // patches_per_frame, dtype=torch.float32) for count in patches_seen
    ]
    if segments.is_placeholder:
        return weights
    queries = iter(segments.queries.tolist())
    for count, span in zip(segments.lengths, segments.spans, strict=True):
        last = [row for row in (next(queries) for _ in range(count)) if row % length == length - 1]
        if last:
            query = branch.split_heads(branch.q_proj(normed[last]))
            scores = _scores(branch, query, states, memory, cache_layer)
            per_patch = max(query[..., 0].numel(), branch.k_proj.in_features)
            frames = max(1, CHUNK_ELEMENTS // (patches_per_frame * per_patch))
            per_row = _sum_per_frame(scores, span, patches_per_frame, frames)
            for row, summed in zip(last, per_row, strict=True):
                weights[row // length] = summed
    return weights


def _scores(
    branch: Any,
    query: torch.Tensor,
    states: torch.Tensor | None,
    memory: VisualMemory,
    cache_layer: VisualCacheLayer | None,
) -> Callable[[int, int], torch.Tensor]:
    """Returns a function from patches [start, end) to the scores (R, H, patches) of `query` (R, H, E), in float32 or
    better. Keys are cached, projected here, or, in form "features", folded into the query."""
    precise = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(precise).unflatten(1, (branch.num_key_value_heads, -1)) * branch.scaling

    def patches(start: int, end: int) -> torch.Tensor:
        assert states is not None  # there are no cached keys in these two cases
        return memory.tokens(states, start, end)

    if cache_layer is not None and memory.form == "features":
        key_weight = memory.folding[branch.layer_idx].key
        folded = torch.einsum("qgre,ged->qgrd", grouped, key_weight.to(precise)).flatten(1, 2)
        return lambda start, end: folded @ patches(start, end).to(precise).T

    def scores(start: int, end: int) -> torch.Tensor:
        if cache_layer is None or cache_layer.cross_keys is None:
            keys = branch.split_heads(branch.k_proj(patches(start, end)))
        else:
            keys = cache_layer.cross_keys[start:end].to(query.device)
        return torch.einsum("qgre,pge->qgrp", grouped, keys.to(precise)).flatten(1, 2)

    return scores


def _sum_per_frame(
    scores: Callable[[int, int], torch.Tensor], span: Span, patches_per_frame: int, frames_at_once: int
) -> torch.Tensor:
    """Computes the softmax over all patches of a span, summed per frame: (R, H, F)."""
    step = frames_at_once * patches_per_frame
    parts = [
        scores(at, min(at + step, end)).unflatten(-1, (-1, patches_per_frame)).logsumexp(-1)
        for start, end in span
        for at in range(start, end, step)
    ]
    return torch.cat(parts, dim=-1).softmax(-1)


__all__ = ["CrossLMMGenerateBeamOutput", "CrossLMMGenerateOutput", "FrameWeights"]
