"""Everything that can be wrong with the inputs of a call, told before any weight is used.

Shapes: B rows, L tokens of this call, F frames, S pixels along a side, N patches per frame, D vision width,
        C language width.
"""

from collections.abc import Callable

import torch
from transformers import SiglipVisionConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, is_accelerate_available, torch_compilable_check

from .cache_crosslmm import VisualMemory, cache_capacity, visual_memory
from .configuration_crosslmm import CROSS_ATTENTION_CACHES, CrossLMMConfig, CrossLMMTextConfig
from .media_crosslmm import EncodedMedia, first_placeholders, media_index


def check_inputs(
    config: CrossLMMConfig,
    find_placeholders: Callable[..., dict[str, torch.Tensor]],
    *,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    past_key_values: Cache | None,
    past_length: int | torch.Tensor,
    pixel_values: torch.Tensor | None,
    pixel_values_videos: torch.Tensor | None,
    video_num_frames: torch.Tensor | None,
    mm_encoder_outputs: EncodedMedia | None,
    cross_attention_cache: str | None,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    num_rows: int | None = None,
) -> tuple[dict[str, BaseModelOutputWithPooling], dict[str, torch.Tensor], str]:
    """The checks of one call of the model, or, for `generate`, of its first.

    find_placeholders: ids and embeddings, one of them None, to the places (B, L) of each modality's placeholders.
    past_length: tokens that the cache has seen. num_rows: rows of the call once `generate` has repeated each for its
        beams; as given otherwise.
    Returns the media that came encoded, the placeholders that media fill, per modality, and the form in which their
    keys and values are kept. Without new media, tokens behind cached ones are not looked at: their placeholder ids are
    text.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    text_config, length = config.text_config, tokens.shape[1]
    memory = visual_memory(past_key_values, text_config.cross_attention_layer_indices)
    if memory is not None and len(memory.rows) != (num_rows or len(tokens)):
        raise ValueError(
            f"`past_key_values` holds media of {len(memory.rows)} rows; got {num_rows or len(tokens)} rows of "
            "tokens. Change the cache first, with `batch_repeat_interleave` or `batch_select_indices`."
        )
    if isinstance(past_length, int):
        check_length(past_length + length, text_config, past_key_values)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] < length:
        raise ValueError(
            f"`attention_mask` must cover the {length} tokens of the call, and what the cache has seen before them; "
            f"got {attention_mask.shape[1]} columns."
        )
    if input_ids is not None and length > 1 and not torch.compiler.is_compiling():
        check_ids(input_ids, text_config.vocab_size)
    form = cache_form(cross_attention_cache, memory, text_config)

    media = {modality: output for modality, output in (mm_encoder_outputs or {}).items() if output is not None}
    pixels = {"image": pixel_values, "video": pixel_values_videos}
    is_prefilling = memory is not None and memory.prefilling
    if media:
        check_encoded(media, config, has_original=not is_prefilling)
    has_new_media = bool(media) or pixel_values is not None or pixel_values_videos is not None
    has_begun = not isinstance(past_length, int) or past_length > 0
    if not has_new_media and (has_begun or tokens.device.type == "meta"):
        return media, {}, form
    if has_new_media and not torch.compiler.is_compiling():
        check_whole_sequences()
    if has_new_media and position_ids is not None and not torch.compiler.is_compiling():
        check_unpacked(position_ids, attention_mask)
    masks = find_placeholders(input_ids, inputs_embeds)
    for modality, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        lengths: list[int] = []
        if pixels[modality] is not None:
            if modality in media:
                raise ValueError(
                    f"`{name}` and `mm_encoder_outputs[{modality!r}]` are the same media twice; give one."
                )
            check_pixels(name, pixels[modality], config.vision_config)
            frames = [1] * len(pixels[modality])
            if modality == "video":
                frames = frames_per_video(pixels[modality], video_num_frames)
            lengths = [count * config.tokens_per_frame for count in frames]
        elif modality in media:
            masks[modality] = first_placeholders(masks[modality], media[modality])
            lengths = [len(pooled) for pooled in media[modality].pooler_output]
        # In the chunk of a batch a medium may go on in the next row.
        frame = None if is_prefilling else config.tokens_per_frame
        check_placeholders(modality, name, masks[modality], lengths, tokens_per_frame=frame)
    return media, masks, form


def cache_form(asked: str | None, memory: VisualMemory | None, text_config: CrossLMMTextConfig) -> str:
    """ "kv" or "features": what was asked for, what the cache holds already, or the config's.

    Raises ValueError for anything else, and when the first two differ.
    """
    if asked is not None and asked not in CROSS_ATTENTION_CACHES:
        raise ValueError(
            f"`cross_attention_cache` must be one of {', '.join(map(repr, CROSS_ATTENTION_CACHES))}; got {asked!r}."
        )
    if memory is None:
        return asked or text_config.cross_attention_cache
    if asked not in (None, memory.form):
        raise ValueError(
            f"A cache keeps the form it began with; this one holds {memory.form!r}, "
            f"got `cross_attention_cache={asked!r}`. Leave it out, or begin a new cache."
        )
    return memory.form


def check_length(length: int, text_config: CrossLMMTextConfig, cache: Cache | None) -> None:
    """Raises ValueError unless a sequence of `length` fits the context and the cache."""
    if length > text_config.max_sequence_length:
        raise ValueError(
            f"The sequence must fit the context of {text_config.max_sequence_length} positions; got {length}. Sample "
            "fewer frames, use a smaller `pooled_grid_size`, or stretch the context with rope scaling (YaRN)."
        )
    capacity = -1 if cache is None else cache_capacity(cache)
    if 0 <= capacity < length:
        raise ValueError(
            f"The sequence must fit `past_key_values`, which holds {capacity} tokens; got {length}. Make the static "
            "cache larger, or pass a DynamicCache()."
        )


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError for ids that the embedding does not have: a GPU would only say "device-side assert"."""
    if input_ids.device.type == "meta" or not input_ids.numel():
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`input_ids` must lie between 0 and {vocab_size - 1} (`vocab_size` is {vocab_size}); "
            f"got {low if low < 0 else high}. Use the tokenizer of this checkpoint."
        )


def check_whole_sequences() -> None:
    """Raises ValueError where accelerate, or a Trainer through it, spreads each sequence over several processes."""
    if not is_accelerate_available():
        return
    from accelerate.state import AcceleratorState

    parallelism = AcceleratorState._shared_state.get("parallelism_config")
    for name in ("cp_size", "sp_size"):
        if (size := getattr(parallelism, name, None) or 1) > 1:
            raise ValueError(
                f"Media need whole sequences: context and sequence parallelism part placeholders from pixels; got "
                f"`parallelism_config.{name}={size}`. Set it to 1 and shard the weights instead (FSDP2)."
            )


def check_unpacked(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError for rows in which positions begin anew: several samples in one, of which a later one would see
    the media of those before it."""
    is_token = torch.ones_like(position_ids)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_token = attention_mask[:, -position_ids.shape[1] :].to(position_ids)
    elif attention_mask is not None:
        return  # made for the layers already, as with a static cache: padding cannot be told from it
    positions = position_ids * is_token
    falls = is_token.bool() & (positions < positions.cummax(dim=-1).values)
    if falls.device.type != "meta" and falls.any():
        raise ValueError(
            "With media, a row must be one sample; got `position_ids` that begin anew within a row. Pad the samples "
            "instead of packing them."
        )


def check_pixels(name: str, pixels: torch.Tensor, vision_config: SiglipVisionConfig) -> None:
    """Raises unless `pixels` are finite, normalised frames of the encoder's size, at least one: (F, 3, S, S).

    TypeError for what is no tensor, ValueError for the rest.
    """
    size, channels = vision_config.image_size, vision_config.num_channels
    if not isinstance(pixels, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(pixels).__name__}: use the processor.")
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (channels, size, size) or not len(pixels):
        raise ValueError(
            f"`{name}` must be (frames, {channels}, {size}, {size}), the frames of all media one after the other; "
            f"got {tuple(pixels.shape)}. The processor makes it so; flatten a batch and time dimension and give "
            "`video_num_frames`."
        )
    if not pixels.is_floating_point():
        raise ValueError(f"`{name}` must hold normalised floats; got {pixels.dtype}: use the processor.")
    # Not `isfinite`, which writes another tensor of their size.
    if pixels.device.type != "meta" and not torch.stack(pixels.aminmax()).isfinite().all():
        raise ValueError(f"`{name}` must be finite; got NaN or infinity. Check the frames before the processor.")


def frames_per_video(pixels: torch.Tensor, video_num_frames: torch.Tensor | None) -> list[int]:
    """Frames of each video; all of them one video's when nothing is said.

    Raises ValueError for videos without frames and for counts that do not add up.
    """
    counts = torch.tensor([len(pixels)]) if video_num_frames is None else torch.as_tensor(video_num_frames)
    frames = counts.tolist()
    is_integer = not counts.is_floating_point() and counts.ndim == 1
    if not is_integer or min(frames, default=0) < 1 or sum(frames) != len(pixels):
        raise ValueError(
            f"`video_num_frames` must be (videos,) positive integers that add up to the {len(pixels)} frames of "
            f"`pixel_values_videos`; got {frames}."
        )
    return frames


def check_encoded(media: EncodedMedia, config: CrossLMMConfig, *, has_original: bool) -> None:
    """Raises unless encoded media are what `get_video_features` and `get_image_features` return.

    has_original: whether the original tokens must be there; the chunks of a prefill bring pooled ones only.
    TypeError for other objects, ValueError for other modalities and shapes.
    """
    tokens_per_frame, num_patches = config.tokens_per_frame, config.patch_grid_size**2
    for modality, output in media.items():
        if modality not in ("image", "video"):
            raise ValueError(f"`mm_encoder_outputs` must hold 'video' and 'image'; got {modality!r}.")
        if not isinstance(output, ModelOutput) or output.get("pooler_output") is None:
            raise TypeError(
                f"`mm_encoder_outputs[{modality!r}]` must be what `get_{modality}_features` returns; "
                f"got {type(output).__name__}."
            )
        if not has_original:
            continue
        lengths = [len(pooled) for pooled in output.pooler_output]
        frames = dict(zip(media_index(output), (length // tokens_per_frame for length in lengths), strict=True))
        wanted = (sum(frames.values()), num_patches, config.vision_config.hidden_size)
        found = output.get("last_hidden_state")
        if found is None or tuple(found.shape) != wanted or any(n % tokens_per_frame for n in lengths):
            raise ValueError(
                f"`mm_encoder_outputs[{modality!r}].last_hidden_state` must hold the original tokens of the frames "
                f"whose pooled tokens `pooler_output` has ({tokens_per_frame} each): {wanted}; got "
                f"{None if found is None else tuple(found.shape)}."
            )


def check_placeholders(
    modality: str, name: str, mask: torch.Tensor, lengths: list[int], *, tokens_per_frame: int | None
) -> None:
    """Raises ValueError unless the placeholders `mask` (B, L) are those of media with `lengths` pooled tokens, each
    medium in one row and each frame in one piece.

    tokens_per_frame: None to look at their number alone.
    """
    if mask.device.type == "meta":
        return
    if torch.compiler.is_compiling():  # a graph cannot tell the numbers
        torch_compilable_check(mask.sum() == sum(lengths), f"Placeholders and {modality} features must match.")
        return
    rows, columns = mask.nonzero().cpu().unbind(-1)
    if len(rows) != sum(lengths):
        raise ValueError(
            f"Placeholders and {modality} features must match: the text holds {len(rows)} {modality} "
            f"placeholders, `{name}` or `mm_encoder_outputs` fill {sum(lengths)}. Make both with the processor in "
            "one call, without truncation, and check that nothing drops the pixels on the way."
        )
    if tokens_per_frame is None:
        return
    for medium in rows.split(lengths):
        if medium[0] != medium[-1]:
            raise ValueError(
                f"The {len(medium)} placeholders of one {modality} must stand in one row; they stand in rows "
                f"{sorted(set(medium.tolist()))}. Give the media in the order of their placeholders."
            )
    frames = columns.view(-1, tokens_per_frame)
    if (broken := (frames[:, -1] - frames[:, 0] != tokens_per_frame - 1).nonzero()).numel():
        number = int(broken[0])
        raise ValueError(
            f"The {tokens_per_frame} placeholders of a frame must follow each other; those of {modality} frame "
            f"{number} of this call stand at positions {frames[number].tolist()}. Let the processor write them, and "
            "put text between frames only."
        )
