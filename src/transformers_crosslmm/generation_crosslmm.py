"""How media travel through `generate`: encoded once, shared by beams, known before a chunked prefill begins."""

import inspect
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache

from .media_crosslmm import assign_rows, expand_media


class CrossLMMGenerationMixin(GenerationMixin):
    """`generate` for models whose tokens look back at encoded media."""

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        """Encodes the media, after a check of everything that can be wrong, and never in the caller's objects."""
        cache = model_kwargs.get("past_key_values")
        media = model_kwargs.get("mm_encoder_outputs")
        past_length = 0 if cache is None else int(cache.get_seq_length())
        is_ids = model_input_name == "input_ids"
        new_tokens = self._new_tokens(inputs_tensor, model_kwargs.get("attention_mask"), past_length)
        self.model.check_inputs(
            input_ids=new_tokens if is_ids else None,
            inputs_embeds=None if is_ids else new_tokens,
            past_key_values=cache,
            past_length=past_length,
            pixel_values=model_kwargs.get("pixel_values"),
            pixel_values_videos=model_kwargs.get("pixel_values_videos"),
            video_num_frames=model_kwargs.get("video_num_frames"),
            mm_encoder_outputs=media,
            cross_attention_cache=model_kwargs.get("cross_attention_cache"),
        )
        model_kwargs["mm_encoder_outputs"] = dict(media or {})
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        masks = self.model.get_placeholder_mask(new_tokens if is_ids else None, None if is_ids else new_tokens)
        model_kwargs["mm_encoder_outputs"] = assign_rows(model_kwargs["mm_encoder_outputs"], masks)
        return model_kwargs

    @staticmethod
    def _new_tokens(tokens: torch.Tensor, attention_mask: torch.Tensor | None, past_length: int) -> torch.Tensor:
        """The tokens that the cache has not seen; ids may be the whole sequence or the new part alone."""
        is_new_part = attention_mask is not None and attention_mask.shape[1] > tokens.shape[1]
        return tokens if is_new_part else tokens[:, past_length:]

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
        is_first_iteration: bool | None = False,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # A draft model's first call is none to `generate`, so what decides is whether the cache has seen anything.
        has_seen_media = past_key_values is not None and not is_first_iteration and past_key_values.is_initialized
        if mm_encoder_outputs and not has_seen_media:
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return model_inputs

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        is_first_iteration: bool = True,
    ):
        media = model_kwargs.get("mm_encoder_outputs")
        cache = model_kwargs.get("past_key_values")
        if generation_config.prefill_chunk_size is None or not media or cache is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        if is_first_iteration and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "Chunked prefill works from `input_ids`; got `inputs_embeds`. Leave `prefill_chunk_size` out."
            )
        # A chunk carries the pooled tokens of its own placeholders only; the patches of all media, and where these
        # stand, must be in the cache before the first chunk runs.
        past_length = int(cache.get_seq_length())
        new_tokens = self._new_tokens(input_ids, model_kwargs.get("attention_mask"), past_length)
        masks = self.model.get_placeholder_mask(new_tokens, None)
        model_kwargs["mm_encoder_outputs"] = media = self.model.own_pooled_tokens(media)
        form = model_kwargs.get("cross_attention_cache") or self.config.text_config.cross_attention_cache
        memory = self.model.remember(media, masks, cache, past_length, form)
        memory.prefilling = True
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        finally:
            memory.prefilling = False
            memory.drop_states()

    def _get_candidate_generator(self, *args, assistant_model=None, model_kwargs=None, **kwargs):
        """A draft gets what its forward can take: a plain language model has no media and no visual cache."""
        if assistant_model is not None and model_kwargs is not None:
            accepted = inspect.signature(assistant_model.forward).parameters
            ours = ("mm_encoder_outputs", "cross_attention_cache")
            model_kwargs = {key: value for key, value in model_kwargs.items() if key in accepted or key not in ours}
        return super()._get_candidate_generator(
            *args, assistant_model=assistant_model, model_kwargs=model_kwargs, **kwargs
        )
