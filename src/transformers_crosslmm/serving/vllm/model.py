"""CrossLMM for vLLM: the package's encoder and cross-attention around vLLM's own language model.

    embed_multimodal        pixels -> rows of placeholders: pooled token, integers, patches
    embed_input_ids         puts pooled tokens into the text, and keeps the rows for the step
    forward
      VisualCache.begin_step                    rows -> slots of vLLM's cache; segments of the step's tokens
      language_model                            vLLM's, layer by layer: self-attention, the cross-attention (before the
        CrossAttention.before_norm              norm after self-attention), MLP

Shapes: T tokens of a step, F frames, C language width, D vision width, R requests, q tokens of each, H query heads,
        G key/value heads, E head width.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.library import Library
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import direct_register_custom_op

from ...attention_crosslmm import Folding
from ...configuration_crosslmm import CrossLMMConfig
from ...cross_attention_crosslmm import CrossLMMCrossAttentionBranch
from ...modeling_crosslmm import CrossLMMModel, CrossLMMPreTrainedModel
from ...vision_crosslmm import (
    CrossLMMMultiModalProjector,
    build_vision_tower,
    frame_codes,
    normalised_tokens,
    to_float32,
)
from .processing import CrossLMMDummyInputs, CrossLMMMultiModalProcessor, CrossLMMProcessingInfo
from .rules import CROSS_ATTENTION_OP
from .visual_cache import PagedSlots, RowLayout, VisualCache


class VisionPart(CrossLMMModel):
    """The encoder and projector of the package's model."""

    def __init__(self, config: CrossLMMConfig) -> None:
        CrossLMMPreTrainedModel.__init__(self, config)
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = CrossLMMMultiModalProjector(config)

    def rows(self, pixels: torch.Tensor, frames: list[int], layout: RowLayout) -> list[torch.Tensor]:
        """Encodes pixels (F, 3, S, S) to the rows of each medium. frames: frames of each medium."""
        encoded = self.encode(pixels, frames)
        assert encoded.pooler_output is not None
        assert encoded.last_hidden_state is not None
        rows = []
        for pooled, original in zip(encoded.pooler_output, encoded.last_hidden_state.split(frames), strict=True):
            if self.config.visual_norm != "none":
                numbers = torch.arange(len(original))
                codes = frame_codes(numbers, original.shape[-1], visual_time=self.config.visual_time)
                original = normalised_tokens(original, codes.to(to_float32(original[:0])))
            rows.append(layout.rows(pooled, original))
        return rows


class ParallelBranch(CrossLMMCrossAttentionBranch):
    """The package's cross-attention branch with the heads of one tensor-parallel rank."""

    def __init__(self, config: CrossLMMConfig, layer_idx: int, prefix: str) -> None:
        super().__init__(config, layer_idx)
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        width, all_heads, all_groups = config.text_config.hidden_size, self.num_heads, self.num_key_value_heads
        queries = all_heads * self.head_dim
        self.q_proj = ColumnParallelLinear(width, queries, bias=False, return_bias=False, prefix=f"{prefix}.q_proj")
        self.o_proj = RowParallelLinear(queries, width, bias=False, return_bias=False, prefix=f"{prefix}.o_proj")
        self.num_heads = all_heads // ranks
        self.num_key_value_heads = max(1, all_groups // ranks)  # with more ranks than groups, ranks share a group
        first = rank * all_groups // ranks * self.head_dim
        own = slice(first, first + self.num_key_value_heads * self.head_dim)
        for name in ("k_proj", "v_proj"):
            projection = nn.Linear(config.vision_config.hidden_size, own.stop - own.start, bias=False)
            projection.weight.weight_loader = lambda weight, whole: weight.data.copy_(whole[own])  # type: ignore[attr-defined]
            setattr(self, name, projection)

    def attention(self) -> Callable:
        return ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend_paged(self, normed: torch.Tensor, paged: PagedSlots, folding: Folding) -> torch.Tensor:
        """The update of tokens `paged.rows` (R, q), flattened; 0 where `paged.is_query` is False."""
        query = self.split_heads(self.q_proj(normed[paged.rows.flatten()]))
        grouped = query.unflatten(1, (self.num_key_value_heads, -1))
        folded = torch.einsum("qgre,ged->qgrd", grouped, folding.key)
        by_request = folded.unflatten(0, paged.rows.shape).flatten(1, 3)  # (R, q x H, D)
        context = paged.attend(by_request, self.scaling).to(query.dtype).view(folded.shape)
        attended = torch.einsum("qgrd,gde->qgre", context, folding.value)
        return self.gate(self.o_proj(attended.flatten(1))) * paged.is_query.flatten()[:, None]


class CrossAttention(nn.Module):
    """The dual cross-attention of one layer, called through a custom operation, which torch.compile does not trace."""

    def __init__(self, config: CrossLMMConfig, layer_idx: int, cache: VisualCache, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.name = f"{cache.name}.cross_attention.{layer_idx}"
        self.input_layernorm = RMSNorm(config.text_config.hidden_size, eps=config.text_config.rms_norm_eps)
        self.v2v = ParallelBranch(config, layer_idx, f"{self.name}.v2v") if config.use_v2v else None
        self.t2v = ParallelBranch(config, layer_idx, f"{self.name}.t2v") if config.use_t2v else None
        self.visual_cache = [cache]  # in a list, so that it is not registered as a submodule of every layer
        vllm_config.compilation_config.static_forward_context[self.name] = self

    def before_norm(
        self, norm: nn.Module, arguments: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hook of the norm after self-attention, which vLLM calls with self-attention's output and the residual."""
        attended, residual = arguments
        return attended + torch.ops.crosslmm.cross_attention(attended + residual, self.name), residual

    def update(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The cross-attention's update of (T, C), of which the last rows may be padding."""
        update = torch.zeros_like(hidden_states)
        (cache,) = self.visual_cache
        if (step := cache.step) is None:
            return update
        normed = self.input_layernorm(hidden_states)
        if self.v2v is not None and (some := step.v2v):
            looked = self.v2v(normed, some.states, some.segments, some.memory, None)
            update.index_add_(0, some.segments.queries, looked.to(update.dtype))
        if self.t2v is None:
            return update
        if self.layer_idx not in cache.folding:
            basis = normed.new_empty(0, cache.layout.patch_width)
            cache.folding[self.layer_idx] = Folding.of(self.t2v.keys_values, basis)
        if some := step.t2v:
            looked = self.t2v(normed, some.states, some.segments, some.memory, cache)
            update.index_add_(0, some.segments.queries, looked.to(update.dtype))
        if paged := step.paged:
            looked = self.t2v.attend_paged(normed, paged, cache.folding[self.layer_idx])
            update.index_add_(0, paged.rows.flatten(), looked.to(update.dtype))
        return update


def cross_attention(hidden_states: torch.Tensor, name: str) -> torch.Tensor:
    return get_forward_context().no_compile_layers[name].update(hidden_states)


def _shape_of_cross_attention(hidden_states: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(hidden_states)


LIBRARY = Library(CROSS_ATTENTION_OP.partition("::")[0], "FRAGMENT")
direct_register_custom_op(
    op_name=CROSS_ATTENTION_OP.partition("::")[2],
    op_func=cross_attention,
    fake_impl=_shape_of_cross_attention,
    target_lib=LIBRARY,
)


@MULTIMODAL_REGISTRY.register_processor(
    CrossLMMMultiModalProcessor, info=CrossLMMProcessingInfo, dummy_inputs=CrossLMMDummyInputs
)
class CrossLMMForVllm(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: CrossLMMConfig = vllm_config.model_config.hf_config
        self.config = config
        with self._mark_tower_model(vllm_config, {"image", "video"}):  # type: ignore[operator]
            self.vision: VisionPart = VisionPart(config).to(vllm_config.model_config.dtype)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                hf_config=config.text_config,
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.text_config.model_type]],
            )
        # vLLM identifies a layer of its cache by the only number in its name.
        name = f"visual_cache.{config.text_config.num_hidden_layers}"
        self.visual_cache = VisualCache(config, vllm_config, name)
        for layer_idx in config.cross_attention_layer_indices:
            layer: Any = self.language_model.model.layers[layer_idx]
            block = CrossAttention(config, layer_idx, self.visual_cache, vllm_config)
            layer.cross_attention = block
            layer.post_attention_layernorm.register_forward_pre_hook(block.before_norm)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        return f"<|vision_start|><|{modality}_pad|><|vision_end|>"

    def embed_multimodal(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **kwargs: object,
    ) -> list[torch.Tensor]:
        """Encodes the media of one modality to rows, in order."""
        rows: list[torch.Tensor] = []
        if pixel_values_videos is not None and video_num_frames is not None:
            rows += self.vision.rows(pixel_values_videos, video_num_frames.flatten().tolist(), self.layout)
        if pixel_values is not None:
            rows += self.vision.rows(pixel_values, [1] * len(pixel_values), self.layout)
        return rows

    @property
    def layout(self) -> RowLayout:
        return self.visual_cache.layout

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        embeds = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings or is_multimodal is None:
            return embeds
        rows = list(multimodal_embeddings)
        self.visual_cache.take_media(rows, is_multimodal.cpu())
        pooled = torch.cat([some[:, : self.layout.pooled_width] for some in rows])
        return embeds.index_put((self.visual_cache.places.to(embeds.device),), pooled.to(embeds.dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        self.visual_cache.begin_step()
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits with placeholders masked out, because the model must not generate them."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            logits[:, [self.config.image_token_id, self.config.video_token_id]] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the package's tensors by name; vLLM's language model loads its own."""
        parameters = dict(self.named_parameters())
        ignored = [re.compile(pattern) for pattern in self.vision.vision_tower._keys_to_ignore_on_load_unexpected]
        loaded: set[str] = set()

        def of_language_model() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.startswith("model.language_model.") and ".cross_attention." not in name:
                    yield name.replace("model.language_model.", "model.", 1), tensor
                elif name.startswith("lm_head."):
                    yield name, tensor
                else:
                    own = name.removeprefix("model.")
                    own = own.replace("language_model.", "language_model.model.", 1)
                    own = own if own.startswith("language_model.") else f"vision.{own}"
                    if own not in parameters and any(pattern.search(name) for pattern in ignored):
                        continue
                    load = getattr(parameters[own], "weight_loader", default_weight_loader)
                    load(parameters[own], tensor)
                    loaded.add(own)

        loaded |= {f"language_model.{name}" for name in self.language_model.load_weights(of_language_model())}
        return loaded
