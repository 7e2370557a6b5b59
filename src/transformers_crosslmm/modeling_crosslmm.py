"""CrossLMM network: a vision encoder, token merge, projector, and a language model that reads the original tokens.

The path of a video, and of one decode step, through this file:

    CrossLMMForConditionalGeneration.forward      head and loss
      CrossLMMModel.forward
        check_inputs                              (inputs) input validation, once
        encode_media -> encode                    pixels -> original tokens X and projected pooled tokens
        remember                                  media and their positions -> VisualMemory, in the cache if given
        memory.pooled.fill                        (cache) pooled tokens -> their placeholders
        _visual_context                           which tokens attend to which patches
        language_model                            Transformers' own decoder, layer by layer:
          CrossAttentionLayer.forward             self-attention, then cross_attention, then MLP
            CrossLMMCrossAttention                V2V for pooled tokens, T2V for text
              CrossLMMCrossAttentionBranch        (attention) packed, piece by piece, or folded

`generate` does the first three steps before Transformers' loop begins (generation); a decode step starts at
`_visual_context`.

Shapes: B rows, L language tokens (pooled visual + text), F frames of all media, N = g x g patches per frame,
        P = F x N patches, D vision width, s x s pooled tokens per frame, C language width, Q packed queries,
        H query heads, G key/value heads, E head width.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.amp import is_autocast_available
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple

from .attention_crosslmm import Segments
from .cache_crosslmm import (
    PooledTokens,
    VisualMemory,
    attach_visual_memory,
    cached_length,
    check_cache,
    memory_in,
)
from .configuration_crosslmm import POOLING_MODES, CrossLMMConfig
from .cross_attention_crosslmm import CrossLMMGate, VisualContext, add_cross_attention, check_head
from .dialect_crosslmm import cache_argument, cache_of, takes_a_cache
from .generation_crosslmm import CrossLMMGenerationMixin
from .inputs_crosslmm import NewMedia, check_adapters, check_inputs, check_pixels, frames_per_video
from .media_crosslmm import (
    CrossLMMEncodedMedia,
    EncodedMedia,
    frame_index,
    locate_media,
    media_index,
    number_placeholders,
)
from .quantization_crosslmm import leave_vision_unquantized
from .ranks_crosslmm import black_frame_memory, is_sharded, must_run_every_module, run_encoder_equally_often
from .vision_crosslmm import (
    CrossLMMMultiModalProjector,
    TokenNorm,
    build_vision_tower,
    concat_parts,
    encode_frames,
    frame_codes,
    normalised_tokens,
    split_by_medium,
    upload,
)

if TYPE_CHECKING:
    # Not used here. For a checkpoint with its own code, `save_pretrained` copies the files that this one imports, and
    # the config names the pipeline.
    from .pipeline_crosslmm import VideoTextToTextPipeline  # noqa: F401


@dataclass
class CrossLMMModelOutputWithPast(BaseModelOutputWithPast):
    """image_hidden_states, video_hidden_states: the projected pooled tokens (tokens, C) of this call's media.

    router_logits: per layer with experts (tokens, experts), if `output_router_logits` asks for them.
    """

    image_hidden_states: torch.FloatTensor | None = None
    video_hidden_states: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class CrossLMMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As of the model without a head.

    aux_loss: with labels and `router_logits`, the loss that balances experts; `loss` contains it, weighted.
    """

    image_hidden_states: torch.FloatTensor | None = None
    video_hidden_states: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None


class CrossLMMPreTrainedModel(PreTrainedModel):
    config: CrossLMMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values", "visual_context", "visual_memory"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Full names, because these are patterns: "gate" would also match every `gate_proj`.
    _keep_in_fp32_modules_strict = ["cross_attention.v2v.gate", "cross_attention.t2v.gate"]

    @classmethod
    def from_pretrained(cls, *args, quantization_config=None, **kwargs):
        """Loads as in Transformers; a quantisation skips the modules in `NOT_QUANTIZED`."""
        return super().from_pretrained(
            *args, quantization_config=leave_vision_unquantized(quantization_config), **kwargs
        )

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """Saves as in Transformers. A head that is untied by the config is written even if it shares its tensor with
        the embeddings. Raises ValueError, before anything is written, for weights that do not fit the config and so
        could not be loaded."""
        if is_main_process:
            self._check_that_it_will_load(self.state_dict() if state_dict is None else state_dict)
        head, embeddings = self.get_output_embeddings(), self.get_input_embeddings()
        is_shared = head is not None and head.weight is embeddings.weight and not head.weight.is_meta
        if is_shared and not self.config.tie_word_embeddings:
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            state_dict["lm_head.weight"] = state_dict["lm_head.weight"].clone()
        return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def _check_that_it_will_load(self, state_dict: dict[str, torch.Tensor]) -> None:
        if getattr(self, "_hf_peft_config_loaded", False) or getattr(self, "hf_quantizer", None) or is_sharded(self):
            return  # adapters, packed weights and shards have writers of their own
        with torch.device("meta"):
            wanted = {
                name: tuple(value.shape) for name, value in type(self)(copy.deepcopy(self.config)).state_dict().items()
            }
        if self.config.tie_word_embeddings:
            wanted.pop("lm_head.weight", None)
        found = {name: tuple(value.shape) for name, value in state_dict.items()}
        wrong = sorted(name for name in wanted if found.get(name) != wanted[name])
        spare = sorted(found.keys() - wanted.keys() - {"lm_head.weight"})
        if wrong or spare:
            lines = [f"{name}: {found.get(name)} instead of {wanted[name]}" for name in wrong[:3]]
            lines += [f"{name}: not in a model of this config" for name in spare[:3]]
            raise ValueError(
                f"A checkpoint must hold the weights that its config describes, or it cannot be loaded; {len(wrong)} "
                f"differ and {len(spare)} are too many: {'; '.join(lines)}. Make the config match the model, "
                "merge adapters (`merge_and_unload`), or resize with `resize_token_embeddings`."
            )

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialises as in Transformers, and then gates that no checkpoint filled: the language model that contains
        them does not initialise them."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, CrossLMMGate):
                init.constant_(module.weight, self.config.gate_init)


class CrossLMMModel(CrossLMMPreTrainedModel):
    """Encoder, token merge, projector and language model, without a head."""

    def __init__(self, config: CrossLMMConfig):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = CrossLMMMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        add_cross_attention(self.language_model, config)
        self.post_init()
        if self._tp_plan:  # the language model has one
            projections = "language_model.layers.*.cross_attention.{}.{}_proj"
            for branch in ("v2v", "t2v"):
                for name in "qkvo":
                    self._tp_plan[projections.format(branch, name)] = "rowwise" if name == "o" else "colwise"

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def pool(self, original: torch.Tensor) -> torch.Tensor:
        """Merges the tokens of each frame: (F, N, D) to (F, s x s, D), row by row."""
        grid, pooled_grid = self.config.patch_grid_size, self.config.pooled_grid_size
        maps = original.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        return POOLINGS[self.config.pooling_mode](maps, pooled_grid).flatten(2).transpose(1, 2)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_num_frames: torch.Tensor | None = None,
        video_frame_index: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encodes videos: `last_hidden_state` is V of Eq. 1, (F, N, D); `pooler_output` is a tuple of projected pooled
        tokens, one (frames x s x s, C) per video.

        pixel_values_videos: (F, 3, S, S), the concatenated frames of all videos.
        video_num_frames: (videos,), frames of each; None if all belong to one video.
        video_frame_index: (all frames,), the index into F of each frame, if unchanged frames were left out.
        Raises ValueError for pixels that are not finite frames of the encoder's size, or counts that do not add up.
        """
        check_pixels("pixel_values_videos", pixel_values_videos, self.config.vision_config)
        frames = frames_per_video(pixel_values_videos, video_num_frames, video_frame_index)
        return self.encode(pixel_values_videos, frames, video_frame_index, **kwargs)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encodes images (images, 3, S, S), each as a video of one frame; see `get_video_features`."""
        check_pixels("pixel_values", pixel_values, self.config.vision_config)
        return self.encode(pixel_values, [1] * len(pixel_values), **kwargs)

    def encode(
        self, pixels: torch.Tensor, frames: list[int], frame_index: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Computes original and projected pooled tokens of checked pixels (F, 3, S, S), `frames` of each medium.

        frame_index: the index into F of each frame; None if each has its own pixels.

        Works in chunks, so that neither activations nor pixels on the encoder's device grow with the video. Each chunk
        is projected at once, so that ranks with different media run encoder and projector in one order.
        """
        tower, recorded, pooled = self.vision_tower, [], []

        def encoded() -> Iterator[torch.Tensor]:
            for chunk in pixels.split(self.config.vision_chunk_size):
                chunk = chunk.to(tower.dtype)  # before the upload: half the bytes
                if tower.device.type != "meta":  # with offloaded weights, accelerate moves the input
                    chunk = upload(chunk, tower.device)
                output = encode_frames(tower, chunk, **kwargs)
                recorded.append((output.hidden_states, output.attentions))
                pooled.append(self.multi_modal_projector(self.pool(output.last_hidden_state)))
                yield output.last_hidden_state

        original = concat_parts(encoded(), len(pixels))
        hidden_states, attentions = (
            tuple(torch.cat(layer) for layer in zip(*chunks, strict=True)) if chunks[0] is not None else None
            for chunks in zip(*recorded, strict=True)
        )
        tokens = torch.cat(pooled)
        output = BaseModelOutputWithPooling(
            last_hidden_state=original, hidden_states=hidden_states, attentions=attentions
        )
        if frame_index is not None:
            output = CrossLMMEncodedMedia(**output, frame_index=tuple(frame_index.tolist()))
            tokens = tokens[frame_index.to(tokens.device)]
        output.pooler_output = split_by_medium(tokens, frames)
        return output

    def encode_media(self, new: NewMedia, *, project_anew: bool = False) -> EncodedMedia:
        """Encodes the media of a call, with pooled tokens of this model. For media that are already encoded, these are
        computed again if they have another width or with `project_anew` (for a draft model, which gets the main
        model's media)."""
        blocks = (layer.cross_attention for layer in self.language_model.layers if layer.cross_attention is not None)
        parts = (self.vision_tower, self.multi_modal_projector, *blocks)
        check_adapters(module for part in parts for module in part.modules())
        media = {
            modality: self.encode(pixels, new.frames[modality], new.frame_index if modality == "video" else None)
            for modality, pixels in new.pixels.items()
        }
        width = self.config.text_config.hidden_size
        for modality, output in new.encoded.items():
            if project_anew or output.pooler_output[0].shape[-1] != width:
                index = media_index(output)
                lengths = dict(zip(index, (len(tokens) for tokens in output.pooler_output), strict=True))
                order = sorted(lengths)
                frames = [lengths[medium] // self.config.tokens_per_frame for medium in order]
                original = output.last_hidden_state.to(self.device, self.dtype)
                chunks = original.split(self.config.vision_chunk_size)
                pooled = (self.multi_modal_projector(self.pool(chunk)) for chunk in chunks)
                tokens = concat_parts(pooled, len(original))
                shown = frame_index(output)
                tokens = split_by_medium(tokens if shown is None else tokens[list(shown)], frames)
                output = replace(output, pooler_output=tuple(tokens[order.index(medium)] for medium in index))
            media[modality] = output
        return media

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Masks (B, L) of the placeholders of each modality, found by id or, without ids, by embedding."""
        token_ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        if input_ids is not None:
            return {modality: input_ids == token_id for modality, token_id in token_ids.items()}
        ids = torch.tensor(list(token_ids.values()), device=inputs_embeds.device)
        embedded = self.get_input_embeddings()(ids)
        return {modality: (inputs_embeds == embedded[i]).all(-1) for i, modality in enumerate(token_ids)}

    @takes_a_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        video_frame_index: torch.Tensor | None = None,
        mm_encoder_outputs: EncodedMedia | None = None,
        cross_attention_cache: str | None = None,
        use_cache: bool | None = None,
        visual_memory: VisualMemory | None = None,
        **kwargs,
    ) -> CrossLMMModelOutputWithPast:
        """Runs the model on text and the media whose placeholders it contains.

        pixel_values (images, 3, S, S), pixel_values_videos (F, 3, S, S), video_num_frames (videos,),
            video_frame_index (all frames,): new media, in the order of their placeholders.
        mm_encoder_outputs: media already encoded, instead of pixels: {"video": get_video_features(...), "image": ...}.
        cross_attention_cache: "kv" or "features"; None for the form of the cache or, without media in it, the config.
        visual_memory: the media that `generate` has encoded; only without a cache.
        Raises ValueError, before the encoder runs, if placeholders and media do not match, if the sequence is longer
        than the context, and for invalid pixels.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if "write_index" in kwargs:  # continuous batching: texts of several requests in one row, one cache for all
            outputs = self.language_model(
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=self.get_input_embeddings()(input_ids),
                use_cache=False,
                cache=cache,
                **kwargs,
            )
            return CrossLMMModelOutputWithPast(last_hidden_state=outputs.last_hidden_state)
        if cache is not None:
            check_cache(cache, self.config.text_config.num_hidden_layers)
        past_length = cached_length(cache, 1 if given is None else given.shape[1])
        new, memory = NewMedia(), visual_memory or memory_in(cache)
        if visual_memory is None:
            new = check_inputs(
                self.config,
                self.get_placeholder_mask,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                cache=cache,
                past_length=past_length,
                pixel_values=pixel_values,
                pixel_values_videos=pixel_values_videos,
                video_num_frames=video_num_frames,
                video_frame_index=video_frame_index,
                mm_encoder_outputs=mm_encoder_outputs,
                cross_attention_cache=cross_attention_cache,
                position_ids=position_ids,
                attention_mask=attention_mask,
            )
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not (self.training and self.is_checkpointed)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        media: EncodedMedia = {}
        if cache is None and is_sharded(self):
            inputs_embeds = run_encoder_equally_often(self, inputs_embeds, list(map(len, new.pixels.values())))
        if new:
            media = self.encode_media(new)
            # Filling a new cache would use sharded weights in another order than on ranks without media.
            if use_cache and cache is None and not is_sharded(self):
                cache = DynamicCache(config=self.config.text_config)
            memory = self.remember(media, new, past_length, memory)
            if cache is not None:
                memory = self.attach(memory, cache)
        elif memory is None and cache is None and must_run_every_module(self):
            inputs_embeds, memory = black_frame_memory(self, inputs_embeds)

        context = None
        if memory is not None:
            context = self._visual_context(memory, past_length, inputs_embeds, attention_mask)
            if memory.pooled is not None:
                inputs_embeds = memory.pooled.fill(inputs_embeds, int(past_length))
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            visual_context=context,
            **cache_argument(cache),
            **kwargs,
        )
        if memory is not None and cache is not None and (memory.pooled is not None or memory.states is not None):
            memory.end_call(past_length + inputs_embeds.shape[1])
        return CrossLMMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=torch.cat(list(media["image"].pooler_output)) if "image" in media else None,
            video_hidden_states=torch.cat(list(media["video"].pooler_output)) if "video" in media else None,
            router_logits=getattr(outputs, "router_logits", None),
            **cache_argument(cache_of(outputs)),
        )

    @property
    def is_checkpointed(self) -> bool:
        """Whether the layers of the language model recompute their activations in the backward pass."""
        return any(layer.gradient_checkpointing for layer in self.language_model.layers[:1])

    @torch.compiler.disable
    def remember(
        self, media: EncodedMedia, new: NewMedia, past_length: int | torch.Tensor, known: VisualMemory | None
    ) -> VisualMemory:
        """Creates the memory of encoded media in the tokens from `past_length` on; it will be appended to `known`, the
        cache's memory, if there is one."""
        rows, original, frame_numbers, shown = locate_media(
            media, new.masks, int(past_length), tokens_per_frame=self.config.tokens_per_frame
        )
        has_form = known is not None and known.states is not None
        is_lazy = known.norm is not None if has_form else not torch.is_grad_enabled()
        if shown is not None and torch.equal(shown, torch.arange(len(original))):  # no frame was left out
            shown = None
        if shown is not None and not is_lazy and self.config.visual_norm != "none":
            original, shown = original[shown], None  # equal frames have different codes
        states, norm = self.normalise(original, frame_numbers, is_lazy=is_lazy)
        pooled = [tokens for output in media.values() for tokens in output.pooler_output]
        return VisualMemory(
            form=new.form,
            patches_per_frame=original.shape[1],
            tokens_per_frame=self.config.tokens_per_frame,
            rows=rows,
            states=states,
            norm=norm,
            frame_index=shown,
            num_patches=len(frame_numbers) * original.shape[1],
            pooled=PooledTokens(
                tokens=concat_parts(iter(pooled), sum(map(len, pooled))),
                numbers=number_placeholders(new.masks, media),
                start=int(past_length),
                is_in_order=len(media) == 1,
            ),
        )

    def attach(self, memory: VisualMemory, cache: Cache) -> VisualMemory:
        """Appends a memory to the media in a cache and returns the cache's memory."""
        layers = self.config.cross_attention_layer_indices
        return attach_visual_memory(cache, memory, layers, self.config.text_config.num_hidden_layers)

    def normalise(
        self, original: torch.Tensor, frame_numbers: torch.Tensor, *, is_lazy: bool
    ) -> tuple[torch.Tensor, TokenNorm | None]:
        """Turns original tokens (F, N, D) into the inputs of K and V (P, D): normalised and with frame codes if the
        config says so. If `is_lazy`, returns unchanged tokens and the normalisation still to be applied."""
        original, device = original.to(self.language_model.dtype), original.device.type
        if torch.is_grad_enabled() and is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Cast once: otherwise each projection would cast the tokens and keep a copy for the backward pass.
            original = original.to(torch.get_autocast_dtype(device))
        if self.config.visual_norm == "none":
            return original.flatten(0, 1), None
        codes = frame_codes(frame_numbers, original.shape[-1], visual_time=self.config.visual_time)
        codes = codes.to(original.device, torch.promote_types(original.dtype, torch.float32))
        if is_lazy:
            return original.flatten(0, 1), TokenNorm.of(original, codes)
        is_checkpointed = self.training and self.is_checkpointed
        return normalised_tokens(original, codes, is_checkpointed=is_checkpointed).flatten(0, 1), None

    def _visual_context(
        self,
        memory: VisualMemory,
        past_length: int | torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
    ) -> VisualContext:
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        if memory.is_placeholder:
            placeholder = Segments.placeholder(memory.num_patches, device)
            return VisualContext(memory, placeholder, placeholder)
        if length > 1:
            memory.segments_after_media(1, device)  # cached before a compiled decode step reads them
        if memory.pooled is None:
            return VisualContext(memory, None, memory.segments_after_media(length, device))
        scope, start = self.config.v2v_scope, int(past_length)
        v2v = memory.v2v_segments(start, length, scope, device)
        t2v = memory.t2v_segments(start, length, scope, tokens_of_mask(attention_mask, start, length), device)
        if must_run_every_module(self):
            v2v = v2v or Segments.placeholder(memory.num_patches, device)
            t2v = t2v or Segments.placeholder(memory.num_patches, device)
        return VisualContext(memory, v2v, t2v)


POOLINGS = dict(
    zip(
        POOLING_MODES,
        (partial(F.interpolate, mode="bilinear", align_corners=False), F.adaptive_avg_pool2d),
        strict=True,
    )
)
"""By `pooling_mode`: maps (F, D, g, g) and s to (F, D, s, s)."""


def tokens_of_mask(attention_mask: torch.Tensor | dict | None, start: int, length: int) -> torch.Tensor | None:
    """Which positions [start, start + length) are tokens and not padding, (B, length), on the CPU; None if all are.

    In a mask in the layers' form (B, 1, L, columns), for instance with a static cache, padding is a position that does
    not attend to itself; a dict has one mask per kind of layer. With a sliding window, the columns begin later than
    the sequence and end with these positions.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if not isinstance(attention_mask, torch.Tensor):
        return None
    if attention_mask.ndim == 2:
        return attention_mask[:, -length:].bool().cpu()
    start = min(start, attention_mask.shape[-1] - length)
    own = attention_mask[:, 0].diagonal(start, dim1=1, dim2=2)[:, :length]
    return (own if own.dtype == torch.bool else own >= 0).cpu()


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Selects the positions (B, L, C) whose logits are wanted, by `logits_to_keep`: a number of last positions (0 for
    all), indices for all rows (n,) or for each row (B, n), or a mask (B, L), for which the result is flat (n, C)."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)


class CrossLMMForConditionalGeneration(CrossLMMPreTrainedModel, CrossLMMGenerationMixin):
    """CrossLMM with its language-model head, for questions about videos and images."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: CrossLMMConfig):
        super().__init__(config)
        self.model = CrossLMMModel(config)
        check_head(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # A generated placeholder would have no medium.
        self.generation_config.suppress_tokens = [config.image_token_id, config.video_token_id]

    # The name of Qwen2's, Llama's and Mistral's embeddings; `get_input_embeddings` also finds others.
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_num_frames=None, video_frame_index=None, **kwargs
    ):
        """See `CrossLMMModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_num_frames, video_frame_index, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        """See `CrossLMMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @takes_a_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_num_frames: torch.Tensor | None = None,
        video_frame_index: torch.Tensor | None = None,
        mm_encoder_outputs: EncodedMedia | None = None,
        cross_attention_cache: str | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CrossLMMCausalLMOutputWithPast:
        """Computes logits and, if `labels` (B, L; -100 at positions without loss) are given, the loss; see
        `CrossLMMModel.forward` for the other arguments."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            video_num_frames=video_num_frames,
            video_frame_index=video_frame_index,
            mm_encoder_outputs=mm_encoder_outputs,
            cross_attention_cache=cross_attention_cache,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))
        loss = aux_loss = None
        if labels is not None:
            text = self.config.text_config
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size, **kwargs)
            if outputs.router_logits is not None:
                experts = text.num_experts, text.num_experts_per_tok
                aux_loss = load_balancing_loss_func(outputs.router_logits, *experts, attention_mask)
                loss = loss + text.router_aux_loss_coef * aux_loss
        return CrossLMMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
            router_logits=outputs.router_logits,
            aux_loss=aux_loss,
            **cache_argument(cache_of(outputs)),
        )


# A Trainer looks up the class name here to know that it must shift labels for label smoothing; also of remote code.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["crosslmm"] = CrossLMMForConditionalGeneration.__name__

__all__ = ["CrossLMMForConditionalGeneration", "CrossLMMModel", "CrossLMMPreTrainedModel"]
