"""Encoded videos and images as objects: which placeholders they fill, whose they are, and how they are kept on disk.

Shapes: B rows, L tokens, F frames, S pixels along a side, N patches per frame, D vision width, C language width.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import SiglipVisionConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .cache_crosslmm import Medium, cache_capacity
from .configuration_crosslmm import CrossLMMConfig, CrossLMMTextConfig

EncodedMedia = Mapping[str, BaseModelOutputWithPooling]


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
    if pixels.device.type != "meta" and not torch.isfinite(pixels).all():
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
        frames = dict(zip(media_index(output), (len(p) / tokens_per_frame for p in output.pooler_output), strict=True))
        wanted = (sum(frames.values()), num_patches, config.vision_config.hidden_size)
        found = output.get("last_hidden_state")
        if found is None or tuple(found.shape) != wanted or not all(count.is_integer() for count in frames.values()):
            raise ValueError(
                f"`mm_encoder_outputs[{modality!r}].last_hidden_state` must hold the original tokens of the frames "
                f"whose pooled tokens `pooler_output` has ({tokens_per_frame} each): {wanted}; got "
                f"{None if found is None else tuple(found.shape)}."
            )


def check_placeholders(modality: str, name: str, mask: torch.Tensor, lengths: list[int], *, may_be_cut: bool) -> None:
    """Raises ValueError unless the placeholders `mask` (B, L) are those of media with `lengths` pooled tokens.

    may_be_cut: whether a medium may go on in the next row, as in the chunk of a batch.
    """
    if mask.device.type == "meta":
        return
    rows = mask.nonzero()[:, 0].cpu()
    if len(rows) != sum(lengths):
        raise ValueError(
            f"Placeholders and {modality} features must match: the text holds {len(rows)} {modality} "
            f"placeholders, `{name}` or `mm_encoder_outputs` fill {sum(lengths)}. Make both with the processor in "
            "one call, without truncation, and check that nothing drops the pixels on the way."
        )
    for medium in () if may_be_cut else rows.split(lengths):
        if medium[0] != medium[-1]:
            raise ValueError(
                f"The {len(medium)} placeholders of one {modality} must stand in one row; they stand in rows "
                f"{sorted(set(medium.tolist()))}. Give the media in the order of their placeholders."
            )


@dataclass
class CrossLMMEncodedMedia(BaseModelOutputWithPooling):
    """Encoded media of which several rows may use the same. Copies share tensors.

    media_index: `pooler_output[j]` belongs to medium `media_index[j]` of `last_hidden_state` (F, N, D); None when each
        has its own. So beams share patches.
    row_index: the row in which each entry of `pooler_output` stands; None until somebody has looked.
    """

    media_index: tuple[int, ...] | None = None
    row_index: tuple[int, ...] | None = None

    def __deepcopy__(self, memo) -> "CrossLMMEncodedMedia":
        return replace(self)


def media_index(output: BaseModelOutputWithPooling) -> tuple[int, ...]:
    """Which medium of `last_hidden_state` each entry of `pooler_output` is."""
    index = output.media_index if isinstance(output, CrossLMMEncodedMedia) else None
    return tuple(range(len(output.pooler_output))) if index is None else index


def assign_rows(media: EncodedMedia, masks: dict[str, torch.Tensor]) -> dict[str, CrossLMMEncodedMedia]:
    """The same media, each with the row in which it stands; the caller's dict and outputs stay untouched.

    masks: placeholders (B, L) of each modality, as many as the media fill.
    """
    assigned = {}
    for modality, output in media.items():
        if output is None:
            continue
        row_index = output.row_index if isinstance(output, CrossLMMEncodedMedia) else None
        if row_index is None:
            rows = masks[modality].nonzero()[:, 0].cpu()
            starts = torch.tensor([0, *(len(tokens) for tokens in output.pooler_output)]).cumsum(0)[:-1]
            row_index = tuple(rows[starts].tolist())
        assigned[modality] = CrossLMMEncodedMedia(
            last_hidden_state=output.last_hidden_state,
            pooler_output=tuple(output.pooler_output),
            media_index=media_index(output),
            row_index=row_index,
        )
    return assigned


def expand_media(media: dict[str, CrossLMMEncodedMedia], times: int) -> dict[str, CrossLMMEncodedMedia]:
    """Media for rows that are each repeated `times` times: A, B of one row become A, B, A, B. Nothing is copied."""
    expanded = {}
    for modality, output in media.items():
        entries = list(zip(output.row_index, output.pooler_output, output.media_index, strict=True))
        repeated = [
            (row * times + copy, tokens, medium)
            for row in dict.fromkeys(output.row_index)
            for copy in range(times)
            for own_row, tokens, medium in entries
            if own_row == row
        ]
        rows, tokens, index = zip(*repeated, strict=True)
        expanded[modality] = replace(output, pooler_output=tokens, media_index=index, row_index=rows)
    return expanded


def first_placeholders(mask: torch.Tensor, output: BaseModelOutputWithPooling) -> torch.Tensor:
    """The placeholders (B, L) that media fill. Once their rows are known, what a row has beyond its media is text."""
    if not isinstance(output, CrossLMMEncodedMedia) or output.row_index is None:
        return mask
    filled = torch.zeros(len(mask), 1, dtype=torch.long)
    for row, tokens in zip(output.row_index, output.pooler_output, strict=True):
        filled[row] += len(tokens)
    return mask & (mask.cumsum(-1) <= filled.to(mask.device))


def locate_media(
    media: EncodedMedia, masks: dict[str, torch.Tensor], past_length: int, *, tokens_per_frame: int
) -> tuple[list[list[Medium]], torch.Tensor, torch.Tensor]:
    """Where the media of a call stand.

    masks: placeholders (B, L) of each modality, as many as the media fill.
    Returns the media of each row in the order in which they begin, with positions counted from the start of the cache;
    the original tokens (F, N, D) in the order of rows and positions, each medium once; and the number of every frame
    within its medium (F,).
    """
    found: list[tuple[int, list[int], str, int]] = []  # row, positions, modality, medium
    for modality, output in media.items():
        places = masks[modality].nonzero().tolist()
        taken = 0
        for medium, pooled in zip(media_index(output), output.pooler_output, strict=True):
            block = places[taken : taken + len(pooled)]
            taken += len(pooled)
            found.append((block[0][0], [column + past_length for _, column in block], modality, medium))
    found.sort(key=lambda item: (item[0], item[1][0]))

    num_frames = {(modality, medium): len(p) // tokens_per_frame for _, p, modality, medium in found}
    frames = {}
    for modality, output in media.items():
        mine = sorted(key for key in num_frames if key[0] == modality)
        parts = output.last_hidden_state.split([num_frames[key] for key in mine])
        frames.update(zip(mine, parts, strict=True))
    if len(media) == 1 and list(num_frames) == list(frames):
        original = next(iter(media.values())).last_hidden_state  # in order already: no copy
    else:
        original = torch.cat([frames[key] for key in num_frames])
    frame_numbers = torch.cat([torch.arange(count) for count in num_frames.values()])

    patches_per_frame = original.shape[1]
    stretches, end = {}, 0
    for key, count in num_frames.items():
        stretches[key] = (end, end + count * patches_per_frame)
        end += count * patches_per_frame
    rows: list[list[Medium]] = [[] for _ in range(next(iter(masks.values())).shape[0])]
    for row, positions, modality, medium in found:
        whole = range(positions[0], positions[-1] + 1)
        is_contiguous = len(whole) == len(positions)
        rows[row].append(Medium(whole if is_contiguous else tuple(positions), stretches[modality, medium]))
    return rows, original, frame_numbers


def save_encoded_media(media: EncodedMedia, path: str | os.PathLike) -> None:
    """Writes encoded media as one safetensors file, to be asked again without the video.

    media: what `get_video_features` and `get_image_features` return, {"video": …, "image": …}.
    """
    tensors, metadata = {}, {}
    for modality, output in media.items():
        tensors[f"{modality}.original"] = output.last_hidden_state.contiguous()
        tensors[f"{modality}.pooled"] = torch.cat(list(output.pooler_output)).contiguous()
        metadata[f"{modality}.tokens"] = ",".join(str(len(tokens)) for tokens in output.pooler_output)
    save_file(tensors, path, metadata={"format": "pt", **metadata})


def load_encoded_media(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, CrossLMMEncodedMedia]:
    """Reads what `save_encoded_media` wrote, ready for `mm_encoder_outputs`.

    Raises ValueError if the file holds something else.
    """
    media = {}
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        for name, lengths in metadata.items():
            modality, dot, kind = name.partition(".")
            if dot and kind == "tokens":
                pooled = file.get_tensor(f"{modality}.pooled").split([int(length) for length in lengths.split(",")])
                media[modality] = CrossLMMEncodedMedia(
                    last_hidden_state=file.get_tensor(f"{modality}.original"), pooler_output=tuple(pooled)
                )
    if not media:
        raise ValueError(f"{os.fspath(path)!r} holds no encoded media; write them with `save_encoded_media`.")
    return media


__all__ = ["CrossLMMEncodedMedia", "load_encoded_media", "save_encoded_media"]
