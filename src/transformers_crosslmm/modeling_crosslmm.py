"""CrossLMM network: SigLIP, token merge, projector, and a Qwen2 whose layers look back at the original tokens.

Shapes: B rows, L language tokens (pooled visual + text), F frames of all media, N = g x g patches per frame,
        P = F x N patches, D vision width, s x s pooled tokens per frame, C language width, Q packed queries,
        H query heads, G key/value heads, E head width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.amp import is_autocast_available
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2Model
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from .attention_crosslmm import (
    CHUNK_BYTES,
    Segments,
    attention_piece_by_piece,
    folded_attention,
    packed_attention,
    span_length,
)
from .cache_crosslmm import (
    VisualCacheLayer,
    VisualMemory,
    attach_visual_memory,
    cached_length,
    check_cache,
    visual_layer,
    visual_memory,
)
from .configuration_crosslmm import CrossLMMConfig, CrossLMMTextConfig
from .generation_crosslmm import CrossLMMGenerationMixin
from .inputs_crosslmm import check_inputs, check_pixels, frames_per_video
from .media_crosslmm import locate_media, media_index
from .quantization_crosslmm import leave_vision_unquantized
from .vision_crosslmm import (
    CrossLMMMultiModalProjector,
    CrossLMMVisionTower,
    TokenNorm,
    frame_codes,
    joined,
    normalised_tokens,
    per_medium,
)

if TYPE_CHECKING:
    # Not used. Where a checkpoint brings its code, Transformers copies what the model's file names when it is saved
    # again, and its config names the pipeline.
    from .pipeline_crosslmm import VideoTextToTextPipeline  # noqa: F401


@dataclass
class CrossLMMModelOutputWithPast(BaseModelOutputWithPast):
    """image_hidden_states, video_hidden_states: the projected pooled tokens (tokens, C) of this call's media."""

    image_hidden_states: torch.FloatTensor | None = None
    video_hidden_states: torch.FloatTensor | None = None


@dataclass
class CrossLMMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """image_hidden_states, video_hidden_states: the projected pooled tokens (tokens, C) of this call's media."""

    image_hidden_states: torch.FloatTensor | None = None
    video_hidden_states: torch.FloatTensor | None = None


@dataclass(frozen=True)
class VisualContext:
    """What the cross-attention of one forward call needs, the patches themselves apart.

    v2v, t2v: which tokens look at which patches.
    memory: the patches' bookkeeping, and, with a cache, the home of what generation keeps.
    """

    memory: VisualMemory
    v2v: Segments | None
    t2v: Segments | None


class CrossLMMGate(nn.Module):
    """One learnable scalar; tanh keeps it within [-1, 1] (Eq. 7, Figure 3)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float32))  # whatever the dtype of the rest

    def forward(self, update: torch.Tensor) -> torch.Tensor:
        return update * torch.tanh(self.weight.float()).to(update.dtype)


class CrossLMMCrossAttentionBranch(nn.Module):
    """V2V or T2V: queries from the language stream, keys and values from the original visual tokens (Eq. 5-10)."""

    is_causal = False  # SDPA takes a missing mask for a causal one otherwise
    num_key_value_groups = 1  # `packed_attention` has laid the heads that share a key head one below the other

    def __init__(self, config: CrossLMMTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.cross_attention_hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.cross_attention_hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.gate = CrossLMMGate()

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, D) to two of (P, G, E)."""
        return self.split_heads(self.k_proj(states)), self.split_heads(self.v_proj(states))

    def forward(
        self,
        normed: torch.Tensor,
        states: torch.Tensor | None,
        segments: Segments,
        memory: VisualMemory,
        cache_layer: VisualCacheLayer | None,
    ) -> torch.Tensor:
        """Update of the rows `segments.queries`: (Q, C).

        normed (B x L, C), states (patches from `memory.first_patch` on, D). `cache_layer` is given to T2V when
        generation keeps what it sees; `keep` has filled it.
        """
        query = self.split_heads(self.q_proj(normed[segments.queries]))  # (Q, H, E)
        if cache_layer is None or (memory.form == "features" and self.projecting_is_cheaper(segments)):
            attended = self.attend(query, states, segments, memory)
        elif memory.form == "kv":
            attended = packed_attention(self.attention(), self, query, *cache_layer.read_cross(query.device), segments)
        else:
            norm = None if memory.norm is None else memory.norm.to(query.device)
            attended = folded_attention(query, states, *memory.folding[self.layer_idx], self.scaling, segments, norm)
        return self.gate(self.o_proj(attended.flatten(1)))

    def attention(self) -> Callable:
        """The implementation that the config names."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

    def attend(
        self, query: torch.Tensor, states: torch.Tensor, segments: Segments, memory: VisualMemory
    ) -> torch.Tensor:
        """Attention over patches whose keys and values are made for the purpose: all at once, or, when these would be
        many and no gradient needs them, for some frames at a time."""

        def keys_values(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self.keys_values(memory.tokens(states, start, end))

        first, last = segments.reach()
        width = 2 * self.k_proj.out_features + (0 if memory.norm is None else states.shape[-1])
        at_once = memory.whole_frames(CHUNK_BYTES // (width * states.element_size()))
        if not torch.is_grad_enabled() and at_once < last - first:
            return attention_piece_by_piece(keys_values, query, self.scaling, segments, patches_at_once=at_once)
        key, value = keys_values(first, last)
        return packed_attention(self.attention(), self, query, key, value, segments.between(first, last))

    def projecting_is_cheaper(self, segments: Segments) -> bool:
        """Whether projecting the patches costs less than folding: folded scores run over D instead of E."""
        first, last = segments.reach()
        looks = sum(length * span_length(span) for length, span in zip(segments.lengths, segments.spans, strict=True))
        return looks * self.config.num_attention_heads > 2 * (last - first) * self.k_proj.out_features

    def keep(self, states: torch.Tensor | None, memory: VisualMemory, cache_layer: VisualCacheLayer) -> None:
        """Makes what decoding needs of media that are new: once, and at once, for when `states` is gone nobody can.

        Form "kv": keys and values. "features": the projections as (G, E, D) and (G, D, E), which no step has to turn
        round, by asking the modules for the identity's: an adapter, a quantised weight or an offloaded one answers for
        itself.
        """
        known = cache_layer.num_cross_patches
        if memory.form == "kv" and known < memory.num_patches:
            cache_layer.append_cross(*self.keys_values(memory.tokens(states, known, memory.num_patches)))
        elif memory.form == "features" and self.layer_idx not in memory.folding:
            identity = torch.eye(states.shape[-1], dtype=states.dtype, device=states.device)
            key, value = self.keys_values(identity)  # (D, G, E)
            memory.folding[self.layer_idx] = key.permute(1, 2, 0).contiguous(), value.permute(1, 0, 2).contiguous()
        if memory.form == "features":
            norm = () if memory.norm is None else (memory.norm.scale, memory.norm.codes)
            cache_layer.stay(states, *memory.folding[self.layer_idx], *norm)


class CrossLMMCrossAttention(nn.Module):
    """The dual cross-attention block: V2V for pooled visual tokens, T2V for all other tokens, side by side."""

    def __init__(self, config: CrossLMMTextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.use_v2v:
            self.v2v = CrossLMMCrossAttentionBranch(config, layer_idx)
        if config.use_t2v:
            self.t2v = CrossLMMCrossAttentionBranch(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        visual_states: torch.Tensor | None,
        context: VisualContext,
        cache_layer: VisualCacheLayer | None,
    ) -> torch.Tensor:
        """(B, L, C) to (B, L, C); tokens that see nothing pass untouched."""
        rows = hidden_states.flatten(0, 1)
        normed = self.input_layernorm(rows)
        if visual_states is not None:
            visual_states = visual_states.to(rows.device)
        if cache_layer is not None and "t2v" in self._modules:
            self.t2v.keep(visual_states, context.memory, cache_layer)
        for name, kept in (("v2v", None), ("t2v", cache_layer)):
            segments: Segments | None = getattr(context, name)
            if segments is None or name not in self._modules:
                continue
            segments = segments.to(rows.device)
            update = self._modules[name](normed, visual_states, segments, context.memory, kept)
            if segments.is_dummy:
                update = update * 0.0
            rows = rows.index_add(0, segments.queries, update.to(rows.dtype))
        return rows.view_as(hidden_states)


class CrossLMMDecoderLayer(Qwen2DecoderLayer):
    """Qwen2's layer, with the dual cross-attention between self-attention and MLP where the config puts one."""

    def __init__(self, config: CrossLMMTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if layer_idx in config.cross_attention_layer_indices and (config.use_v2v or config.use_t2v):
            self.cross_attention = CrossLMMCrossAttention(config, layer_idx)

    def __call__(self, hidden_states: torch.Tensor, *args, visual_states: torch.Tensor | None = None, **kwargs):
        # Positional, because reentrant checkpointing follows gradients through positional arguments only.
        return super().__call__(hidden_states, visual_states, *args, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        visual_states: torch.Tensor | None = None,
        visual_context: VisualContext | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), past_key_values=past_key_values, **kwargs)
        hidden_states = hidden_states + attended  # (Eq. 4)
        if visual_context is not None and "cross_attention" in self._modules:
            cache_layer = visual_layer(past_key_values, self.self_attn.layer_idx)
            hidden_states = self.cross_attention(hidden_states, visual_states, visual_context, cache_layer)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class CrossLMMPreTrainedModel(PreTrainedModel):
    config: CrossLMMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrossLMMDecoderLayer", "SiglipEncoderLayer", "CrossLMMVisionEmbeddings"]
    _skip_keys_device_placement = ["past_key_values", "visual_states", "visual_context"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Full names: these are searched as patterns, and "gate" would also match every `gate_proj`.
    _keep_in_fp32_modules_strict = ["cross_attention.v2v.gate", "cross_attention.t2v.gate"]

    @classmethod
    def from_pretrained(cls, *args, quantization_config=None, **kwargs):
        """Transformers' own; what a quantisation leaves as it is stands in `NOT_QUANTIZED`."""
        return super().from_pretrained(
            *args, quantization_config=leave_vision_unquantized(quantization_config), **kwargs
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CrossLMMGate):
            init.constant_(module.weight, self.config.get_text_config().gate_init)


class CrossLMMTextModel(CrossLMMPreTrainedModel, Qwen2Model):
    """Qwen2 with dual cross-attention layers. Without visual context it is plain Qwen2."""

    config: CrossLMMTextConfig
    input_modalities = ("text",)
    _no_split_modules = ["CrossLMMDecoderLayer"]
    _can_record_outputs = {"hidden_states": CrossLMMDecoderLayer, "attentions": Qwen2Attention}

    def __init__(self, config: CrossLMMTextConfig):
        # Qwen2Model's own __init__ would build plain layers first.
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(CrossLMMDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.post_init()


class CrossLMMModel(CrossLMMPreTrainedModel):
    """Encoder, token merge, projector and language model, without a head."""

    def __init__(self, config: CrossLMMConfig):
        super().__init__(config)
        self.vision_tower = CrossLMMVisionTower._from_config(config.vision_config, num_blocks=config.num_vision_blocks)
        self.multi_modal_projector = CrossLMMMultiModalProjector(config)
        self.language_model = CrossLMMTextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def pool(self, original: torch.Tensor) -> torch.Tensor:
        """Token merge: (F, N, D) to (F, s x s, D), row by row."""
        grid, pooled_grid = self.config.patch_grid_size, self.config.pooled_grid_size
        maps = original.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        if self.config.pooling_mode == "average":
            maps = F.adaptive_avg_pool2d(maps, pooled_grid)
        else:
            maps = F.interpolate(maps, size=(pooled_grid, pooled_grid), mode="bilinear", align_corners=False)
        return maps.flatten(2).transpose(1, 2)

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_num_frames: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encodes videos: `last_hidden_state` is V of Eq. 1, (F, N, D); `pooler_output` a tuple of projected pooled
        tokens, one (frames x s x s, C) per video.

        pixel_values_videos: (F, 3, S, S), the frames of all videos one after the other.
        video_num_frames: (videos,), frames of each; None when all belong to one video.
        Raises ValueError for pixels that are not finite frames of the encoder's size, or counts that do not add up.
        """
        check_pixels("pixel_values_videos", pixel_values_videos, self.config.vision_config)
        return self._encode(pixel_values_videos, frames_per_video(pixel_values_videos, video_num_frames), **kwargs)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encodes images (images, 3, S, S), each as a video of one frame; see `get_video_features`."""
        check_pixels("pixel_values", pixel_values, self.config.vision_config)
        return self._encode(pixel_values, [1] * len(pixel_values), **kwargs)

    def _encode(self, pixels: torch.Tensor, frames: list[int], **kwargs) -> BaseModelOutputWithPooling:
        """Chunk by chunk, so that neither activations nor the pixels on the encoder's device grow with the video; each
        is projected at once, so that ranks whose media differ use encoder and projector in one order."""
        tower, recorded, pooled = self.vision_tower, [], []

        def encoded() -> Iterator[torch.Tensor]:
            for chunk in pixels.split(self.config.vision_chunk_size):
                if tower.device.type != "meta":  # offloaded weights fetch their input themselves
                    chunk = chunk.to(tower.device)
                output = tower(chunk.to(tower.dtype), **kwargs)
                recorded.append((output.hidden_states, output.attentions))
                pooled.append(self.multi_modal_projector(self.pool(output.last_hidden_state)))
                yield output.last_hidden_state

        original = joined(encoded(), len(pixels))
        hidden_states, attentions = (
            tuple(torch.cat(layer) for layer in zip(*chunks, strict=True)) if chunks[0] is not None else None
            for chunks in zip(*recorded, strict=True)
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=original,
            pooler_output=per_medium(torch.cat(pooled), frames),
            hidden_states=hidden_states,
            attentions=attentions,
        )

    def _project(self, original: torch.Tensor, frames: list[int]) -> tuple[torch.Tensor, ...]:
        chunks = original.split(self.config.vision_chunk_size)
        tokens = joined((self.multi_modal_projector(self.pool(chunk)) for chunk in chunks), len(original))
        return per_medium(tokens, frames)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Where the placeholders of each modality stand, (B, L); by embedding when there are no ids."""
        token_ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        if input_ids is not None:
            return {modality: input_ids == token_id for modality, token_id in token_ids.items()}
        ids = torch.tensor(list(token_ids.values()), device=inputs_embeds.device)
        embedded = self.get_input_embeddings()(ids)
        return {modality: (inputs_embeds == embedded[i]).all(-1) for i, modality in enumerate(token_ids)}

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cross_attention_cache: str | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> CrossLMMModelOutputWithPast:
        """Runs text with the media whose placeholders it holds.

        pixel_values (images, 3, S, S), pixel_values_videos (F, 3, S, S), video_num_frames (videos,): new media, in
            the order of their placeholders.
        mm_encoder_outputs: the same media already encoded: {"video": get_video_features(...), "image": ...}.
        cross_attention_cache: "kv" or "features"; None for the config's, or for what the cache already holds.
        Raises ValueError when placeholders and media do not match, when the sequence is longer than the context, and
        for bad pixels, before the encoder runs.
        """
        if past_key_values is not None:
            check_cache(past_key_values, self.config.text_config.num_hidden_layers)
        tokens_given = input_ids if inputs_embeds is None else inputs_embeds
        past_length = cached_length(past_key_values, 1 if tokens_given is None else tokens_given.shape[1])
        media, masks, form = check_inputs(
            self.config,
            self.get_placeholder_mask,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            past_length=past_length,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            video_num_frames=video_num_frames,
            mm_encoder_outputs=mm_encoder_outputs,
            cross_attention_cache=cross_attention_cache,
            position_ids=position_ids,
            attention_mask=attention_mask,
        )
        text_config = self.config.text_config
        use_cache = text_config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not (self.language_model.gradient_checkpointing and self.training)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        if past_key_values is None and self._is_sharded():
            inputs_embeds = self._keep_in_step(inputs_embeds, pixel_values, pixel_values_videos)
        if pixel_values is not None:
            media["image"] = self.get_image_features(pixel_values, return_dict=True)
        if pixel_values_videos is not None:
            media["video"] = self.get_video_features(pixel_values_videos, video_num_frames, return_dict=True)
        media = self.own_pooled_tokens(media)
        tokens: dict[str, torch.Tensor] = {}
        for modality, output in media.items():
            tokens[modality] = torch.cat(list(output.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(masks[modality][..., None], tokens[modality])

        memory = visual_memory(past_key_values, text_config.cross_attention_layer_indices)
        is_new = any(output.last_hidden_state is not None for output in media.values())
        if is_new:
            if past_key_values is None and self._is_sharded():
                use_cache = False  # filling one would use the weights in another order than ranks without media do
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=text_config)
            memory = self.remember(media, masks, past_key_values, past_length, form)
        states, context = None, None
        if memory is not None:
            states = memory.states
            context = self._visual_context(memory, past_length, inputs_embeds, attention_mask, is_new)
        elif past_key_values is None and self._ranks_must_agree():
            inputs_embeds, states, context = self._dummy_pass(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            visual_states=states,
            visual_context=context,
            **kwargs,
        )
        if memory is not None and past_key_values is not None:
            memory.drop_states()
        return CrossLMMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=tokens.get("image"),
            video_hidden_states=tokens.get("video"),
        )

    def own_pooled_tokens(
        self, media: dict[str, BaseModelOutputWithPooling], *, anew: bool = False
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Media with pooled tokens of this model: projected from the original tokens when those that came have another
        width, or `anew` in any case, as for a draft that gets what the main model encoded."""
        own = {}
        for modality, output in media.items():
            if anew or output.pooler_output[0].shape[-1] != self.config.text_config.hidden_size:
                index = media_index(output)
                lengths = dict(zip(index, (len(tokens) for tokens in output.pooler_output), strict=True))
                order = sorted(lengths)
                frames = [lengths[medium] // self.config.tokens_per_frame for medium in order]
                pooled = self._project(output.last_hidden_state.to(self.device, self.dtype), frames)
                output = replace(output, pooler_output=tuple(pooled[order.index(medium)] for medium in index))
            own[modality] = output
        return own

    @torch.compiler.disable
    def remember(
        self,
        media: dict[str, BaseModelOutputWithPooling],
        masks: dict[str, torch.Tensor],
        cache: Cache | None,
        past_length: int | torch.Tensor,
        form: str,
    ) -> VisualMemory:
        """Enters media into the memory of the cache, or, without one, into a memory of this call alone."""
        text_config = self.config.text_config
        rows, original, frame_numbers = locate_media(
            media, masks, int(past_length), tokens_per_frame=self.config.tokens_per_frame
        )
        memory = visual_memory(cache, text_config.cross_attention_layer_indices)
        if memory is None:
            memory = VisualMemory(
                form=form,
                patches_per_frame=original.shape[1],
                tokens_per_frame=self.config.tokens_per_frame,
                rows=[[] for _ in rows],
            )
            if cache is not None:
                layers = text_config.cross_attention_layer_indices
                attach_visual_memory(cache, memory, layers, text_config.num_hidden_layers)
        is_lazy = not torch.is_grad_enabled() if memory.states is None else memory.norm is not None
        memory.append(rows, *self._visual_states(original, frame_numbers, is_lazy=is_lazy))
        return memory

    def _visual_states(
        self, original: torch.Tensor, frame_numbers: torch.Tensor, *, is_lazy: bool
    ) -> tuple[torch.Tensor, TokenNorm | None]:
        """What K and V are made of, (P, D): the original tokens (F, N, D), normalised and dated if the config says so.
        When `is_lazy`, they are as they came, and what does that comes with them."""
        text_config = self.config.text_config
        original, device = original.to(self.language_model.dtype), original.device.type
        if torch.is_grad_enabled() and is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Once: each projection would cast them for itself, and keep its copy for the backward pass.
            original = original.to(torch.get_autocast_dtype(device))
        if text_config.visual_norm == "none":
            return original.flatten(0, 1), None
        codes = frame_codes(frame_numbers, original.shape[-1], visual_time=text_config.visual_time)
        codes = codes.to(original.device, torch.promote_types(original.dtype, torch.float32))
        if is_lazy:
            return original.flatten(0, 1), TokenNorm.of(original, codes)
        is_checkpointed = self.training and self.language_model.gradient_checkpointing
        return normalised_tokens(original, codes, is_checkpointed=is_checkpointed).flatten(0, 1), None

    def _visual_context(
        self,
        memory: VisualMemory,
        past_length: int | torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        has_new_media: bool,
    ) -> VisualContext:
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        if length > 1:
            memory.segments_after_media(1, device)  # now, so that a compiled step finds them and changes nothing
        if not has_new_media and not memory.prefilling:
            return VisualContext(memory, None, memory.segments_after_media(length, device))
        is_token = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            is_token = attention_mask[:, -length:].bool().cpu()
        v2v = memory.v2v_segments(int(past_length), length, self.config.text_config.v2v_scope, device)
        t2v = memory.t2v_segments(int(past_length), length, is_token, device)
        if self._ranks_must_agree():
            v2v = v2v or Segments.dummy(memory.num_patches, device)
            t2v = t2v or Segments.dummy(memory.num_patches, device)
        return VisualContext(memory, v2v, t2v)

    def _ranks_must_agree(self) -> bool:
        """Whether a batch without media must still run every module: gradients and sharded weights are collective."""
        return self.training or self._is_sharded()

    def _is_sharded(self) -> bool:
        """Whether ranks gather weights from each other as they go; `fully_shard` may have wrapped parts alone."""
        if not dist.is_initialized():  # nearly always; asking every module takes milliseconds
            return False
        is_fsdp = is_fsdp_managed_module(self) or any(isinstance(module, FSDPModule) for module in self.modules())
        return is_fsdp or is_deepspeed_zero3_enabled()

    @torch.compiler.disable
    def _keep_in_step(self, inputs_embeds: torch.Tensor, *pixels: torch.Tensor | None) -> torch.Tensor:
        """Encodes black frames, with weight zero, until this rank has used encoder and projector as often as the one
        with most frames: weights that are sharded are gathered by all ranks at once, at every use."""
        own = max(1, sum(-(-len(frames) // self.config.vision_chunk_size) for frames in pixels if frames is not None))
        most = torch.tensor(own, device=inputs_embeds.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        for _ in range(int(most) - own):
            (idle,) = self._encode(self._black_frame(inputs_embeds.device), [1]).pooler_output
            inputs_embeds = inputs_embeds + 0.0 * idle.sum().to(inputs_embeds.dtype)
        return inputs_embeds

    def _black_frame(self, device: torch.device) -> torch.Tensor:
        size, channels = self.config.vision_config.image_size, self.config.vision_config.num_channels
        return torch.zeros(1, channels, size, size, dtype=self.vision_tower.dtype, device=device)

    def _dummy_pass(self, inputs_embeds: torch.Tensor):
        """One black frame through encoder, projector and cross-attention, with weight zero."""
        output = self._encode(self._black_frame(inputs_embeds.device), [1])
        inputs_embeds = inputs_embeds + 0.0 * output.pooler_output[0].sum().to(inputs_embeds.dtype)
        states, _ = self._visual_states(output.last_hidden_state, torch.zeros(1), is_lazy=False)
        memory = VisualMemory("kv", len(states), self.config.tokens_per_frame, rows=[], num_patches=len(states))
        nobody = Segments.dummy(len(states), inputs_embeds.device)
        return inputs_embeds, states, VisualContext(memory, nobody, nobody)


class CrossLMMForConditionalGeneration(CrossLMMPreTrainedModel, CrossLMMGenerationMixin):
    """CrossLMM with its language-model head: answers questions about videos and images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: CrossLMMConfig):
        super().__init__(config)
        self.model = CrossLMMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # What the model writes is text; a placeholder among it would stand for nothing.
        self.generation_config.suppress_tokens = [config.image_token_id, config.video_token_id]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_video_features(self, pixel_values_videos: torch.Tensor, video_num_frames=None, **kwargs):
        """See `CrossLMMModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_num_frames, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        """See `CrossLMMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cross_attention_cache: str | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CrossLMMCausalLMOutputWithPast:
        """Logits, and the loss when `labels` (B, L; -100 where nothing is to be learned) are given; see
        `CrossLMMModel.forward` for the rest."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            video_num_frames=video_num_frames,
            mm_encoder_outputs=mm_encoder_outputs,
            cross_attention_cache=cross_attention_cache,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return CrossLMMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
        )


__all__ = [
    "CrossLMMForConditionalGeneration",
    "CrossLMMModel",
    "CrossLMMPreTrainedModel",
    "CrossLMMTextModel",
]
