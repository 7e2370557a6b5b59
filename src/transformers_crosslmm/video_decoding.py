"""Decodes frames of video files: exact in time, bounded in memory, and safe with untrusted files.

A frame is requested by time and found by its presentation timestamp: the frame at `t` is the last one due at or before
`t`. Times are seconds from the start of the video stream. Pixels are FFmpeg's own conversion to 8-bit RGB at full
size, rotated upright by the file's metadata; `frame_transform` is applied to each frame when it is decoded, so only
one full-size frame is in memory.

    video_source   opens sources, sets limits, refuses unsafe ones
    video_file     one stream of a file: packets, decoder, clock
    video_packets  chooses the packets to decode
    video_worker   decodes in a separate process (`isolated=True`)
    this file      public functions; converts pictures to tensors

These files import only the standard library and PyAV at their top, so that the worker process starts quickly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from .video_file import Picture
from .video_packets import Request, read_video, sample_times  # noqa: F401, imported from here
from .video_source import (  # noqa: F401, imported from here
    DEFAULT_LIMITS,
    RAISE_LIMITS,
    NoVideoStreamError,
    VideoDecodeError,
    VideoError,
    VideoLimitError,
    VideoLimits,
    VideoOpenError,
    VideoSource,
    VideoTimeoutError,
    open_source,
)
from .video_worker import read_video_in_worker

if TYPE_CHECKING:
    import torch

FrameTransform: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


class VideoDecodeWarning(UserWarning):
    """Some requested frames could not be decoded; they are False in `DecodedVideo.valid`."""


@dataclass(frozen=True)
class DecodedVideo:
    """Frames of one video, in order, with the video's properties.

    frames: (T, 3, H, W) uint8 RGB, or the output of `frame_transform`.
    times: presentation time of each frame, in seconds from the start of the stream.
    frame_indices: number of each frame in the video, by time: round(time * fps).
    valid: (T,) bool; False if a frame could not be decoded and its pixels are wrong.
    width, height: of the upright picture, before `frame_transform`.
    """

    frames: torch.Tensor
    times: list[float]
    frame_indices: list[int]
    valid: torch.Tensor
    fps: float
    duration_seconds: float
    total_num_frames: int
    width: int
    height: int
    codec: str


def decode_video(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    times: Iterable[float] | None = None,
    max_frames: int | None = None,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    frame_transform: FrameTransform | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
    num_threads: int = 1,
    strict: bool = False,
    isolated: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> DecodedVideo:
    """Decodes the frames of `source` at the requested moments.

    source: path, `file://`, `data:` or http(s) URI, the bytes of a file, or a binary file object (read from its
        start).
    num_frames, fps, times: at most one of them, see `sample_times`; `times` are seconds in ascending order. Without
        them, every frame due in [start_seconds, end_seconds).
    frame_transform: called with each (3, H, W) uint8 frame when it is decoded; returns tensors of one shape.
    num_threads: threads of the decoder; 0 lets FFmpeg choose.
    strict: whether to raise for a frame that cannot be decoded, instead of a warning and False in `valid`.
    isolated: whether to decode in a separate process with limits on memory and time, for untrusted files: a crash or
        a decompression bomb then ends only this call.
    on_wait: called at least four times a second while the call waits for the network or the process of `isolated`; an
        exception from it ends the call, the connection and the process.

    Each frame is returned once, so a clip with fewer frames than requested gives fewer.
    Raises a subclass of `VideoError`.
    """
    request = Request.check(num_frames, fps, times, max_frames, start_seconds, end_seconds)
    chunks = _chunks(source, None, request, frame_transform, limits, num_threads, strict, isolated, on_wait)
    with closing(chunks):
        return next(chunks)


def iter_video(
    source: VideoSource,
    *,
    chunk_size: int,
    num_frames: int | None = None,
    fps: float | None = None,
    times: Iterable[float] | None = None,
    max_frames: int | None = None,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    frame_transform: FrameTransform | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
    num_threads: int = 1,
    strict: bool = False,
    isolated: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> Iterator[DecodedVideo]:
    """Decodes as `decode_video` in chunks of `chunk_size` frames (the last may be shorter), each when requested."""
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1; got {chunk_size}.")
    request = Request.check(num_frames, fps, times, max_frames, start_seconds, end_seconds)
    return _chunks(source, chunk_size, request, frame_transform, limits, num_threads, strict, isolated, on_wait)


def _chunks(source, chunk_size, request, frame_transform, limits, num_threads, strict, isolated, on_wait):
    with open_source(source, limits, on_wait) as opened:
        if isolated:
            pictures = read_video_in_worker(opened, request, limits, num_threads, on_wait)
        else:
            pictures = read_video(opened, request, limits, num_threads)
        with closing(pictures):
            yield from _stack(next(pictures), pictures, chunk_size, frame_transform, limits, strict)


def _stack(info, pictures, chunk_size, frame_transform, limits, strict):
    import torch

    announced = info.num_wanted or info.total_num_frames
    num_returned, bad_times, trouble = 0, [], ""
    slots, seconds, valid, size = None, [], [], (info.width, info.height)

    def chunk():
        """Returns the frames since the last chunk and drops the references to them."""
        nonlocal slots, seconds, valid
        done = DecodedVideo(
            frames=slots[: len(seconds)],
            times=seconds,
            frame_indices=[round(moment * info.fps) for moment in seconds],
            valid=torch.tensor(valid, dtype=torch.bool),
            fps=info.fps,
            duration_seconds=info.duration_seconds,
            total_num_frames=info.total_num_frames,
            width=size[0],
            height=size[1],
            codec=info.codec,
        )
        slots, seconds, valid = None, [], []
        return done

    for picture in pictures:
        if isinstance(picture, str):
            trouble = picture
            break
        if num_returned == limits.max_frames:
            raise VideoLimitError(f"The call asks for more than max_frames={limits.max_frames} frames. {RAISE_LIMITS}")
        if not picture.valid:
            bad_times.append(picture.seconds)
            if strict:
                raise VideoDecodeError(
                    f"The frame at {picture.seconds:.3f} s cannot be decoded. Without `strict=True` it would be False "
                    "in `valid`."
                )
        size = (picture.height, picture.width) if picture.orientation[0] else (picture.width, picture.height)
        frame = _tensor(picture)
        if frame_transform is not None:
            frame = frame_transform(frame)
        if slots is None:
            capacity = min(chunk_size or announced, announced, limits.max_frames) or 1
            slots = _empty_slots(capacity, frame, limits)
        if frame.shape != slots.shape[1:]:
            raise VideoDecodeError(
                f"The frames change shape at {picture.seconds:.3f} s, from {tuple(slots.shape[1:])} to "
                f"{tuple(frame.shape)}. Pass a `frame_transform` that resizes to one shape."
            )
        if len(seconds) == len(slots):  # the file has more frames than it announces
            grown = _empty_slots(len(slots) + len(slots) // 2 + 1, frame, limits)
            grown[: len(slots)] = slots
            slots = grown
        slots[len(seconds)] = frame
        del frame  # so that it is not in memory while the caller uses a chunk
        seconds.append(picture.seconds)
        valid.append(picture.valid)
        num_returned += 1
        if len(seconds) == chunk_size:
            yield chunk()
    if bad_times:
        shown = ", ".join(f"{moment:.3f}" for moment in bad_times[:8]) + (", ..." if len(bad_times) > 8 else "")
        trouble = f"{len(bad_times)} of {num_returned} frames, at {shown} s, could not be decoded. {trouble}"
    if trouble:
        warnings.warn(f"The video is damaged: {trouble.strip()}", VideoDecodeWarning, stacklevel=4)
    if seconds:
        yield chunk()


def _empty_slots(count, frame, limits):
    import torch

    size = count * frame.numel() * frame.element_size()
    if size > limits.max_output_bytes:
        raise VideoLimitError(
            f"{count} frames of {tuple(frame.shape)} take {size} bytes, more than max_output_bytes="
            f"{limits.max_output_bytes}. Ask for fewer frames, resize them in `frame_transform`, or use `iter_video`."
        )
    return torch.empty((count, *frame.shape), dtype=frame.dtype, device=frame.device)


def _tensor(picture: Picture) -> torch.Tensor:
    """Converts a picture to (3, H, W) uint8, upright: a view of FFmpeg's memory, not a copy."""
    import torch

    if picture.pixels is None:
        frame = torch.zeros((picture.height, picture.width, 3), dtype=torch.uint8)
    else:
        rows = torch.frombuffer(picture.pixels, dtype=torch.uint8).view(picture.height, abs(picture.line_size))
        if picture.line_size < 0:  # stored bottom row first
            rows = rows.flip(0)
        frame = rows[:, : 3 * picture.width].unflatten(1, (picture.width, 3))
    frame = frame.permute(2, 0, 1)
    transpose, mirror, upside_down = picture.orientation
    if transpose:
        frame = frame.transpose(1, 2)
    flipped = [dim for dim, flip in ((2, mirror), (1, upside_down)) if flip]
    return frame.flip(flipped) if flipped else frame
