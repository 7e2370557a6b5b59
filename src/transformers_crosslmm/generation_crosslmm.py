"""`generate` with images and videos.

Media are checked and encoded before Transformers' own `generate` begins, and are put into the cache in the first step.
Beams, prefill chunks and later steps read them from the cache, so only `generate` and `prepare_inputs_for_generation`
are overridden.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cache_crosslmm import VisualMemory, check_cache, memory_in
from .dialect_crosslmm import CACHE, CHUNKS_LATER_TURNS, cache_argument, takes_a_cache
from .frame_weights_crosslmm import FrameWeights
from .inputs_crosslmm import NewMedia, check_inputs, check_length
from .media_crosslmm import EncodedMedia

logger = logging.get_logger(__name__)

PREFILL_TOKENS = 4096
"""Default `prefill_chunk_size` for prompts with media, in tokens. Chunks limit activation memory (mostly of the MLP),
which otherwise grows with the video."""

MEDIA_ARGUMENTS = (
    "pixel_values",
    "pixel_values_videos",
    "video_num_frames",
    "video_frame_index",
    "mm_encoder_outputs",
)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode while the block runs."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class CrossLMMGenerationMixin(GenerationMixin):
    """Adds media to `generate`, for models whose tokens read them through cross-attention."""

    @takes_a_cache
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor=None,
        *args,
        cache: Cache | None = None,
        output_cross_attentions: bool = False,
        **kwargs,
    ):
        """Generates as in Transformers, with the media arguments of `forward`.

        With `output_cross_attentions=True` the output has `cross_attentions`: for each sequence, the T2V attention of
        every new token, summed per frame, (cross-attention layers, heads, new tokens, frames), with the frames of all
        media in order. Nothing is compiled then. Raises ValueError without `return_dict_in_generate`, for a model
        without T2V, and with an assistant or prompt lookup, because these check several tokens at once.
        """
        if self.training and self.model.is_checkpointed:  # checkpointed layers do not fill a cache
            with evaluation_mode(self):
                return self.generate(
                    inputs,
                    generation_config,
                    logits_processor,
                    *args,
                    cache=cache,
                    output_cross_attentions=output_cross_attentions,
                    **kwargs,
                )
        options = Options(kwargs, generation_config, self.generation_config)
        kwargs |= self._prepare_media(inputs, cache, options, kwargs)
        if cache is not None:
            kwargs |= cache_argument(cache)
        if not output_cross_attentions:
            return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)
        if not options.get("return_dict_in_generate"):
            raise ValueError(
                "`output_cross_attentions` needs `return_dict_in_generate=True`: a tensor cannot hold them."
            )
        if kwargs.get("assistant_model") or options.get("prompt_lookup_num_tokens"):
            raise ValueError(
                "`output_cross_attentions` are recorded token by token; an assistant or prompt lookup checks several "
                "at once. Leave one of the two out."
            )
        kwargs["disable_compile"] = True
        with FrameWeights(self) as weights:
            processors = [*(logits_processor or []), weights]
            output = super().generate(inputs, generation_config, processors, *args, **kwargs)
        return weights.add_to(output)

    def generate_batch(self, inputs, *args, **kwargs):
        """Generates as in Transformers, for text only. Raises ValueError for media or their placeholders."""
        media = [name for name in MEDIA_ARGUMENTS if name in kwargs]
        placeholders = {self.config.image_token_id, self.config.video_token_id}
        for i, ids in enumerate(inputs):
            if not placeholders.isdisjoint(map(int, ids)):  # `ids` may be a tensor
                media.append(f"placeholders in `inputs[{i}]`")
        if media:
            raise ValueError(
                f"`generate_batch` is for text only; got {', '.join(media)}. Use `generate` for images and videos."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self, generation_config=None, *args, **kwargs):
        """Starts as in Transformers, with placeholders suppressed: a sampled one would end all concurrent requests."""
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        placeholders = self.config.image_token_id, self.config.video_token_id
        generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or ()), *placeholders})
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _prepare_media(
        self, inputs: torch.Tensor | None, cache: Cache | None, options: "Options", kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Checks and encodes the media of a call. Removes the media arguments from `kwargs` and returns the arguments
        that Transformers' `generate` gets instead."""
        media = {name: kwargs.pop(name, None) for name in MEDIA_ARGUMENTS}
        form = kwargs.pop("cross_attention_cache", None)
        ids, embeds = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds")
        if cache is not None:
            check_cache(cache, self.config.text_config.num_hidden_layers)
        if embeds is None and ids is None:
            return {}
        past_length = 0 if cache is None else int(cache.get_seq_length())
        given = ids if embeds is None else embeds
        # The ids are the new tokens only if the attention mask is longer than they are.
        mask = kwargs.get("attention_mask")
        is_whole = embeds is not None or mask is None or mask.shape[1] == ids.shape[1]
        tokens = given[:, past_length:] if is_whole else given
        new = check_inputs(
            self.config,
            self.model.get_placeholder_mask,
            input_ids=tokens if embeds is None else None,
            inputs_embeds=None if embeds is None else tokens,
            cache=cache,
            past_length=past_length,
            cross_attention_cache=form,
            num_rows=len(tokens) * options.num_rows_per_prompt,
            **media,
        )
        if not tokens.shape[1]:
            raise ValueError(
                f"`cache` has seen {past_length} tokens, and the {given.shape[1]} given are not new. Pass the whole "
                "sequence, or only the new tokens with an `attention_mask` that also covers the cached ones."
            )
        if not new and not options.get("is_assistant"):
            self._check_that_no_medium_is_missing(tokens, is_ids=embeds is None)
        changed = self._limit_to_context(options, given.shape[1], past_length + tokens.shape[1], cache)
        assistant = kwargs.get("assistant_model")
        if is_whole and past_length and (assistant or options.get("prompt_lookup_num_tokens")):
            changed["num_cached"] = past_length
        if new and options.get("cache_implementation") == "paged":
            raise ValueError(
                'Continuous batching (`cache_implementation="paged"`) cannot store the patches of media. Leave '
                "it out, or send text only."
            )
        if past_length and not CHUNKS_LATER_TURNS:
            if options.get("prefill_chunk_size") is not None:
                logger.warning_once(
                    "`prefill_chunk_size` is ignored: before 5.23, Transformers cannot chunk the prefill of a turn "
                    "that continues a `cache`."
                )
                changed["prefill_chunk_size"] = None
        elif new:
            changed |= self._chunk_prefill(options, tokens, is_ids=embeds is None)
        elif options.get("prefill_chunk_size") is not None:
            self._check_chunks(options, is_ids=embeds is None)
        encoded = self.model.encode_media(new) if new else {}
        if assistant is not None:
            changed["assistant_model"] = Draft(assistant, self, encoded, cache)
        if new:
            changed["visual_memory"] = self.model.remember(encoded, new, past_length, memory_in(cache))
        return changed

    def _check_that_no_medium_is_missing(self, tokens: torch.Tensor, *, is_ids: bool) -> None:
        """Raises ValueError for placeholders of a later turn without their media. The first new token may be the
        model's own last token, which is text, so it is not checked."""
        masks = self.model.get_placeholder_mask(tokens if is_ids else None, None if is_ids else tokens)
        for modality, mask in masks.items():
            if count := int(mask[:, 1:].sum()):
                raise ValueError(
                    f"Placeholders and {modality} features must match: the new tokens hold {count} {modality} "
                    "placeholders, and no new media were passed. Pass the pixels, or `mm_encoder_outputs`, of every "
                    "medium that the cache has not seen."
                )

    def _limit_to_context(
        self, options: "Options", num_given: int, prompt_length: int, cache: Cache | None
    ) -> dict[str, Any]:
        """The arguments that make `generate` stop at the end of the context.

        num_given: tokens that the caller passed; `max_length` includes them. The last new token needs no position;
        each candidate of prompt lookup needs one. Raises ValueError if the prompt or a static cache does not fit.
        """
        longest, changed = self.config.max_sequence_length, {}
        room = max(longest - prompt_length + 1 - (options.get("prompt_lookup_num_tokens") or 0), 1)
        wanted = options.get("max_new_tokens")
        if wanted is not None:
            changed = {"max_new_tokens": min(wanted, room)}
        else:
            wanted = max((options.get("max_length") or 0) - num_given, 0)
            if wanted > room:
                changed = {"max_length": num_given + room}
        if wanted > room:
            logger.warning(
                f"Generation stops after {room} new tokens, at the end of the context of {longest} positions; "
                f"{wanted} were requested."
            )
        check_length(prompt_length + max(min(wanted, room) - 1, 0), self.config, cache)
        return changed

    def _check_chunks(self, options: "Options", *, is_ids: bool) -> None:
        if not is_ids or options.get("use_cache") is False:
            raise ValueError(
                "Chunked prefill needs `input_ids` and a cache; got "
                f"{'`use_cache=False`' if is_ids else '`inputs_embeds`'}. Leave `prefill_chunk_size` out."
            )

    def _chunk_prefill(self, options: "Options", tokens: torch.Tensor, *, is_ids: bool) -> dict[str, Any]:
        """The arguments that make `generate` run a prompt with media in chunks: of the caller's size, or of
        PREFILL_TOKENS if the prompt is longer and can be split."""
        if options.get("prefill_chunk_size") is not None:
            self._check_chunks(options, is_ids=is_ids)
            # The segments differ between chunks, so a compiled graph could not be reused.
            return {"disable_compile": True}
        # With chunks, only the states of the last one would be returned.
        wants_states = options.get("output_hidden_states") or options.get("output_attentions")
        # Chunks need a mask. With a mask `sdpa` has no fast kernel on CUDA, and speed matters more than memory there.
        is_slowed = self.config.text_config._attn_implementation == "sdpa" and tokens.device.type == "cuda"
        can_be_cut = is_ids and options.get("use_cache") is not False and not wants_states and not is_slowed
        if tokens.shape[1] <= PREFILL_TOKENS or not can_be_cut:
            return {}
        return {"prefill_chunk_size": PREFILL_TOKENS, "disable_compile": True}

    @takes_a_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        visual_memory: VisualMemory | None = None,
        num_cached: int = 0,
        **kwargs,
    ) -> dict[str, Any]:
        """visual_memory: the media of the call, for the rows of the prompt; this method moves them into the cache.
        num_cached: tokens of `input_ids` in the cache before a call with a draft or prompt lookup, whose first step
            would otherwise run the whole sequence.
        """
        if is_first_iteration and num_cached:
            next_sequence_length = input_ids.shape[1] - num_cached
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **cache_argument(cache),
            **kwargs,
        )
        if visual_memory is not None and not visual_memory.is_empty:
            visual_memory.repeat_rows(len(input_ids) // len(visual_memory.rows))
            if cache is None:
                model_inputs["visual_memory"] = visual_memory
            else:
                self.model.attach(visual_memory, cache)
        return model_inputs


class Options:
    """Options of `generate`, looked up in the call's arguments, the given generation config, then the model's."""

    def __init__(self, kwargs: dict[str, Any], *configs: GenerationConfig | None) -> None:
        self.sources = [kwargs, *(vars(config) for config in configs if config is not None)]

    def get(self, name: str) -> Any:
        values = (source.get(name) for source in self.sources)
        return next((value for value in values if value is not None), None)

    @property
    def num_rows_per_prompt(self) -> int:
        return max(self.get("num_beams") or 1, self.get("num_return_sequences") or 1)


class Draft:
    """Wraps an assistant model for `generate`: drops arguments that its forward does not take, and gives a CrossLMM
    the media that the main model encoded, with its own pooled tokens.

    Raises ValueError for a CrossLMM that has another vision encoder, or if the cache already holds media, because the
    draft would need their original tokens.
    """

    def __init__(
        self, model: PreTrainedModel, main: CrossLMMGenerationMixin, media: EncodedMedia, cache: Cache | None
    ) -> None:
        self.__dict__["model"], self.__dict__["media"] = model, None
        if not isinstance(model, CrossLMMGenerationMixin):
            return
        mine, its = (
            (each.config.vision_config.hidden_size, each.config.patch_grid_size, each.config.tokens_per_frame)
            for each in (main, model)
        )
        if mine != its:
            raise ValueError(
                "A CrossLMM draft reads the media that the model has encoded, so vision width, patch grid and tokens "
                f"per frame must be equal: the model has {mine}, the draft {its}. Use another draft model."
            )
        if memory_in(cache) is not None:
            raise ValueError(
                "A CrossLMM draft has not seen the media in `cache`. Begin a new cache, or draft with a language "
                "model or prompt lookup."
            )
        self.__dict__["media"] = model.model.encode_media(NewMedia(encoded=media), project_anew=True)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        for name in (*MEDIA_ARGUMENTS, "visual_memory", "num_cached"):
            kwargs.pop(name, None)
        if self.media and kwargs.get(CACHE) is None:  # the draft's cache holds them from the second call on
            kwargs["mm_encoder_outputs"] = self.media
        return self.model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)


__all__ = ["CrossLMMGenerationMixin"]
