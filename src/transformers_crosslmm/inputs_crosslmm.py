"""Input validation, before any weight is used.

Shapes: B rows, L tokens of this call, F frames, S pixels along a side, N patches per frame, D vision width,
        C language width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput, is_accelerate_available, torch_compilable_check

from .cache_crosslmm import VisualMemory, cache_capacity, memory_in
from .configuration_crosslmm import CROSS_ATTENTION_CACHES, CrossLMMConfig
from .media_crosslmm import EncodedMedia, frame_index, media_index


@dataclass(frozen=True)
class NewMedia:
    """The new media of one call, after validation.

    pixels: (frames, 3, S, S) by modality. frames: frames of each medium in `pixels`. frame_index: which frame of the
    video pixels each frame shows; None if each has its own. encoded: media passed in encoded form. masks: placeholders
    (B, L) that media fill, by modality. form: "kv" or "features", how the cache keeps the media.
    """

    pixels: dict[str, torch.Tensor] = field(default_factory=dict)
    frames: dict[str, list[int]] = field(default_factory=dict)
    frame_index: torch.Tensor | None = None
    encoded: EncodedMedia = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    form: str = "kv"

    def __bool__(self) -> bool:
        return bool(self.pixels or self.encoded)


def check_inputs(
    config: CrossLMMConfig,
    find_placeholders: Callable[..., dict[str, torch.Tensor]],
    *,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    cache: Cache | None,
    past_length: int | torch.Tensor,
    pixel_values: torch.Tensor | None,
    pixel_values_videos: torch.Tensor | None,
    video_num_frames: torch.Tensor | None,
    video_frame_index: torch.Tensor | None,
    mm_encoder_outputs: EncodedMedia | None,
    cross_attention_cache: str | None,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    num_rows: int | None = None,
) -> NewMedia:
    """Checks one call of the model (for `generate`, its first call) and returns the new media.

    find_placeholders: maps ids and embeddings, one of them None, to the placeholder masks (B, L) of each modality.
    past_length: tokens that the cache has seen. num_rows: rows after `generate` repeats each row for its beams; None
        for the rows of the tokens.
    Without new media, tokens that follow cached ones are not searched: their placeholder ids are text.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    length, memory = tokens.shape[1], memory_in(cache)
    if memory is not None and len(memory.rows) != (num_rows or len(tokens)):
        raise ValueError(
            f"`cache` holds media of {len(memory.rows)} rows; got {num_rows or len(tokens)} rows of tokens. Change "
            "the cache first, with `batch_repeat_interleave` or `batch_select_indices`."
        )
    if isinstance(past_length, int):
        check_length(past_length + length, config, cache)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] < length:
        raise ValueError(
            f"`attention_mask` must cover the {length} tokens of the call and the cached tokens before them; "
            f"got {attention_mask.shape[1]} columns."
        )
    if input_ids is not None and length > 1 and not torch.compiler.is_compiling():
        check_ids(input_ids, config.text_config.vocab_size)
    form = cache_form(cross_attention_cache, memory, config)

    encoded = {modality: output for modality, output in (mm_encoder_outputs or {}).items() if output is not None}
    given = {"image": pixel_values, "video": pixel_values_videos}
    pixels = {modality: frames for modality, frames in given.items() if frames is not None}
    check_encoded(encoded, config)
    has_new_media = bool(encoded or pixels)
    has_begun = not isinstance(past_length, int) or past_length > 0
    is_prefilling = memory is not None and memory.pooled is not None
    if not has_new_media and (has_begun or is_prefilling or tokens.device.type == "meta"):
        return NewMedia(form=form)
    if has_new_media and not torch.compiler.is_compiling():
        check_whole_sequences()
        if position_ids is not None:
            check_unpacked(position_ids, attention_mask)
    masks = find_placeholders(input_ids, inputs_embeds)
    frames: dict[str, list[int]] = {}
    for modality, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        lengths: list[int] = []
        if modality in pixels:
            if modality in encoded:
                raise ValueError(f"Pass either `{name}` or `mm_encoder_outputs[{modality!r}]`, not both.")
            check_pixels(name, pixels[modality], config.vision_config)
            frames[modality] = [1] * len(pixels[modality])
            if modality == "video":
                frames[modality] = frames_per_video(pixels[modality], video_num_frames, video_frame_index)
            lengths = [count * config.tokens_per_frame for count in frames[modality]]
        elif modality in encoded:
            lengths = [len(pooled) for pooled in encoded[modality].pooler_output]
        check_placeholders(modality, name, masks[modality], lengths, tokens_per_frame=config.tokens_per_frame)
    return NewMedia(pixels, frames, video_frame_index, encoded, masks, form)


def cache_form(asked: str | None, memory: VisualMemory | None, config: CrossLMMConfig) -> str:
    """The form, "kv" or "features": as asked for, as in the cache, or the config's.

    Raises ValueError for any other form, and if the asked one differs from the cache's.
    """
    if asked is not None and asked not in CROSS_ATTENTION_CACHES:
        raise ValueError(
            f"`cross_attention_cache` must be one of {', '.join(map(repr, CROSS_ATTENTION_CACHES))}; got {asked!r}."
        )
    if memory is None:
        return asked or config.cross_attention_cache
    if asked not in (None, memory.form):
        raise ValueError(
            f"This cache was created with {memory.form!r}; it cannot switch to `cross_attention_cache={asked!r}`. "
            "Leave the argument out, or begin a new cache."
        )
    return memory.form


def check_length(length: int, config: CrossLMMConfig, cache: Cache | None) -> None:
    """Raises ValueError unless a sequence of `length` fits the context and the cache."""
    if length > config.max_sequence_length:
        raise ValueError(
            f"The sequence must fit the context of {config.max_sequence_length} positions; got {length}. Sample "
            "fewer frames, use a smaller `pooled_grid_size`, or extend the context with rope scaling (YaRN)."
        )
    capacity = -1 if cache is None else cache_capacity(cache)
    if 0 <= capacity < length:
        raise ValueError(
            f"The sequence must fit `cache`, which holds {capacity} tokens; got {length}. Create a larger static "
            "cache, or pass a DynamicCache()."
        )


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError for ids outside the vocabulary; a GPU would only report "device-side assert"."""
    if input_ids.device.type == "meta" or not input_ids.numel():
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`input_ids` must lie between 0 and {vocab_size - 1} (`vocab_size` is {vocab_size}); "
            f"got {low if low < 0 else high}. Use the tokenizer of this checkpoint."
        )


def check_adapters(modules: Iterable[nn.Module]) -> None:
    """Raises ValueError if PEFT selects adapters per row (`adapter_names`) or per position (aLoRA) in these modules,
    whose inputs are frames, patches or packed tokens and not rows."""
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, partial) and hook.keywords.keys() & {"adapter_names", "alora_offsets"}:
                raise ValueError(
                    "With media, adapters that differ between rows (`adapter_names`) or begin within a row (aLoRA) "
                    "must be in the language model's own layers; got one in a "
                    f"{type(module).__name__} of the encoder, the projector or the cross-attention. Leave these out "
                    'of `target_modules`, as r".*language_model.*self_attn.*_proj" does, or run one adapter per call.'
                )


def check_whole_sequences() -> None:
    """Raises ValueError if accelerate (also through a Trainer) splits sequences over several processes."""
    if not is_accelerate_available():
        return
    from accelerate.state import AcceleratorState

    parallelism = AcceleratorState._shared_state.get("parallelism_config")
    for name in ("cp_size", "sp_size"):
        if (size := getattr(parallelism, name, None) or 1) > 1:
            raise ValueError(
                f"Media need whole sequences: context and sequence parallelism separate placeholders from pixels; got "
                f"`parallelism_config.{name}={size}`. Set it to 1 and shard the weights instead (FSDP2)."
            )


def check_unpacked(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError if positions restart within a row: the row packs several samples, and a later one would attend
    to the media of earlier ones."""
    is_token = torch.ones_like(position_ids)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_token = attention_mask[:, -position_ids.shape[1] :].to(position_ids)
    elif attention_mask is not None:
        return  # a mask in the layers' form, as with a static cache
    positions = position_ids * is_token
    falls = is_token.bool() & (positions < positions.cummax(dim=-1).values)
    if falls.device.type != "meta" and falls.any():
        raise ValueError(
            "With media, a row must be one sample; got `position_ids` that restart within a row. Pad the samples "
            "instead of packing them."
        )


def check_pixels(name: str, pixels: torch.Tensor, vision_config: PreTrainedConfig) -> None:
    """Checks that `pixels` are at least one finite, normalised frame of the encoder's size: (F, 3, S, S).

    Raises TypeError if `pixels` is not a tensor, ValueError otherwise.
    """
    size, channels = vision_config.image_size, vision_config.num_channels
    if not isinstance(pixels, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(pixels).__name__}: use the processor.")
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (channels, size, size) or not len(pixels):
        raise ValueError(
            f"`{name}` must be (frames, {channels}, {size}, {size}), the concatenated frames of all media; "
            f"got {tuple(pixels.shape)}. Use the processor, or flatten batch and time dimensions and pass "
            "`video_num_frames`."
        )
    if not pixels.is_floating_point():
        raise ValueError(f"`{name}` must hold normalised floats; got {pixels.dtype}: use the processor.")
    # The sum reads the pixels once, on all threads; `isfinite` would allocate another tensor of their size.
    if pixels.device.type != "meta" and not pixels.sum(dtype=torch.float32).isfinite():
        raise ValueError(f"`{name}` must be finite; got NaN or infinity. Check the frames before the processor.")


def frames_per_video(
    pixels: torch.Tensor, video_num_frames: torch.Tensor | None, video_frame_index: torch.Tensor | None = None
) -> list[int]:
    """The number of frames of each video; without `video_num_frames`, all frames are one video.

    Raises ValueError for videos without frames, counts that do not add up, and an index that leaves out a frame of
    `pixels` or names one that does not exist.
    """
    num_frames = len(pixels)
    if video_frame_index is not None:
        index = torch.as_tensor(video_frame_index)
        num_frames = len(index) if index.ndim else 0
        if index.is_floating_point() or index.ndim != 1 or index.unique().tolist() != list(range(len(pixels))):
            raise ValueError(
                f"`video_frame_index` must give for every frame its index in the {len(pixels)} frames of "
                f"`pixel_values_videos`, and use each of them; got {index.dtype} of shape {tuple(index.shape)}. "
                "Pass the processor's own, from `skip_unchanged`."
            )
    counts = torch.tensor([num_frames]) if video_num_frames is None else torch.as_tensor(video_num_frames)
    frames = counts.tolist()
    is_integer = not counts.is_floating_point() and counts.ndim == 1
    if not is_integer or min(frames, default=0) < 1 or sum(frames) != num_frames:
        raise ValueError(
            f"`video_num_frames` must be (videos,) positive integers that add up to the {num_frames} frames of "
            f"`{'pixel_values_videos' if video_frame_index is None else 'video_frame_index'}`; got {frames}."
        )
    return frames


def check_encoded(media: EncodedMedia, config: CrossLMMConfig) -> None:
    """Checks that encoded media have the form that `get_video_features` and `get_image_features` return. Raises
    TypeError for other objects, ValueError for other modalities and shapes."""
    tokens_per_frame, num_patches = config.tokens_per_frame, config.patch_grid_size**2
    for modality, output in media.items():
        if modality not in ("image", "video"):
            raise ValueError(f"`mm_encoder_outputs` must hold 'video' and 'image'; got {modality!r}.")
        if not isinstance(output, ModelOutput) or output.get("pooler_output") is None:
            raise TypeError(
                f"`mm_encoder_outputs[{modality!r}]` must be the output of `get_{modality}_features`; "
                f"got {type(output).__name__}."
            )
        lengths = [len(pooled) for pooled in output.pooler_output]
        frames = dict(zip(media_index(output), (length // tokens_per_frame for length in lengths), strict=True))
        index = frame_index(output)
        if index is not None and len(index) != sum(frames.values()):
            raise ValueError(
                f"`mm_encoder_outputs[{modality!r}].frame_index` must have an entry for each of the "
                f"{sum(frames.values())} frames whose pooled tokens `pooler_output` has; got {len(index)}."
            )
        num_frames = sum(frames.values()) if index is None else max(index) + 1
        wanted = (num_frames, num_patches, config.vision_config.hidden_size)
        found = output.get("last_hidden_state")
        if found is None or tuple(found.shape) != wanted or any(n % tokens_per_frame for n in lengths):
            raise ValueError(
                f"`mm_encoder_outputs[{modality!r}].last_hidden_state` must hold the original tokens of the frames "
                f"whose pooled tokens `pooler_output` has ({tokens_per_frame} each): {wanted}; got "
                f"{None if found is None else tuple(found.shape)}."
            )


def check_placeholders(
    modality: str, name: str, mask: torch.Tensor, lengths: list[int], *, tokens_per_frame: int
) -> None:
    """Raises ValueError unless the placeholders in `mask` (B, L) fit media with `lengths` pooled tokens: each medium
    in one row, each frame at consecutive positions."""
    if mask.device.type == "meta":
        return
    if torch.compiler.is_compiling():  # a graph cannot report the numbers
        torch_compilable_check(mask.sum() == sum(lengths), f"Placeholders and {modality} features must match.")
        return
    rows, columns = mask.nonzero().cpu().unbind(-1)
    if len(rows) != sum(lengths):
        raise ValueError(
            f"Placeholders and {modality} features must match: the text holds {len(rows)} {modality} "
            f"placeholders, `{name}` or `mm_encoder_outputs` fill {sum(lengths)}. Create both in one call of the "
            "processor, without truncation, and check that no later step drops the pixels."
        )
    for medium in rows.split(lengths):
        if medium[0] != medium[-1]:
            raise ValueError(
                f"The {len(medium)} placeholders of one {modality} must be in one row; they are in rows "
                f"{sorted(set(medium.tolist()))}. Pass the media in the order of their placeholders."
            )
    frames = columns.view(-1, tokens_per_frame)
    if (broken := (frames[:, -1] - frames[:, 0] != tokens_per_frame - 1).nonzero()).numel():
        number = int(broken[0])
        raise ValueError(
            f"The {tokens_per_frame} placeholders of a frame must be consecutive; those of {modality} frame {number} "
            f"of this call are at positions {frames[number].tolist()}. Let the processor write them, and put text "
            "between frames only."
        )
