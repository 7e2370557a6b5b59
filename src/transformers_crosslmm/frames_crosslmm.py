"""Videos and pictures in every supported form: reading their sources, sampling frames, decoding frames to pixels.

Shapes: T frames of one video, (H, W) a frame's own size.
"""

import math
import os
import reprlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, pairwise
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_utils import ChannelDimension
from transformers.video_utils import VideoMetadata

from .video_decoding import DecodedVideo, FrameTransform, VideoLimits, VideoOpenError, decode_video, iter_video
from .video_packets import Request
from .video_source import VideoError, open_source, shown

# Moments closer than this are equal, because i / fps and start + k / f round differently.
SAME_MOMENT_SECONDS = 1e-6
SAMPLING_KWARGS = ("num_frames", "fps", "max_frames", "times", "start_seconds", "end_seconds")
QWEN_NAMES = {"nframes": "num_frames", "video_start": "start_seconds", "video_end": "end_seconds"}
"""Names of video options in qwen-vl-utils, and ours."""
VIDEO_OPTIONS = (*SAMPLING_KWARGS, *QWEN_NAMES, "sample_fps")
SOURCES = ("path", "url", "base64", "bytes", "array")
"""Keys under which a mapping may hold its source, besides "video" and "image"."""
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass
class CrossLMMVideoMetadata(VideoMetadata):
    """Transformers' `VideoMetadata`, with the position of each sampled frame in the clip and in the model's input.

    frame_times: seconds of each sampled frame from the start of the clip; None if the clip has no clock.
    frames_valid: for each sampled frame of a file, whether it could be decoded; otherwise its pixels are wrong.
        None for frames that were passed in decoded.
    patch_grid, pooled_grid: (rows, columns) per frame, of patches and of pooled tokens.
    sample_index: the row of `input_ids` with the video; token_spans: the tokens of each frame there, [start, end).
    """

    frame_times: list[float] | None = None
    frames_valid: list[bool] | None = None
    patch_grid: tuple[int, int] | None = None
    pooled_grid: tuple[int, int] | None = None
    pooling_mode: str | None = None
    sample_index: int | None = None
    token_spans: list[tuple[int, int]] | None = None

    @property
    def timestamps(self) -> list[float]:
        """Seconds of the sampled frames, from the file's clock if known; the base class assumes a constant rate."""
        return super().timestamps if self.frame_times is None else self.frame_times


def is_frame(item: Any) -> bool:
    """Whether an item is a PIL image, an array or tensor of rank 3, or a path or URI of a picture file."""
    if isinstance(item, str | os.PathLike):
        name = os.fspath(item)[:2000].lower() if isinstance(item, str) else os.fspath(item).lower()
        return name.startswith("data:image/") or name.partition("?")[0].endswith(PICTURE_SUFFIXES)
    return isinstance(item, Image.Image) or (isinstance(item, np.ndarray | Tensor) and item.ndim == 3)


def is_video(item: Any) -> bool:
    """Whether an item is one video given as a list of frames, or as a tuple of a video and its metadata."""
    if _has_metadata(item):
        return True
    return isinstance(item, list | tuple) and len(item) > 0 and all(is_frame(frame) for frame in item)


def _has_metadata(item: Any) -> bool:
    """Whether an item is a tuple whose second entry is a mapping of metadata (one that is not a video itself)."""
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[1], Mapping):
        return False
    return all(item[1][name] is None for name in item[1] if name in ("video", *SOURCES))


def is_nested(media: Any) -> bool:
    """Whether media are one list per sample (None or an empty list for a sample without media) and not a flat list."""
    return (
        isinstance(media, list | tuple)
        and len(media) > 0
        and not is_video(media)
        and all(sample is None or (isinstance(sample, list | tuple) and not is_video(sample)) for sample in media)
    )


def flatten_videos(videos: Any) -> list[Any]:
    """Flattens one video, a list of videos, one list per sample, or an array (videos, T, ...) to a list of videos."""
    if isinstance(videos, np.ndarray | Tensor) and videos.ndim == 5:
        return list(videos)
    if not isinstance(videos, list | tuple) or is_video(videos):
        return [videos]
    if is_nested(videos):
        return [video for sample in videos for video in (sample or [])]
    return list(videos)


def source_in(medium: Mapping, kind: str, options: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """Splits a mapping into its source (None if it has none) and its options. Entries that are None count as absent.

    kind: "video" or "image"; the source is under this key or one of `SOURCES`. Raises ValueError for two sources and
    for keys that are neither source nor option, so that nothing is ignored silently.
    """
    given = {key: value for key, value in medium.items() if value is not None and key not in ("type", "text")}
    sources = {key: given.pop(key) for key in (kind, *SOURCES) if key in given}
    if sources.keys() == {"bytes", "path"}:  # from `datasets` with decode=False: the path is the original place
        del sources["path"]
    if len(sources) > 1:
        raise ValueError(f"A part of a message holds one {kind}; got {', '.join(sources)}. Split it into parts.")
    unknown = [str(key)[:40] for key in given if key not in options]
    if unknown:
        takes = f"a {kind} takes {', '.join(options)}" if options else f"an {kind} has no options"
        raise ValueError(
            f"In addition to its source, {takes}; got {', '.join(unknown)}. Leave that out: every frame is resized to "
            "the vision tower's size, and the number of frames is set by `num_frames`."
        )
    for name, source in sources.items():
        return (f"data:;base64,{source}" if name == "base64" else source), given
    return None, given


@dataclass(frozen=True)
class GivenVideo:
    """One video of the caller, split into source, metadata and options.

    source: the frames, or a file with them. metadata: given for the frames, or None. options: those of `VIDEO_OPTIONS`
    given for this video, under the names in `SAMPLING_KWARGS`. keeps_all: the caller says that the frames are already
    sampled.
    """

    source: Any
    metadata: Mapping | None = None
    options: Mapping[str, Any] | None = None
    keeps_all: bool = False

    @classmethod
    def of(cls, video: Any) -> "GivenVideo":
        """Parses a video. Raises ValueError for mappings without exactly one source, and for contradicting options."""
        if _has_metadata(video):
            if not isinstance(video[0], list | tuple | np.ndarray | Tensor):
                raise ValueError("Metadata can only be passed with frames in memory; a file has its own.")
            metadata = dict(video[1])
            return cls(video[0], metadata, keeps_all=metadata.pop("do_sample_frames", None) is False)
        options: dict[str, Any] = {}
        while isinstance(video, Mapping):
            video, said = source_in(video, "video", VIDEO_OPTIONS)
            if video is None:
                raise ValueError(f"A video needs a source: one of video, {', '.join(SOURCES)}. Pass one.")
            for name, value in said.items():
                if options.setdefault(QWEN_NAMES.get(name, name), value) != value:
                    raise ValueError(f"`{QWEN_NAMES.get(name, name)}` of a video is given twice. Pass one.")
        taken_at = options.pop("sample_fps", None)
        if taken_at is None:
            return cls(video, None, options)
        if not isinstance(video, list | tuple | np.ndarray | Tensor):
            raise ValueError("`sample_fps` is the rate at which a list of frames was sampled. For a file pass `fps`.")
        return cls(video, {"fps": taken_at}, options, keeps_all=not options)


@dataclass(frozen=True)
class FrameSampling(Request):
    """The moments of a clip to sample (never every frame), with the fields of `CrossLMMVideosKwargs`.

    needs_clock: the caller gave seconds, so the clip must have a frame rate.
    """

    needs_clock: bool

    def frames_of(self, numbers: Sequence[int], about: VideoMetadata) -> list[int]:
        """Indices of the sampled frames, given the number of each frame in its clip. Raises ValueError for seconds
        without a frame rate."""
        if about.fps is not None:
            clock = [number / about.fps for number in numbers]
            return self.frames_at(clock, about.duration or about.total_num_frames / about.fps)
        if self.needs_clock:
            raise ValueError(
                "`fps`, `times`, `start_seconds` and `end_seconds` need the time of each frame; got frames without a "
                "frame rate. Pass `video_metadata` with `fps`, or sample by `num_frames`."
            )
        # For equal shares any clock works; this one has one frame per second.
        counts = (self.num_frames, self.max_frames, len(numbers))
        num_frames = next(count for count in counts if count is not None)
        uniform = replace(self, num_frames=num_frames, fps=None, max_frames=None)
        return uniform.frames_at(range(len(numbers)), float(len(numbers)))

    def frames_at(self, clock: Sequence[float], duration_seconds: float) -> list[int]:
        """Indices, without repeats, of the frames shown at the moments: the last with clock ≤ moment, or the first."""
        moments = self.moments(duration_seconds) or ()
        shown = [bisect_right(clock, moment + SAME_MOMENT_SECONDS) - 1 for moment in moments]
        return sorted({max(0, index) for index in shown})


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive frames of one video, (t, 3, H, W), with their metadata.

    expected_num_frames: the estimated number of frames of the whole video.
    frame_index: with unchanged frames skipped, for each frame of the chunk its index in the video's distinct frames;
        `frames` then holds the new ones only. None if no frame is skipped.
    """

    frames: Tensor
    metadata: CrossLMMVideoMetadata
    expected_num_frames: int
    frame_index: list[int] | None = None


class UnchangedFrames:
    """Removes unchanged frames from a video's chunks, which are passed in order.

    level: the largest difference of a pixel, in grey levels, from the last kept frame; True for 0. Comparing with that
    frame, and not with the previous one, prevents slow changes from adding up.
    """

    def __init__(self, level: bool | float) -> None:
        self.level = 0.0 if level is True else float(level)
        self.shown: Tensor | None = None
        self.num_distinct = 0

    def __call__(self, chunk: FrameChunk) -> FrameChunk:
        """Returns the chunk with its new frames and `frame_index`. Stores one frame and not the chunk."""
        new: list[int] = []
        index: list[int] = []
        for number, frame in enumerate(chunk.frames):
            if self.shown is None or not self._shows_the_same(frame, self.shown):
                self.shown = frame
                new.append(number)
            index.append(self.num_distinct + len(new) - 1)
        self.num_distinct += len(new)
        if new:
            self.shown = chunk.frames[new[-1]].clone()
        return replace(chunk, frames=chunk.frames if len(new) == len(index) else chunk.frames[new], frame_index=index)

    def _shows_the_same(self, frame: Tensor, shown: Tensor) -> bool:
        if self.level == 0 or frame.shape != shown.shape:
            return torch.equal(frame, shown)
        # uint8 cannot hold negative differences.
        return bool((torch.maximum(frame, shown) - torch.minimum(frame, shown)).max() <= self.level)


FrameReader = Callable[[FrameSampling | None, FrameTransform, int | None], Iterator[FrameChunk]]
"""Reads the sampled frames of a video (all frames without a sampling), transforms each when it is decoded, and yields
chunks of at most the given size (None: one chunk). It yields at least one chunk and stores none."""


class FramesInMemory:
    """A video passed as frames: an array (T, ...), a list of frames or of image files.

    Its clock is `metadata.fps`, with `metadata.frames_indices` if given; without `fps` it has no clock.
    """

    def __init__(
        self,
        frames: Any,
        metadata: Mapping | None = None,
        *,
        layout: str | None,
        do_rescale: bool,
        limits: VideoLimits,
    ) -> None:
        if not isinstance(frames, list | tuple) and frames.ndim != 4:
            raise ValueError(
                "A video is an array (T, H, W, 3) or (T, 3, H, W) or a list of frames; got an array of shape "
                f"{tuple(frames.shape)}."
            )
        if len(frames) == 0:
            raise ValueError("A video needs at least one frame; got none.")
        self.frames = frames
        arrays = [frame for frame in frames if isinstance(frame, np.ndarray | Tensor)]
        self.channels_last = bool(arrays) and _is_channels_last(arrays[0], layout)
        for array in arrays:
            if _is_channels_last(array, layout) != self.channels_last:
                raise ValueError(
                    f"All frames of a video need the same layout; got shapes {tuple(arrays[0].shape)} and "
                    f"{tuple(array.shape)}. Pass `input_data_format`."
                )
        self.limits, self.do_rescale = limits, do_rescale
        self.scales = _scales_of(arrays, do_rescale=do_rescale)

        said = {key: value for key, value in dict(metadata or {}).items() if value is not None}
        for name in ("fps", "duration"):
            if name in said and not (isinstance(said[name], Real) and 0 < said[name] < math.inf):
                raise ValueError(
                    f"`{name}` of `video_metadata`{', or `sample_fps`,' * (name == 'fps')} must be a positive number; "
                    f"got {reprlib.repr(said[name])}."
                )
        numbers = said.get("frames_indices")  # a list or, from Transformers' own readers, an array
        self.numbers: Sequence[int] = range(len(frames)) if numbers is None else [int(number) for number in numbers]
        if len(self.numbers) != len(frames):
            raise ValueError(
                f"`frames_indices` of `video_metadata` needs one number per frame; got {len(self.numbers)} for "
                f"{len(frames)} frames."
            )
        # The clip is at least as long as its last known frame.
        self.metadata = VideoMetadata(**{"total_num_frames": max(self.numbers) + 1} | said)
        if numbers is not None and not (
            all(first <= second for first, second in pairwise([0, *numbers, self.metadata.total_num_frames - 1]))
            and all(number == given for number, given in zip(self.numbers, numbers, strict=True))
        ):
            raise ValueError(
                "`frames_indices` of `video_metadata` must be whole numbers in ascending order, from 0 and below its "
                f"`total_num_frames`, {self.metadata.total_num_frames}; got {reprlib.repr(list(numbers))}."
            )
        if numbers is None and self.metadata.total_num_frames != len(frames):
            raise ValueError(
                f"`video_metadata` has {self.metadata.total_num_frames} frames, the video has {len(frames)}. "
                "Pass `frames_indices` with the number of each frame in the clip."
            )

    def read(
        self, sampling: FrameSampling | None, transform: FrameTransform, chunk_size: int | None
    ) -> Iterator[FrameChunk]:
        """A `FrameReader`. Raises ValueError for a sampling in seconds of frames without a clock."""
        chosen = list(range(len(self.frames))) if sampling is None else sampling.frames_of(self.numbers, self.metadata)
        fps, total = self.metadata.fps, self.metadata.total_num_frames
        first = self.frame(chosen[0])
        about = CrossLMMVideoMetadata(
            total_num_frames=total,
            fps=fps,
            duration=self.metadata.duration or (None if fps is None else total / fps),
            height=first.shape[-2],
            width=first.shape[-1],
            video_backend=self.metadata.video_backend,
        )
        frames = map(transform, chain([first], map(self.frame, chosen[1:])))
        chunk_size = chunk_size or len(chosen)
        for start in range(0, len(chosen), chunk_size):
            part = chosen[start : start + chunk_size]
            metadata = replace(
                about,
                frames_indices=[self.numbers[index] for index in part],
                frame_times=None if fps is None else [self.numbers[index] / fps for index in part],
            )
            yield FrameChunk(_stack(list(islice(frames, len(part)))), metadata, len(chosen))

    def frame(self, index: int) -> Tensor:
        """One frame as (3, H, W) uint8, or float32 if floats are not rescaled."""
        frame, scales, channels_last = self.frames[index], self.scales, self.channels_last
        if not isinstance(frame, np.ndarray | Tensor):
            frame = read_picture(frame, self.limits)
            scales, channels_last = _scales_of([frame], do_rescale=self.do_rescale), True
        frame = _as_tensor(frame)
        frame = frame.permute(2, 0, 1) if channels_last else frame
        scale = scales.of_floats if frame.is_floating_point() else scales.of_integers
        if scale is None:
            return frame.float()
        return (frame if scale == 1 else frame.float() * scale).round().to(torch.uint8)


def _read_decoder(
    decoder: Any, sampling: FrameSampling | None, transform: FrameTransform, chunk_size: int | None
) -> Iterator[FrameChunk]:
    """A `FrameReader` of a torchcodec `VideoDecoder`, as `datasets` returns it; torchcodec is not imported. Frames are
    decoded one by one, so that only one is in memory at full size."""
    about = decoder.metadata
    begin = about.begin_stream_seconds or 0.0
    duration = about.duration_seconds
    if about.end_stream_seconds is not None:
        duration = about.end_stream_seconds - begin
    moments = None if sampling is None else sampling.moments(duration)

    def frames() -> Iterator[tuple[float, Tensor]]:
        decoded: Iterator[Any]
        if moments is None:
            decoded = map(decoder.get_frame_at, range(len(decoder)))
        else:
            latest = begin + duration - SAME_MOMENT_SECONDS  # the end itself is after the last frame
            asked = (begin + max(0.0, moment) + SAME_MOMENT_SECONDS for moment in moments)
            decoded = (decoder.get_frame_played_at(min(moment, latest)) for moment in asked)
        last = -math.inf
        for frame in decoded:
            time = float(frame.pts_seconds) - begin
            if time > last:
                last = time
                pixels = frame.data.permute(2, 0, 1) if _is_channels_last(frame.data, None) else frame.data
                yield time, transform(pixels.cpu())
        if last == -math.inf:
            raise ValueError("A video needs at least one frame; the decoder has none.")

    def chunk(timed: list[tuple[float, Tensor]]) -> FrameChunk:
        fps, times = about.average_fps, [time for time, _ in timed]
        metadata = CrossLMMVideoMetadata(
            total_num_frames=about.num_frames,
            fps=fps,
            duration=duration,
            height=about.height,
            width=about.width,
            video_backend="torchcodec",
            frames_indices=None if fps is None else [round(time * fps) for time in times],
            frame_times=times,
        )
        expected = len(decoder) if moments is None else min(len(moments), len(decoder))
        return FrameChunk(_stack([frame for _, frame in timed]), metadata, expected)

    given = frames()
    return map(chunk, iter(lambda: list(islice(given, chunk_size)), []))


def frame_chunk(decoded: DecodedVideo, moments: Sequence[float] | None) -> FrameChunk:
    """Converts decoded frames to a chunk with metadata. moments: those sampled; None for all frames."""
    expected = decoded.total_num_frames if moments is None else min(decoded.total_num_frames, len(moments))
    metadata = CrossLMMVideoMetadata(
        total_num_frames=decoded.total_num_frames,
        fps=decoded.fps,
        duration=decoded.duration_seconds,
        height=decoded.height,
        width=decoded.width,
        video_backend="pyav",
        frames_indices=list(decoded.frame_indices),
        frame_times=list(decoded.times),
        frames_valid=decoded.valid.tolist(),
    )
    return FrameChunk(decoded.frames, metadata, expected)


def read_file(
    source: Any,
    sampling: FrameSampling | None,
    transform: FrameTransform,
    chunk_size: int | None,
    *,
    strict: bool,
    limits: VideoLimits,
    isolated: bool = False,
) -> Iterator[FrameChunk]:
    """A `FrameReader` of any source that `decode_video` opens; see there for options and errors."""
    options: dict[str, Any] = {"frame_transform": transform, "strict": strict, "limits": limits, "isolated": isolated}
    if sampling is not None:
        options |= {name: getattr(sampling, name) for name in SAMPLING_KWARGS}

    def chunk(decoded: DecodedVideo) -> FrameChunk:
        return frame_chunk(decoded, None if sampling is None else sampling.moments(decoded.duration_seconds))

    if chunk_size is None:
        return map(chunk, map(partial(decode_video, **options), [source]))
    return map(chunk, iter_video(source, chunk_size=chunk_size, **options))


def open_video(
    video: GivenVideo, *, layout: str | None, do_rescale: bool, strict: bool, limits: VideoLimits
) -> FrameReader:
    """Returns the reader for a video. Raises TypeError or ValueError for anything found wrong without decoding."""
    source = video.source
    if isinstance(source, list | tuple):
        for frame in source:
            if not is_frame(frame) and not isinstance(frame, str | os.PathLike):
                described = f"shape {tuple(frame.shape)}" if hasattr(frame, "shape") else type(frame).__name__
                raise ValueError(
                    f"A frame is a PIL image, an array (H, W, 3) or (3, H, W) or a path; got {described}."
                )
    if isinstance(source, list | tuple | np.ndarray | Tensor):
        return FramesInMemory(source, video.metadata, layout=layout, do_rescale=do_rescale, limits=limits).read
    if hasattr(source, "get_frame_played_at") and hasattr(source, "metadata"):
        return partial(_read_decoder, source)
    if _is_file(source):
        return partial(read_file, source, strict=strict, limits=limits)
    raise TypeError(
        "A video is a path, URL, bytes or file object, an array or tensor (T, H, W, 3) or (T, 3, H, W), a list of "
        f"frames, a torchcodec decoder or a mapping that holds one of them; got {type(source).__name__}."
    )


def _is_file(source: Any) -> bool:
    return isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read")


def flatten_metadata(metadata: Any, *, num_videos: int) -> list[Mapping | None]:
    """Flattens metadata (None, one mapping, a flat list or one list per sample) to one entry per video."""
    if metadata is None:
        return [None] * num_videos
    entries = [metadata] if isinstance(metadata, Mapping) else list(metadata)
    flat = [entry for item in entries for entry in (item if isinstance(item, list | tuple) else [item])]
    if len(flat) != num_videos:
        raise ValueError(
            f"`video_metadata` needs one entry per video; got {len(flat)} entries for {num_videos} videos."
        )
    return flat


def _is_channels_last(frames: np.ndarray | Tensor, layout: str | None) -> bool:
    """Whether frames are (..., H, W, 3) and not (..., 3, H, W); channels first if both fit, as in Transformers."""
    is_last = frames.shape[-3] != 3 if layout is None else ChannelDimension(layout) == ChannelDimension.LAST
    if frames.shape[-1 if is_last else -3] != 3 or 0 in frames.shape[-3:]:
        raise ValueError(
            f"Frames are RGB, (H, W, 3) or (3, H, W); got an array of shape {tuple(frames.shape)}"
            + ("." if layout is None else f" with input_data_format={layout!r}.")
        )
    return is_last


@dataclass(frozen=True)
class Scales:
    """Factors that turn floats (None: they are not changed) and integers into grey levels of 0..255."""

    of_floats: float | None
    of_integers: float


def _scales_of(arrays: Sequence[np.ndarray | Tensor], *, do_rescale: bool) -> Scales:
    """Finds the value range: floats in 0..1 or 0..255, integers in 0..255, unsigned 16-bit ones also in 0..65535.

    Decided once per video, so that a dark frame is not mistaken for one of the smaller range. Raises TypeError for
    other dtypes, ValueError for other values.
    """
    brightest = {True: 0.0, False: 0.0}  # of floats, of integers
    for array in arrays:
        dtype = str(array.dtype).removeprefix("torch.") if isinstance(array, Tensor) else array.dtype.name
        is_float = dtype.startswith(("float", "bfloat"))
        if not is_float and not dtype.startswith(("int", "uint")):
            raise TypeError(f"Frames hold integers or floats; got {array.dtype}.")
        if dtype == "uint8":
            continue
        values = array.to(torch.int32) if dtype == "uint16" and isinstance(array, Tensor) else array
        lowest, highest = float(values.min()), float(values.max())
        if not (lowest >= 0 and highest <= (65535 if dtype == "uint16" else 255)):  # true for NaN too
            raise ValueError(
                f"Frames hold values in 0..255, or floats in 0..1; got {lowest:g}..{highest:g}. Undo any "
                "normalisation first."
            )
        brightest[is_float] = max(brightest[is_float], highest)
    return Scales(
        of_floats=None if not do_rescale else 255.0 if brightest[True] <= 1 else 1.0,
        of_integers=1.0 if brightest[False] <= 255 else 1 / 257,
    )


def _as_tensor(frame: np.ndarray | Tensor) -> Tensor:
    if isinstance(frame, Tensor):
        frame = frame.detach().cpu()
        return frame.to(torch.int32) if frame.dtype == torch.uint16 else frame
    return torch.from_numpy(np.array(frame, dtype=np.int32 if frame.dtype.name == "uint16" else frame.dtype.name))


def read_picture(source: Any, limits: VideoLimits) -> np.ndarray:
    """Reads a PIL image or any source of a picture file as (H, W, 3), upright; grey pictures of more than 8 bits or of
    floats keep their values.

    Raises VideoError if it cannot be read. A string that is not a path may be base64.
    """
    if isinstance(source, str) and len(source) > 64 and ":" not in source and not os.path.exists(source):
        source = f"data:;base64,{source}"
    try:
        if isinstance(source, Image.Image):  # PIL may read its file only now
            return _upright(source)
        with open_source(source, limits) as file:
            return _upright(_opened_picture(file, limits))
    except (VideoError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise any class, such as TypeError for damaged EXIF
        what = shown(os.fspath(source)) if isinstance(source, str | os.PathLike) else "The data"
        raise VideoOpenError(f"{what} cannot be read as a picture. Check the file format.") from error


def _opened_picture(file: Any, limits: VideoLimits) -> Image.Image:
    picture = Image.open(file)
    if picture.width * picture.height > limits.max_pixels:
        raise VideoOpenError(
            f"The picture has {picture.width} x {picture.height} pixels, more than max_pixels={limits.max_pixels}. "
            "Pass `limits=VideoLimits(...)` with a higher value if that is intended."
        )
    if picture.format == "EPS":
        raise VideoOpenError("A picture must not be PostScript, a program that PIL has Ghostscript run. Convert it.")
    return picture


def _upright(picture: Image.Image) -> np.ndarray:
    picture = ImageOps.exif_transpose(picture)
    if 0 in picture.size:
        raise VideoOpenError(f"A picture needs pixels; got {picture.width} x {picture.height}.")
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return np.asarray(picture.convert("RGB"))
    grey = np.asarray(picture)
    if picture.mode == "I" and grey.min() >= 0 and grey.max() <= 65535:  # PIL opens some 16-bit pictures so
        grey = grey.astype(np.uint16)
    return np.stack([grey] * 3, axis=-1)


def picture_pixels(picture: Any, *, layout: str | None, do_rescale: bool, limits: VideoLimits) -> Tensor:
    """Converts one picture to (3, H, W) by the rules for a frame of a video: uint8, or float32 if not rescaled.

    picture: a PIL image, an array or tensor (H, W, 3) or (3, H, W), a path, URI, URL, base64 string, bytes, a file
    object, or a mapping that holds one of them.
    """
    while isinstance(picture, Mapping):
        picture, _ = source_in(picture, "image")
    if isinstance(picture, np.ndarray | Tensor) and picture.ndim != 3:
        raise ValueError(f"An image is (H, W, 3) or (3, H, W); got an array of shape {tuple(picture.shape)}.")
    if not isinstance(picture, Image.Image | np.ndarray | Tensor) and not _is_file(picture):
        raise TypeError(
            "An image is a PIL image, an array or tensor (H, W, 3) or (3, H, W), a path, URL, base64 string, bytes or "
            f"a file object; got {type(picture).__name__}."
        )
    return FramesInMemory([picture], layout=layout, do_rescale=do_rescale, limits=limits).frame(0)


def _stack(frames: list[Tensor]) -> Tensor:
    sizes = sorted({tuple(frame.shape) for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"Without `do_resize` all frames of a video must have the same size; got {sizes}.")
    return torch.stack(frames)
