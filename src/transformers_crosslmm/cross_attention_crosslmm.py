"""Dual cross-attention: the block, its two branches, and their insertion into the layers of any language model.

Shapes: B rows, L language tokens (pooled visual + text), P patches of all media, D vision width, C language width,
        Q packed queries, H query heads, G key/value heads, E head width.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as memoize
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from .attention_crosslmm import (
    CHUNK_BYTES,
    Folding,
    Segments,
    attention_piece_by_piece,
    folded_attention,
    packed_attention,
    span_length,
)
from .cache_crosslmm import VisualCacheLayer, VisualMemory, visual_layer
from .configuration_crosslmm import CrossLMMConfig
from .dialect_crosslmm import CACHE, passes_keywords_on
from .vision_crosslmm import concat_parts


@dataclass(frozen=True)
class VisualContext:
    """Inputs of the cross-attention in one forward call.

    v2v, t2v: which tokens attend to which patches; None if none do.
    memory: the patches; with a cache, the memory that generation keeps.
    """

    memory: VisualMemory
    v2v: Segments | None
    t2v: Segments | None


class CrossLMMGate(nn.Module):
    """One learnable scalar; tanh keeps it within [-1, 1] (Eq. 7, Figure 3)."""

    def __init__(self, initial_value: float = 0.0):
        super().__init__()
        # In float32, even if the other weights are not.
        self.weight = nn.Parameter(torch.full((1,), initial_value, dtype=torch.float32))

    def forward(self, update: torch.Tensor) -> torch.Tensor:
        return update * torch.tanh(self.weight.float()).to(update.dtype)


class CrossLMMCrossAttentionBranch(nn.Module):
    """V2V or T2V: queries from the language stream, keys and values from the original visual tokens (Eq. 5-10)."""

    is_causal = False  # otherwise SDPA would be causal, because there is no mask
    num_key_value_groups = 1  # `packed_attention` folds grouped query heads into rows

    def __init__(self, config: CrossLMMConfig, layer_idx: int):
        super().__init__()
        text_config, vision_width = config.text_config, config.vision_config.hidden_size
        self.config = text_config  # gives the attention implementation
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = getattr(text_config, "attention_dropout", 0.0)
        width, key_width = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(text_config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(vision_width, key_width, bias=False)
        self.v_proj = nn.Linear(vision_width, key_width, bias=False)
        self.o_proj = nn.Linear(width, text_config.hidden_size, bias=False)
        self.gate = CrossLMMGate(config.gate_init)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projects tokens (P, D) to keys and values, (P, G, E) each."""
        return self.split_heads(self.k_proj(states)), self.split_heads(self.v_proj(states))

    def forward(
        self,
        normed: torch.Tensor,
        states: torch.Tensor | None,
        segments: Segments,
        memory: VisualMemory,
        cache_layer: VisualCacheLayer | None,
    ) -> torch.Tensor:
        """Computes the update (Q, C) of the rows `segments.queries`.

        normed (B x L, C), states (patches from `memory.first_patch` on, D). cache_layer: given to T2V in generation,
        after `keep_for_decoding`.
        """
        query = self.split_heads(self.q_proj(normed[segments.queries]))  # (Q, H, E)
        if cache_layer is None or (memory.form == "features" and self.projecting_is_cheaper(segments)):
            attended = self.attend(query, states, segments, memory)
        elif memory.form == "kv":
            attended = packed_attention(self.attention(), self, query, *cache_layer.read_cross(query.device), segments)
        else:
            attended = folded_attention(
                query,
                partial(memory.stored_pieces, states),
                memory.folding[self.layer_idx],
                self.scaling,
                segments,
                patches_per_frame=memory.patches_per_frame,
            )
        return self.gate(self.o_proj(attended.flatten(1)))

    def attention(self) -> Callable:
        """The implementation that the config names."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

    def attend(
        self, query: torch.Tensor, states: torch.Tensor, segments: Segments, memory: VisualMemory
    ) -> torch.Tensor:
        """Computes attention over patches whose keys and values are projected for this call: all at once, or some
        frames at a time if they are large and no gradient is needed."""

        def keys_values(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self.keys_values(memory.tokens(states, start, end))

        def dates(start: int, end: int) -> tuple[torch.Tensor, ...]:
            return tuple(tokens - tokens[:1] for tokens in self.keys_values(memory.codes(states, start, end)))

        first, last = segments.patch_range()
        width = 2 * self.k_proj.out_features + (0 if memory.norm is None else states.shape[-1])
        at_once = memory.whole_frames(CHUNK_BYTES // (width * states.element_size()))
        runs = memory.runs()
        if not torch.is_grad_enabled() and (runs or at_once < last - first or segments.is_nested):
            return attention_piece_by_piece(
                keys_values,
                query,
                self.scaling,
                segments,
                patches_at_once=at_once,
                runs=runs,
                dates=dates,
                patches_per_frame=memory.patches_per_frame,
            )
        ((*_, clipped),) = segments.pieces(last - first)
        return packed_attention(self.attention(), self, query, *keys_values(first, last), clipped)

    def projecting_is_cheaper(self, segments: Segments) -> bool:
        """Whether projecting the patches costs less than folding, whose scores sum over D instead of E."""
        first, last = segments.patch_range()
        pairs = sum(length * span_length(span) for length, span in zip(segments.lengths, segments.spans, strict=True))
        return pairs * self.num_heads > 2 * (last - first) * self.k_proj.out_features

    def keep_for_decoding(
        self, states: torch.Tensor | None, memory: VisualMemory, cache_layer: VisualCacheLayer
    ) -> None:
        """Precomputes what decoding needs for new media; must run before `states` is dropped.

        Form "kv": keys and values, projected some frames at a time. "features": the folded projections.
        """
        if memory.form == "features":
            if self.layer_idx not in memory.folding:
                memory.folding[self.layer_idx] = Folding.of(self.keys_values, states)
            norm = () if memory.norm is None else (memory.norm.scale, memory.norm.codes)
            index = () if memory.frame_index is None else (memory.index_on(states.device),)
            cache_layer.mark_static(states, *memory.folding[self.layer_idx].tensors(), *norm, *index)
            return
        known, last = cache_layer.num_cross_patches, memory.num_patches
        if known == last:
            return
        step = last - known
        if memory.norm is not None:  # otherwise all normalised tokens would be in memory at once
            step = memory.whole_frames(CHUNK_BYTES // (states.shape[-1] * states.element_size()))
        ranges = [(start, min(start + step, last)) for start in range(known, last, step)]
        parts = (torch.stack(self.keys_values(memory.tokens(states, *both)), dim=1) for both in ranges)
        if len(ranges) == 1:
            cache_layer.append_cross(*self.keys_values(memory.tokens(states, known, last)))
        else:
            cache_layer.append_cross(*concat_parts(parts, last - known).unbind(1))


class CrossLMMCrossAttention(nn.Module):
    """The dual cross-attention block: V2V for pooled visual tokens and T2V for all other tokens, in parallel."""

    def __init__(self, config: CrossLMMConfig, layer_idx: int, input_layernorm: nn.Module):
        super().__init__()
        self.layer_idx = layer_idx
        self.input_layernorm = input_layernorm
        self.v2v = CrossLMMCrossAttentionBranch(config, layer_idx) if config.use_v2v else None
        self.t2v = CrossLMMCrossAttentionBranch(config, layer_idx) if config.use_t2v else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        visual_states: torch.Tensor | None,
        context: VisualContext,
        cache_layer: VisualCacheLayer | None,
    ) -> torch.Tensor:
        """Adds each branch's update to its tokens (B, L, C); tokens without patches to attend to do not change."""
        rows = hidden_states.flatten(0, 1)
        normed = self.input_layernorm(rows)
        if cache_layer is not None and self.t2v is not None:
            self.t2v.keep_for_decoding(visual_states, context.memory, cache_layer)
        for branch, segments, kept in ((self.v2v, context.v2v, None), (self.t2v, context.t2v, cache_layer)):
            if branch is None or segments is None:
                continue
            segments = segments.to(rows.device)
            update = branch(normed, visual_states, segments, context.memory, kept)
            if segments.is_placeholder:
                update = update * 0.0
            rows = rows.index_add(0, segments.queries, update.to(rows.dtype))
        return rows.view_as(hidden_states)


class CrossAttentionLayer:
    """Mixin for a language model's layer class: runs the dual cross-attention between self-attention and MLP.

    cross_attention: the block, or None. Without a visual context the layer runs its original forward.
    """

    cross_attention: CrossLMMCrossAttention | None

    def __call__(self, hidden_states: torch.Tensor, *args, visual_context: VisualContext | None = None, **kwargs):
        if visual_context is not None and self.training and self.gradient_checkpointing:
            # Reentrant checkpointing computes gradients for positional arguments only.
            args = (visual_context.memory.states, *args)
        return super().__call__(hidden_states, *args, visual_context=visual_context, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        visual_states: torch.Tensor | None = None,
        *,
        visual_context: VisualContext | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if visual_context is None or self.cross_attention is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended  # (Eq. 4)
        states = visual_states  # given if gradients must reach it
        if states is None:
            states = visual_context.memory.states_on(hidden_states.device)
        cache_layer = visual_layer(kwargs.get(CACHE), self.cross_attention.layer_idx)
        hidden_states = self.cross_attention(hidden_states, states, visual_context, cache_layer)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def __reduce_ex__(self, protocol: int) -> Any:
        """Pickles the original class, because pickle cannot find a class made at run time by its name."""
        return _new_layer, (type(self).__bases__[1],), self.__dict__


@memoize
def cross_attention_class(layer_class: type) -> type:
    """Creates the subclass of a layer class that accepts a visual context."""
    return type(f"CrossLMM{layer_class.__name__}", (CrossAttentionLayer, layer_class), {"__module__": __name__})


def _new_layer(layer_class: type) -> nn.Module:
    subclass = cross_attention_class(layer_class)
    return subclass.__new__(subclass)


def add_cross_attention(language_model: PreTrainedModel, config: CrossLMMConfig) -> None:
    """Adds the dual cross-attention block to the configured layers of a language model; its other code is unchanged.

    Raises ValueError, which names the missing part, if the model's layers do not fit.
    """
    check_layers(language_model)
    for layer_idx, layer in enumerate(language_model.layers):
        layer_class = type(layer)
        layer.__class__ = cross_attention_class(layer_class)
        layer.cross_attention = None
        if layer_idx in config.cross_attention_layer_indices:
            norm = copy.deepcopy(layer.input_layernorm)
            layer.cross_attention = CrossLMMCrossAttention(config, layer_idx, norm)
    built = {type(module).__name__ for module in language_model.modules()}
    layers = {type(layer).__name__ for layer in language_model.layers}
    language_model._no_split_modules = (set(language_model._no_split_modules) | layers) & built  # FSDP needs each


def check_layers(language_model: PreTrainedModel) -> None:
    """Raises ValueError unless every layer computes h = h + self_attn(input_layernorm(h)) and then
    h = h + mlp(post_attention_layernorm(h)), and receives the model's keyword arguments.

    Each layer's own forward runs with stand-ins for its parts, because a layer with these four parts can still scale
    or reorder their outputs, or add to them.
    """
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    name, layers = type(language_model).__name__, getattr(language_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not passes_keywords_on(type(language_model).forward):
        raise ValueError(
            f"`text_config` must describe a decoder with `layers` that get its forward's keyword arguments; a {name} "
            "has none. Use a model such as Qwen2, Qwen3, Llama or Mistral."
        )
    for layer in layers:
        layer_class = type(layer).__name__
        missing = [part for part in parts if not isinstance(getattr(layer, part, None), nn.Module)]
        if missing:
            raise ValueError(
                f"`text_config` must describe a decoder whose layers have {', '.join(parts)}; a {layer_class} has no "
                f"{', '.join(missing)}. Use a model such as Qwen2, Qwen3, Llama or Mistral."
            )
        factors = dict(zip(parts, (2.0, 3.0, 5.0, 7.0), strict=True))
        if (found := _output_with_stand_ins(layer, factors)) != (1 + 2 * 3) * (1 + 5 * 7):
            others = [
                name for name, part in layer.named_children() if not (name in parts or isinstance(part, nn.Identity))
            ]
            reason = f"has {', '.join(others)} too" if others else f"computes something else ({found})"
            raise ValueError(
                "`text_config` must describe a decoder whose layers add self_attn(input_layernorm(h)) and then "
                f"mlp(post_attention_layernorm(h)) to h; a {layer_class} {reason}. Use a model such as Qwen2, Qwen3, "
                "Llama or Mistral."
            )
    if lost := _keywords_lost(language_model):
        raise ValueError(
            "`text_config` must describe a decoder whose layers get its forward's keyword arguments; those of a "
            f"{name} do not get {', '.join(sorted(lost))}. Use a model such as Qwen2, Qwen3, Llama or Mistral."
        )


def check_head(text_config: PreTrainedConfig) -> None:
    """Raises ValueError unless the text model's own head multiplies hidden states by a matrix and does nothing else
    (no bias, scale or cap)."""
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
    if causal_class is None:
        return
    states = MoeModelOutputWithPast(last_hidden_state=torch.full((1, 1, 1), 100.0, device="cpu"))
    twin = _without_parts(causal_class, {"config": text_config})
    twin.lm_head = nn.Identity()
    setattr(twin, causal_class.base_model_prefix, _Returns(states))
    without_loss = {"output_router_logits": False} if hasattr(text_config, "output_router_logits") else {}
    try:
        found = f"{twin(inputs_embeds=states.last_hidden_state, **without_loss).logits.item():g}"
    except Exception as error:  # any error means that this forward does more
        found = f"{type(error).__name__}: {error}"
    if found != "100" or getattr(text_config, "lm_head_bias", False):
        reason = "adds a bias" if found == "100" else f"turns 100 into {found}"
        raise ValueError(
            f"`text_config` must describe a language model whose head is one matrix; that of {causal_class.__name__} "
            f"{reason}. Use a model such as Qwen2, Qwen3, Llama or Mistral."
        )


class _Times(nn.Module):
    """Stand-in for a part of a layer: multiplies its input, and returns a tuple if the part does."""

    def __init__(self, factor: float, returns_weights: bool):
        super().__init__()
        self.factor, self.returns_weights = factor, returns_weights

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> Any:
        product = hidden_states * self.factor
        return (product, None) if self.returns_weights else product


class _Returns(nn.Module):
    """Stand-in for a model: returns a fixed output."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *args, **kwargs) -> Any:
        return self.output


@torch.no_grad()
def _keywords_lost(language_model: PreTrainedModel) -> set[str]:
    """The keyword arguments of the cross-attention that do not reach the first layer when the model's own forward runs
    up to it. Empty if another error stops the forward earlier (it may read values that a meta tensor lacks)."""
    lost: set[str] = set()

    def look(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        lost.update({CACHE, "visual_context"} - kwargs.keys())
        raise StopIteration

    hook = language_model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    embeds = torch.zeros(1, 1, language_model.config.hidden_size, device=language_model.device)
    mask = embeds.new_ones(1, 1, 1, 1)  # in the layers' form, so that the model creates none
    with hook, suppress(Exception):
        language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, visual_context=None)
    return lost


def _without_parts(module_class: type, attributes: dict[str, Any]) -> nn.Module:
    """Creates a module of a class with these attributes, without parameters and submodules."""
    twin: nn.Module = nn.Module.__new__(module_class)
    nn.Module.__init__(twin)
    twin.__dict__.update(attributes)
    return twin.eval()


@torch.no_grad()
def _output_with_stand_ins(layer: nn.Module, factors: dict[str, float]) -> float | str:
    """The output of a layer's forward for 1 when each part multiplies by its factor and any other part by 11; the
    error's text if the forward fails."""
    twin = _without_parts(type(layer), {name: value for name, value in vars(layer).items() if name[0] != "_"})
    for name, part in layer.named_children():
        is_plain = isinstance(part, nn.Identity)
        setattr(twin, name, part if is_plain else _Times(factors.get(name, 11.0), returns_weights=name == "self_attn"))
    try:
        output = twin.eval()(torch.ones(1, 1, 1, device="cpu"))
        output = output[0] if isinstance(output, tuple) else output
        return output.item()
    except Exception as error:  # any error means that this forward does not fit
        return f"{type(error).__name__}: {error}"


__all__ = ["CrossLMMCrossAttention", "CrossLMMCrossAttentionBranch", "CrossLMMGate", "VisualContext"]
