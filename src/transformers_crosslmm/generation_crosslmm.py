"""How media travel through `generate`: encoded once, shared by beams, known before a chunked prefill begins."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache_crosslmm import check_cache, visual_memory
from .frame_weights_crosslmm import FrameWeights
from .inputs_crosslmm import check_inputs, check_length
from .media_crosslmm import CrossLMMEncodedMedia, assign_rows, expand_media
from .vision_crosslmm import joined

logger = logging.get_logger(__name__)

PREFILL_TOKENS = 4096
"""Most tokens of a prompt with media that run at once, unless `prefill_chunk_size` says otherwise: activations, of
the MLP above all, then stop growing with the video."""


@dataclass(frozen=True)
class ChunkedMedia:
    """Pooled tokens that a prefill in chunks hands out chunk by chunk, so that they are never there twice.

    tokens: (n, C) of each modality. numbers: (B, L), which of them stands at a position, -1 where none does.
    start: the position of the first column.
    """

    tokens: dict[str, torch.Tensor]
    numbers: dict[str, torch.Tensor]
    start: int

    def chunk(self, position: int, length: int) -> dict[str, CrossLMMEncodedMedia]:
        """What `length` positions from `position` on show."""
        columns = slice(position - self.start, position - self.start + length)
        media = {}
        for modality, numbers in self.numbers.items():
            tokens, shown = self.tokens[modality], numbers[:, columns]
            if (shown := shown[shown >= 0]).numel():
                media[modality] = CrossLMMEncodedMedia(pooler_output=(tokens[shown.to(tokens.device)],))
        return media


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model as in evaluation for as long as the block runs."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class CrossLMMGenerationMixin(GenerationMixin):
    """`generate` for models whose tokens look back at encoded media."""

    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        *args,
        output_cross_attentions=False,
        **kwargs,
    ):
        """As in Transformers. With `output_cross_attentions=True` the output has `cross_attentions`, a tuple with, for
        each sequence, the T2V attention of every new token, summed per frame: (cross-attention layers, heads, new
        tokens, frames), frames of all media in their order. Nothing is compiled then.

        Raises ValueError with an assistant or prompt lookup, which check several tokens at once, without
        `return_dict_in_generate`, and for a model without T2V.
        """
        if (
            self.training and self.model.language_model.gradient_checkpointing
        ):  # its layers would keep nothing in any cache
            with evaluation_mode(self):
                return self.generate(
                    inputs,
                    generation_config,
                    logits_processor,
                    *args,
                    output_cross_attentions=output_cross_attentions,
                    **kwargs,
                )
        if not output_cross_attentions:
            return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)
        options = generation_config or self.generation_config
        if not kwargs.get("return_dict_in_generate", options.return_dict_in_generate):
            raise ValueError(
                "`output_cross_attentions` needs `return_dict_in_generate=True`: a tensor cannot hold them."
            )
        if kwargs.get("assistant_model") or kwargs.get("prompt_lookup_num_tokens", options.prompt_lookup_num_tokens):
            raise ValueError(
                "`output_cross_attentions` are recorded token by token; an assistant or prompt lookup checks several "
                "at once. Leave one of the two out."
            )
        kwargs["disable_compile"] = True
        with FrameWeights(self) as weights:
            processors = [*(logits_processor or []), weights]
            output = super().generate(inputs, generation_config, processors, *args, **kwargs)
        return weights.added_to(output)

    def generate_batch(self, inputs, *args, **kwargs):
        """As in Transformers, for texts alone. Raises ValueError where there are media, or places for them."""
        media = [name for name in ("pixel_values", "pixel_values_videos", "mm_encoder_outputs") if name in kwargs]
        placeholders = {self.config.image_token_id, self.config.video_token_id}
        media += [f"placeholders in `inputs[{i}]`" for i, ids in enumerate(inputs) if not placeholders.isdisjoint(ids)]
        if media:
            raise ValueError(
                f"`generate_batch` is for text alone; got {', '.join(media)}. Ask about images and videos with "
                "`generate`."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self, generation_config=None, *args, **kwargs):
        """As in Transformers. A placeholder is never sampled: its request would end all that run beside it."""
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        placeholders = self.config.image_token_id, self.config.video_token_id
        generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or ()), *placeholders})
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(model_kwargs)
        if model_kwargs.get("past_key_values") is not None:
            check_cache(model_kwargs["past_key_values"], self.config.text_config.num_hidden_layers)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        """Encodes the media, after a check of everything that can be wrong, and never in the caller's objects."""
        cache = model_kwargs.get("past_key_values")
        past_length = 0 if cache is None else int(cache.get_seq_length())
        if generation_config.is_assistant and past_length:
            # A draft is asked again and again with the media of its first call, which its cache has seen.
            model_kwargs.pop("mm_encoder_outputs", None)
            return model_kwargs
        is_ids = model_input_name == "input_ids"
        new_tokens = self._new_tokens(inputs_tensor, model_kwargs, generation_config, past_length, is_ids=is_ids)
        ids, embeds = (new_tokens, None) if is_ids else (None, new_tokens)
        media, masks, _ = check_inputs(
            self.config,
            self.model.get_placeholder_mask,
            input_ids=ids,
            inputs_embeds=embeds,
            past_key_values=cache,
            past_length=past_length,
            pixel_values=model_kwargs.get("pixel_values"),
            pixel_values_videos=model_kwargs.get("pixel_values_videos"),
            video_num_frames=model_kwargs.get("video_num_frames"),
            mm_encoder_outputs=model_kwargs.get("mm_encoder_outputs"),
            cross_attention_cache=model_kwargs.get("cross_attention_cache"),
            num_rows=len(new_tokens) * max(generation_config.num_beams, generation_config.num_return_sequences),
        )
        if not new_tokens.shape[1]:
            raise ValueError(
                f"`past_key_values` has seen {past_length} tokens, and the {inputs_tensor.shape[1]} given hold none "
                "behind them. Give the whole sequence, or the new tokens alone with an `attention_mask` that covers "
                "the cached ones too."
            )
        if not masks:
            self._check_that_no_medium_is_missing(ids, embeds)
        self._check_room(generation_config, inputs_tensor.shape[1], past_length + new_tokens.shape[1], cache)
        if generation_config.prefill_chunk_size is not None and (not is_ids or not generation_config.use_cache):
            raise ValueError(
                "Chunked prefill works from `input_ids` and with a cache; got "
                f"{'`use_cache=False`' if is_ids else '`inputs_embeds`'}. Leave `prefill_chunk_size` out."
            )
        model_kwargs["mm_encoder_outputs"] = dict(media)
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        model_kwargs["mm_encoder_outputs"] = assign_rows(model_kwargs["mm_encoder_outputs"], masks)
        return model_kwargs

    @staticmethod
    def _new_tokens(
        tokens: torch.Tensor,
        model_kwargs: dict[str, Any],
        generation_config: GenerationConfig,
        past_length: int,
        *,
        is_ids: bool = True,
    ) -> torch.Tensor:
        """The tokens that the cache has not seen. Ids may be the whole sequence or, when the attention mask is longer,
        the new part alone; embeddings are always the whole."""
        mask = model_kwargs.get("attention_mask")
        # `generate` drops a mask without padding and leaves its length.
        length = vars(generation_config).get("_mask_length") if mask is None else mask.shape[1]
        is_whole = not is_ids or length == tokens.shape[1]
        return tokens[:, past_length:] if is_whole else tokens

    def _check_that_no_medium_is_missing(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None):
        """Refuses placeholders of a later turn that come without their media. The first new token is spared: it may
        be what the model wrote last, and what it writes is text."""
        masks = self.model.get_placeholder_mask(input_ids, inputs_embeds)
        for modality, mask in masks.items():
            if count := int(mask[:, 1:].sum()):
                raise ValueError(
                    f"Placeholders and {modality} features must match: the new tokens hold {count} {modality} "
                    "placeholders, and no new media came with them. Give the pixels, or `mm_encoder_outputs`, of "
                    "every medium that the cache has not seen."
                )

    def _check_room(
        self, generation_config: GenerationConfig, num_given: int, prompt_length: int, cache: Cache | None
    ) -> None:
        """Lets `generate` stop where the context ends, and refuses a static cache that would overflow.

        num_given: tokens that the caller passed, which is what `max_length` counts from. The token written last needs
        no position; the candidates of prompt lookup need one each.
        """
        text_config = self.config.text_config
        room = text_config.max_sequence_length - prompt_length + 1
        room = max(room - (generation_config.prompt_lookup_num_tokens or 0), 1)
        if generation_config.max_new_tokens is not None:
            wanted = generation_config.max_new_tokens
            generation_config.max_new_tokens = min(wanted, room)
        else:
            wanted = max((generation_config.max_length or 0) - num_given, 0)
            if wanted > room:
                generation_config.max_length = num_given + room
        if wanted > room:
            logger.warning(
                f"Generation stops after {room} new tokens, where the context of {text_config.max_sequence_length} "
                f"positions ends; {wanted} were asked for."
            )
        check_length(prompt_length + max(min(wanted, room) - 1, 0), text_config, cache)

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.LongTensor | None,
        mm_encoder_output: dict,
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict:
        masks = self.model.get_placeholder_mask(None if inputs_embeds is not None else input_ids, inputs_embeds)
        return expand_media(assign_rows(mm_encoder_output, masks), expand_size)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        mm_encoder_outputs: dict | None = None,
        num_seen: int = 0,
        chunked_media: ChunkedMedia | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """num_seen: tokens of `input_ids` that the cache has seen, see `_assisted_decoding`.
        chunked_media: what the chunks of a prefill show, see `_prefill_with_media`.
        """
        if is_first_iteration and num_seen:
            next_sequence_length = input_ids.shape[1] - num_seen
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # A draft model's first call is none to `generate`, so what decides is whether the cache has seen anything.
        has_seen_media = past_key_values is not None and not is_first_iteration and past_key_values.is_initialized
        if mm_encoder_outputs and not has_seen_media:
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs
        if chunked_media is not None:
            position, length = int(past_key_values.get_seq_length()), model_inputs["input_ids"].shape[1]
            model_inputs["mm_encoder_outputs"] = chunked_media.chunk(position, length)
        return model_inputs

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        is_first_iteration: bool = True,
    ):
        outputs = self._prefill_with_media(input_ids, generation_config, model_kwargs, is_first_iteration)
        if outputs.past_key_values is not None:
            # It holds what decoding needs. `generate` would hold these, copies that share their tensors, to its end.
            for media in (model_kwargs.get("mm_encoder_outputs") or {}).values():
                media["last_hidden_state"] = None  # as an item: an attribute that is set to None stays one
        return outputs

    def _prefill_chunk_size(
        self, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict
    ) -> int | None:
        """What the caller says; else PREFILL_TOKENS for a prompt that is longer and can be cut. None for one piece."""
        if generation_config.prefill_chunk_size is not None or input_ids.shape[1] <= PREFILL_TOKENS:
            return generation_config.prefill_chunk_size
        is_ids = model_kwargs.get("inputs_embeds") is None
        # The states of all chunks but the last would be lost.
        wants_states = generation_config.output_hidden_states or generation_config.output_attentions
        can_be_cut = is_ids and model_kwargs.get("past_key_values") is not None and not wants_states
        # Chunks need a mask, and with one `sdpa` takes none of a GPU's fast kernels: there time is the dearer.
        is_slowed = self.config.text_config._attn_implementation == "sdpa" and input_ids.device.type == "cuda"
        return PREFILL_TOKENS if can_be_cut and not is_slowed else None

    def _prefill_with_media(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        is_first_iteration: bool,
    ):
        media = model_kwargs.get("mm_encoder_outputs")
        chunk_size = self._prefill_chunk_size(input_ids, generation_config, model_kwargs)
        if chunk_size is None or not media:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        generation_config = copy.copy(generation_config)
        if not is_first_iteration:
            # A draft. The model that it serves prefills in one piece as well, and `generate` would drop its media.
            generation_config.prefill_chunk_size = None
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        generation_config.prefill_chunk_size = chunk_size
        # Who looks at what differs from chunk to chunk: nothing that compiling could use twice.
        generation_config.disable_compile = True
        # A chunk carries the pooled tokens of its own placeholders only; the patches of all media, and where these
        # stand, must be in the cache before the first chunk runs.
        cache = model_kwargs["past_key_values"]
        past_length = int(cache.get_seq_length())
        new_tokens = self._new_tokens(input_ids, model_kwargs, generation_config, past_length)
        masks = self.model.get_placeholder_mask(new_tokens, None)
        media = self.model.own_pooled_tokens(media)
        form = model_kwargs.get("cross_attention_cache") or self.config.text_config.cross_attention_cache
        memory = self.model.remember(media, masks, cache, past_length, form)
        tokens, numbers = {}, {}
        for modality, output in media.items():
            mask = masks[modality]
            tokens[modality] = joined(iter(output.pooler_output), sum(map(len, output.pooler_output)))
            numbers[modality] = (mask.flatten().cumsum(0).view_as(mask) - 1).where(mask, -1)
        # Transformers would cut them itself, into copies of all chunks before the first one runs.
        del model_kwargs["mm_encoder_outputs"]
        model_kwargs["chunked_media"] = ChunkedMedia(tokens, numbers, start=past_length)
        memory.prefilling = True
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        finally:
            memory.prefilling = False
            memory.drop_states()
            del model_kwargs["chunked_media"]
            model_kwargs["mm_encoder_outputs"] = media

    def _assisted_decoding(
        self,
        input_ids: torch.LongTensor,
        *,
        generation_config: GenerationConfig,
        inputs_tensor: torch.Tensor | None = None,
        **kwargs,
    ):
        """Transformers' first step runs the whole sequence, even when a cache has seen the beginning of it."""
        cache = kwargs.get("past_key_values")
        past_length = 0 if cache is None else int(cache.get_seq_length())
        new_tokens = self._new_tokens(input_ids, kwargs, generation_config, past_length)
        return super()._assisted_decoding(
            input_ids,
            generation_config=generation_config,
            inputs_tensor=inputs_tensor,
            num_seen=input_ids.shape[1] - new_tokens.shape[1],
            **kwargs,
        )

    def _get_candidate_generator(self, *args, assistant_model=None, model_kwargs=None, **kwargs):
        """A draft gets what its forward can take: a plain language model has no media and no visual cache, another
        CrossLMM has pooled tokens of its own.

        Raises ValueError for a CrossLMM that cannot draft: of another vision encoder, or when media are in the cache
        already, whose original tokens it would need.
        """
        if assistant_model is not None and model_kwargs is not None:
            accepted = inspect.signature(assistant_model.forward).parameters
            ours = ("mm_encoder_outputs", "cross_attention_cache", "num_seen")
            model_kwargs = {key: value for key, value in model_kwargs.items() if key in accepted or key not in ours}
            if isinstance(assistant_model, CrossLMMGenerationMixin):
                self._check_draft(assistant_model, model_kwargs.get("past_key_values"))
                media = model_kwargs.get("mm_encoder_outputs") or {}
                model_kwargs["mm_encoder_outputs"] = assistant_model.model.own_pooled_tokens(media, anew=True)
        return super()._get_candidate_generator(
            *args, assistant_model=assistant_model, model_kwargs=model_kwargs, **kwargs
        )

    def _check_draft(self, draft: "CrossLMMGenerationMixin", cache: Cache | None) -> None:
        mine, its = (
            (model.config.vision_config.hidden_size, model.config.patch_grid_size, model.config.tokens_per_frame)
            for model in (self, draft)
        )
        if mine != its:
            raise ValueError(
                "A CrossLMM draft looks at the media that the model has encoded, so vision width, patch grid and "
                f"tokens per frame must be the same: {mine}; the draft's are {its}. Draft with another model."
            )
        if visual_memory(cache, self.config.text_config.cross_attention_layer_indices) is not None:
            raise ValueError(
                "A CrossLMM draft has not seen the media that `past_key_values` holds. Begin a new cache, or draft "
                "with a language model or prompt lookup."
            )
