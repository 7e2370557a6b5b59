"""Encoded videos and images: encoding a long video, finding placeholders, saving and loading.

Shapes: B rows, L tokens, F frames of all media, T of one video, S pixels along a side, N patches per frame, D vision
        width, C language width.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .cache_crosslmm import Medium

EncodedMedia = Mapping[str, BaseModelOutputWithPooling]


@dataclass
class CrossLMMEncodedMedia(BaseModelOutputWithPooling):
    """Encoded media that several rows can share. Copies share tensors.

    media_index: `pooler_output[j]` belongs to medium `media_index[j]` of `last_hidden_state` (F, N, D); None if each
        has its own medium. With it, rows that ask about one video share the patches.
    frame_index: for each frame of the media, its frame in `last_hidden_state` if unchanged frames were left out; None
        if all frames are there. `pooler_output` always has the tokens of all frames.
    """

    media_index: tuple[int, ...] | None = None
    frame_index: tuple[int, ...] | None = None

    def __deepcopy__(self, memo) -> "CrossLMMEncodedMedia":
        return replace(self)


@torch.no_grad()
def encode_video(
    model: Any,
    pixels: Any,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> CrossLMMEncodedMedia:
    """Encodes one video as `model.get_video_features` does, without holding all its pixels at once.

    pixels: a `VideoStream`, of which one chunk is held at a time, or a tensor (T, 3, S, S); `vision_chunk_size` frames
        at a time are on the model's device.
    on_progress: called with the number of frames done and the expected total.
    Raises ValueError for a video without frames.
    """
    original: torch.Tensor | None = None
    pooled: list[torch.Tensor] = []
    done = 0
    for chunk in [pixels] if isinstance(pixels, torch.Tensor) else pixels:
        expected = len(pixels) if isinstance(pixels, torch.Tensor) else pixels.expected_num_frames
        index = getattr(pixels, "frame_index", None)
        for part in chunk.split(model.config.vision_chunk_size):
            encoded = model.get_video_features(part.to(model.device), return_dict=True)
            new = encoded.last_hidden_state
            if original is None:  # allocated for all frames: joining parts at the end would take twice the memory
                room = expected if index is None else 0  # the number of distinct frames is not known beforehand
                original = new.new_empty(max(room, len(new)), *new.shape[1:])
            if done + len(new) > len(original):
                original = torch.cat([original[:done], new.new_empty(done + len(new), *new.shape[1:])])
            original[done : done + len(new)] = new
            pooled.append(encoded.pooler_output[0])
            done += len(new)
            if on_progress is not None:
                on_progress(done, max(done, expected))
        del chunk, part  # before the next one is decoded
    if original is None:
        raise ValueError("A video needs at least one frame; got none.")
    tokens = torch.cat(pooled)
    if index is not None:
        original = original[:done].clone()  # and not a view that keeps all the room
        tokens = tokens.view(done, -1, tokens.shape[-1])[index].flatten(0, 1)
    return CrossLMMEncodedMedia(
        last_hidden_state=original[:done],  # type: ignore[arg-type]
        pooler_output=(tokens,),  # type: ignore[arg-type]
        frame_index=None if index is None else tuple(index),
    )


def join_media(parts: Iterable[BaseModelOutputWithPooling]) -> CrossLMMEncodedMedia:
    """Joins separately encoded media, in order, as if one call had encoded them."""
    outputs = list(parts)
    original = [output.last_hidden_state for output in outputs]
    index: list[int] | None = None
    if any(frame_index(output) is not None for output in outputs):
        index, before = [], 0
        for output in outputs:
            own = frame_index(output)
            index += [before + frame for frame in (range(len(output.last_hidden_state)) if own is None else own)]
            before += len(output.last_hidden_state)
    return CrossLMMEncodedMedia(
        last_hidden_state=original[0] if len(original) == 1 else torch.cat(original),
        pooler_output=tuple(pooled for output in outputs for pooled in output.pooler_output),  # type: ignore[arg-type]
        frame_index=None if index is None else tuple(index),
    )


def join_pixels(rows: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Joins the media inputs of several rows, each with those of its own media, to those of a batch:
    `pixel_values_videos`, `video_num_frames`, `pixel_values` and, if a row has one, `video_frame_index`."""
    rows, joined = list(rows), {}
    for name in ("pixel_values_videos", "video_num_frames", "pixel_values"):
        tensors = [torch.as_tensor(row[name]) for row in rows if row.get(name) is not None]
        if tensors:
            joined[name] = torch.cat(tensors)
    if (index := join_frame_index(rows)) is not None:
        joined["video_frame_index"] = index
    return joined


def join_frame_index(rows: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
    """`video_frame_index` of a batch of such rows, counted over the pixels of all; None if no row has one."""
    if all(row.get("video_frame_index") is None for row in rows):
        return None
    shown, before = [], 0
    for row in rows:
        pixels, index = row.get("pixel_values_videos"), row.get("video_frame_index")
        if pixels is not None:
            shown.append(before + (torch.arange(len(pixels)) if index is None else torch.as_tensor(index)))
            before += len(pixels)
    return torch.cat(shown)


def media_index(output: BaseModelOutputWithPooling) -> tuple[int, ...]:
    """For each entry of `pooler_output`, its medium in `last_hidden_state`."""
    index = output.media_index if isinstance(output, CrossLMMEncodedMedia) else None
    return tuple(range(len(output.pooler_output))) if index is None else index


def frame_index(output: BaseModelOutputWithPooling) -> tuple[int, ...] | None:
    """For each frame of the media, its frame in `last_hidden_state`; None if each has its own."""
    return output.frame_index if isinstance(output, CrossLMMEncodedMedia) else None


def locate_media(
    media: EncodedMedia, masks: dict[str, torch.Tensor], past_length: int, *, tokens_per_frame: int
) -> tuple[list[list[Medium]], torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Assigns the media of a call to their placeholders.

    masks: placeholders (B, L) of each modality, as many as the media fill.
    Returns the media of each row in the order in which they begin, with positions counted from the start of the cache;
    the original tokens (F, N, D) in the order of rows and positions, each medium once, on the device of the masks (so
    that layers need not copy them in every step); the number of every frame within its medium; and, if unchanged
    frames were left out, the index into F of each frame.
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
    frames: dict[tuple[str, int], Sequence[int]] = {}  # of each medium, in its modality's `last_hidden_state`
    for modality, output in media.items():
        index, end = frame_index(output) or range(len(output.last_hidden_state)), 0
        for key in sorted(key for key in num_frames if key[0] == modality):
            frames[key] = index[end : end + num_frames[key]]
            end += num_frames[key]
    if len(media) == 1 and list(num_frames) == list(frames):
        (original,) = (output.last_hidden_state for output in media.values())  # already in order: no copy
    else:
        parts, end = [], 0
        for key in num_frames:
            first, last = min(frames[key]), max(frames[key]) + 1
            parts.append(media[key[0]].last_hidden_state[first:last])
            frames[key] = [end + frame - first for frame in frames[key]]
            end += last - first
        original = torch.cat(parts)
    shown = None
    if any(frame_index(output) is not None for output in media.values()):
        shown = torch.tensor([frame for key in num_frames for frame in frames[key]])
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
    if not original.is_meta:  # when costs are counted, only the ids are real
        original = original.to(masks[next(iter(media))].device)
    return rows, original, frame_numbers, shown


def number_placeholders(masks: dict[str, torch.Tensor], modalities: Iterable[str]) -> torch.Tensor:
    """Numbers the placeholders through all modalities: (B, L), the pooled token of each position, -1 for no token."""
    numbers, counted = None, 0
    for modality in modalities:
        mask = masks[modality]
        order = mask.flatten().cumsum(0).view_as(mask) - 1 + counted
        numbers = torch.where(mask, order, -1 if numbers is None else numbers)
        counted = counted + mask.sum()
    return numbers


def save_encoded_media(media: EncodedMedia, path: str | os.PathLike) -> None:
    """Writes encoded media to one safetensors file, for later questions without the video.

    media: the outputs of `get_video_features` and `get_image_features`, {"video": …, "image": …}.
    """
    tensors, metadata = {}, {}
    for modality, output in media.items():
        tensors[f"{modality}.original"] = output.last_hidden_state.contiguous()
        tensors[f"{modality}.pooled"] = torch.cat(list(output.pooler_output)).contiguous()
        metadata[f"{modality}.tokens"] = ",".join(str(len(tokens)) for tokens in output.pooler_output)
        if (index := frame_index(output)) is not None:
            tensors[f"{modality}.frames"] = torch.tensor(index)
    save_file(tensors, path, metadata={"format": "pt", **metadata})


def load_encoded_media(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, CrossLMMEncodedMedia]:
    """Reads a file of `save_encoded_media`; the result can be passed as `mm_encoder_outputs`.

    Raises ValueError if the file holds no encoded media.
    """
    media = {}
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        for name, lengths in metadata.items():
            modality, dot, kind = name.partition(".")
            if dot and kind == "tokens":
                pooled = file.get_tensor(f"{modality}.pooled").split([int(length) for length in lengths.split(",")])
                frames = f"{modality}.frames"
                media[modality] = CrossLMMEncodedMedia(
                    last_hidden_state=file.get_tensor(f"{modality}.original"),
                    pooler_output=tuple(pooled),
                    frame_index=tuple(file.get_tensor(frames).tolist()) if frames in file.keys() else None,  # noqa: SIM118
                )
    if not media:
        raise ValueError(f"{os.fspath(path)!r} holds no encoded media; write it with `save_encoded_media`.")
    return media


__all__ = ["CrossLMMEncodedMedia", "encode_video", "load_encoded_media", "save_encoded_media"]
