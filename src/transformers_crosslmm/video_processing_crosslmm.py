"""Videos in any form to model inputs: which frames, which pixels.

Shapes: T frames of one video, F frames of all videos together, (H, W) a frame's own size, (S, S) the vision tower's.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict, load_image
from transformers.processing_utils import VideosKwargs
from transformers.utils.type_validators import positive_int
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoMetadata

from .video_decoding import DecodedVideo, decode_video, iter_video, sample_times

# Two moments closer than this are the same one: i / fps and start + k / f round differently.
SAME_MOMENT_SECONDS = 1e-6
SAMPLING_KWARGS = ("num_frames", "fps", "max_frames", "times", "start_seconds", "end_seconds")
INTERPOLATION_MODES = {
    PILImageResampling.NEAREST: "nearest-exact",
    PILImageResampling.BILINEAR: "bilinear",
    PILImageResampling.BICUBIC: "bicubic",
}


class CrossLMMVideosKwargs(VideosKwargs, total=False):
    """What Transformers' video processors take, and:

    max_frames: with `fps`, the most frames; a longer video is sampled uniformly at this many.
    times: the moments to look at, in seconds, instead of `num_frames` or `fps`.
    start_seconds, end_seconds: the part of the video to sample from.
    strict: raise VideoDecodeError where a frame of a file cannot be decoded, instead of a warning and False in
        `frames_valid` of the metadata.
    """

    max_frames: Annotated[int | None, positive_int()]
    times: list[int | float] | tuple[int | float, ...] | None
    start_seconds: int | float | None
    end_seconds: int | float | None
    strict: bool | None


@dataclass
class CrossLMMVideoMetadata(VideoMetadata):
    """Transformers' `VideoMetadata`, and where each sampled frame lies in the clip and in the model's input.

    frame_times: seconds of each sampled frame from the start of the clip, None when the clip has no clock.
    frames_valid: for each sampled frame of a file whether it could be decoded; the pixels of others are not right.
        None for frames that somebody else decoded.
    patch_grid, pooled_grid: (rows, columns) of patches, and of the tokens they are pooled to, per frame.
    sample_index: the row of `input_ids` that holds the video; token_spans: per frame its tokens there, [start, end).
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
        """Seconds of the sampled frames, from the file's own clock where the base class divides by a constant rate."""
        return super().timestamps if self.frame_times is None else self.frame_times


def is_frame(item: Any) -> bool:
    """True for a PIL image and for an array or tensor of rank 3."""
    return isinstance(item, Image.Image) or (isinstance(item, np.ndarray | Tensor) and item.ndim == 3)


def is_list_of_frames(item: Any) -> bool:
    """True for one video given as a list of frames."""
    return isinstance(item, list | tuple) and len(item) > 0 and all(is_frame(frame) for frame in item)


def is_nested(media: Any) -> bool:
    """True for media in one list per sample (None or an empty list: a sample without any), false for a flat list."""
    return (
        isinstance(media, list | tuple)
        and len(media) > 0
        and all(
            sample is None or (isinstance(sample, list | tuple) and not is_list_of_frames(sample)) for sample in media
        )
    )


def flatten_videos(videos: Any) -> list[Any]:
    """One video, a list of videos, one list per sample, or an array (videos, T, ...) as a flat list of videos."""
    if isinstance(videos, np.ndarray | Tensor) and videos.ndim == 5:
        return list(videos)
    if not isinstance(videos, list | tuple) or is_list_of_frames(videos):
        return [videos]
    if is_nested(videos):
        return [video for sample in videos for video in (sample or [])]
    return list(videos)


@dataclass(frozen=True)
class FrameSampling:
    """Which moments of a clip to look at; the words are those of `CrossLMMVideosKwargs`.

    needs_clock: the caller named seconds, so that a clip without a frame rate cannot serve.
    """

    num_frames: int | None
    fps: float | None
    max_frames: int | None
    times: list[float] | None
    start_seconds: float
    end_seconds: float | None
    needs_clock: bool

    def moments(self, duration_seconds: float) -> list[float]:
        """The moments, in seconds from the start of a clip of this length."""
        if self.times is not None:
            return self.times
        return sample_times(
            duration_seconds,
            num_frames=self.num_frames,
            fps=self.fps,
            max_frames=self.max_frames,
            start_seconds=self.start_seconds,
            end_seconds=self.end_seconds,
        )

    def frames_at(self, clock: Sequence[float], duration_seconds: float) -> list[int]:
        """Indices of the frames shown at the moments, each once: the last with clock ≤ moment, else the first."""
        shown = [bisect_right(clock, moment + SAME_MOMENT_SECONDS) - 1 for moment in self.moments(duration_seconds)]
        return sorted({max(0, index) for index in shown})


FrameTransform = Callable[[Tensor], Tensor]
"""What is done to each frame (3, H, W) as soon as it is decoded, so that full-size frames never pile up."""


@dataclass(frozen=True)
class FrameChunk:
    """Frames of one video that follow each other: (t, 3, H, W), and where they come from.

    expected_num_frames: how many the whole video will give, as far as can be told beforehand.
    """

    frames: Tensor
    metadata: CrossLMMVideoMetadata
    expected_num_frames: int


class VideoSource(Protocol):
    """A video that frames can be read from."""

    def read(
        self, sampling: FrameSampling | None, transform: FrameTransform, chunk_size: int | None
    ) -> Iterator[FrameChunk]:
        """The sampled frames (all without `sampling`), transformed and stacked, at most `chunk_size` at a time (None:
        all). At least one chunk, none kept once it is given."""


class FramesInMemory:
    """A video whose frames somebody has decoded: an array (T, ...), a list of frames or of image files.

    Its clock is `metadata.fps` (with `metadata.frames_indices`, if they number these frames); without it, none.
    """

    def __init__(self, frames: Any, metadata: Mapping | None, *, layout: str | None, do_rescale: bool) -> None:
        if not isinstance(frames, list | tuple) and frames.ndim != 4:
            raise ValueError(
                "A video is an array (T, H, W, 3) or (T, 3, H, W) or a list of frames; got an array of shape "
                f"{tuple(frames.shape)}."
            )
        if len(frames) == 0:
            raise ValueError("A video needs at least one frame; got none.")
        self.frames = frames
        arrays = [frame for frame in frames if isinstance(frame, np.ndarray | Tensor)]
        self.channels_last = [_is_channels_last(array, layout) for array in arrays[:1]] == [True]
        for array in arrays:
            if _is_channels_last(array, layout) != self.channels_last:
                raise ValueError(
                    f"All frames of a video need the same layout; got shapes {tuple(arrays[0].shape)} and "
                    f"{tuple(array.shape)}. Pass `input_data_format`."
                )
        self.level = _level_of(arrays, do_rescale=do_rescale)

        values = {"total_num_frames": len(frames)} | {k: v for k, v in dict(metadata or {}).items() if v is not None}
        self.metadata = VideoMetadata(**values)
        numbers = self.metadata.frames_indices  # a list or, from Transformers' own readers, an array
        self.numbers: Sequence[int] = range(len(frames)) if numbers is None else [int(number) for number in numbers]
        if numbers is None:
            if self.metadata.total_num_frames != len(frames):
                raise ValueError(
                    f"`video_metadata` speaks of {self.metadata.total_num_frames} frames, the video holds "
                    f"{len(frames)}. Pass `frames_indices` with the number of each frame in the clip."
                )
        elif len(self.numbers) != len(frames):
            raise ValueError(
                f"`frames_indices` of `video_metadata` needs one number per frame; got {len(self.numbers)} for "
                f"{len(frames)} frames."
            )

    def read(
        self, sampling: FrameSampling | None, transform: FrameTransform, chunk_size: int | None
    ) -> Iterator[FrameChunk]:
        """See `VideoSource`. Raises ValueError for seconds asked of frames without a clock."""
        chosen = self._chosen(sampling)
        fps, total = self.metadata.fps, self.metadata.total_num_frames
        first = self._frame(chosen[0])
        about = CrossLMMVideoMetadata(
            total_num_frames=total,
            fps=fps,
            duration=self.metadata.duration or (None if fps is None else total / fps),
            height=first.shape[-2],
            width=first.shape[-1],
            video_backend=self.metadata.video_backend,
        )
        chunk_size = chunk_size or len(chosen)
        for start in range(0, len(chosen), chunk_size):
            part = chosen[start : start + chunk_size]
            metadata = replace(
                about,
                frames_indices=[self.numbers[index] for index in part],
                frame_times=None if fps is None else [self.numbers[index] / fps for index in part],
            )
            yield FrameChunk(_stack([transform(self._frame(index)) for index in part]), metadata, len(chosen))

    def _chosen(self, sampling: FrameSampling | None) -> list[int]:
        """Indices of the sampled frames."""
        fps = self.metadata.fps
        if sampling is None:
            return list(range(len(self.frames)))
        if fps is not None:
            clock = [number / fps for number in self.numbers]
            return sampling.frames_at(clock, self.metadata.duration or self.metadata.total_num_frames / fps)
        if sampling.needs_clock:
            raise ValueError(
                "`fps`, `times`, `start_seconds` and `end_seconds` need to know when each frame was shown; got frames "
                "without a frame rate. Pass `video_metadata` with `fps`, or sample by `num_frames`."
            )
        # One frame a second is as good a clock as any for equal shares.
        counts = (sampling.num_frames, sampling.max_frames, len(self.frames))
        num_frames = next(count for count in counts if count is not None)
        uniform = replace(sampling, num_frames=num_frames, fps=None, max_frames=None)
        return uniform.frames_at(range(len(self.frames)), float(len(self.frames)))

    def _frame(self, index: int) -> Tensor:
        """(3, H, W) uint8, or float32 where the values are taken as they are."""
        frame = self.frames[index]
        if isinstance(frame, str | os.PathLike):
            frame = load_image(os.fspath(frame))
        if isinstance(frame, Image.Image):
            return torch.from_numpy(np.array(frame.convert("RGB"))).permute(2, 0, 1)
        frame = frame.detach().cpu() if isinstance(frame, Tensor) else torch.from_numpy(np.array(frame))
        frame = frame.permute(2, 0, 1) if self.channels_last else frame
        if not frame.is_floating_point():
            return frame.to(torch.uint8)
        return frame.float() if self.level is None else (frame.float() * self.level).round().to(torch.uint8)


class DecoderVideo:
    """A torchcodec `VideoDecoder`, as `datasets` hands them out: known by its methods, never imported."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def read(
        self, sampling: FrameSampling | None, transform: FrameTransform, chunk_size: int | None
    ) -> Iterator[FrameChunk]:
        """See `VideoSource`; frames are asked for one by one, so that full-size ones do not pile up."""
        about = self.decoder.metadata
        begin = about.begin_stream_seconds or 0.0
        duration = about.duration_seconds
        if about.end_stream_seconds is not None:
            duration = about.end_stream_seconds - begin
        moments = None if sampling is None else sampling.moments(duration)
        expected = len(self.decoder) if moments is None else min(len(moments), len(self.decoder))
        frames: list[Tensor] = []
        times: list[float] = []
        last = -math.inf

        def chunk() -> FrameChunk:
            nonlocal frames, times
            fps = about.average_fps
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
            stacked = _stack(frames)
            frames, times = [], []
            return FrameChunk(stacked, metadata, expected)

        for frame in self._frames(moments, begin, begin + duration):
            time = float(frame.pts_seconds) - begin
            if time <= last:
                continue
            if len(frames) == chunk_size:
                yield chunk()
            pixels = frame.data.permute(2, 0, 1) if _is_channels_last(frame.data, None) else frame.data
            frames.append(transform(pixels.cpu()))
            times.append(time)
            last = time
        if not frames:
            raise ValueError("A video needs at least one frame; the decoder holds none.")
        yield chunk()

    def _frames(self, moments: list[float] | None, begin: float, end: float) -> Iterator[Any]:
        if moments is None:
            yield from (self.decoder.get_frame_at(index) for index in range(len(self.decoder)))
            return
        latest = end - SAME_MOMENT_SECONDS  # the end itself is past the last frame
        for moment in moments:
            moment = max(0.0, moment) + SAME_MOMENT_SECONDS
            yield self.decoder.get_frame_played_at(min(begin + moment, latest))


def frame_chunk(decoded: DecodedVideo, moments: Sequence[float] | None) -> FrameChunk:
    """Frames as they came from the decoder, with their metadata. `moments`: those sampled; None for all frames."""
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


class VideoFile:
    """Anything `decode_video` opens: a path, URI, URL, bytes or file object."""

    def __init__(self, source: Any, *, strict: bool) -> None:
        self.source = source
        self.strict = strict

    def read(
        self, sampling: FrameSampling | None, transform: FrameTransform, chunk_size: int | None
    ) -> Iterator[FrameChunk]:
        """See `VideoSource`. Raises VideoError where the file cannot be decoded."""
        options: dict[str, Any] = {"frame_transform": transform, "strict": self.strict}
        if sampling is not None:
            options |= {name: getattr(sampling, name) for name in SAMPLING_KWARGS}

        def chunk(decoded: DecodedVideo) -> FrameChunk:
            return frame_chunk(decoded, None if sampling is None else sampling.moments(decoded.duration_seconds))

        if chunk_size is None:
            yield chunk(decode_video(self.source, **options))
        else:  # not a loop, whose variable would keep a chunk while the next is decoded
            yield from map(chunk, iter_video(self.source, chunk_size=chunk_size, **options))


class VideoStream:
    """Pixels of one video, a chunk of frames at a time; `CrossLMMVideoProcessor.stream` makes it.

    Iterating decodes the video, each time anew, and gives (t, 3, S, S) float32. A chunk is decoded when it is asked
    for, and nothing of it is kept here: with the last one dropped before, one is all there ever is.

    source: the video as it was given.
    metadata, num_frames: of the frames given so far, from the first chunk on.
    expected_num_frames: of the whole video, as far as can be told; there once it has begun.
    """

    def __init__(
        self, source: Any, read: Callable[[], Iterator[FrameChunk]], finish: Callable[[Tensor], Tensor]
    ) -> None:
        self.source = source
        self.metadata = CrossLMMVideoMetadata(total_num_frames=0)
        self.num_frames = self.expected_num_frames = 0
        self._read, self._finish = read, finish
        self._begun: tuple[list[FrameChunk], Iterator[FrameChunk]] | None = None

    def begin(self) -> None:
        """Decodes the first chunk now, so that a video that cannot be read says so, and how long it is."""
        if self._begun is None:
            chunks = self._read()
            ahead = next(chunks)
            self.expected_num_frames = ahead.expected_num_frames
            self._begun = [ahead], chunks

    def __iter__(self) -> Iterator[Tensor]:
        self.begin()
        assert self._begun is not None
        (ahead, chunks), self._begun = self._begun, None
        self.num_frames = 0
        yield self._given(ahead.pop())
        yield from map(self._given, chunks)

    def _given(self, chunk: FrameChunk) -> Tensor:
        if self.num_frames == 0:
            self.metadata = chunk.metadata
        else:
            for name in ("frames_indices", "frame_times", "frames_valid"):
                known = getattr(self.metadata, name)
                if known is not None:
                    known += getattr(chunk.metadata, name)
        self.num_frames += len(chunk.frames)
        return self._finish(chunk.frames)

    @property
    def times(self) -> list[float] | None:
        """Seconds of each frame from the start of the clip, None where the clip has no clock."""
        return self.metadata.frame_times

    @property
    def pixels(self) -> Tensor:
        """All chunks in one, (T, 3, S, S)."""
        return torch.cat(list(self))


class CrossLMMVideoProcessor(VideoProcessorMixin):
    """Samples, resizes, rescales and normalises videos for SigLIP, frame by frame. Needs neither torchvision nor
    torchcodec.

    Videos: paths, `file://` and `data:` URIs, http(s) URLs, bytes, file objects, arrays or tensors (T, H, W, 3) or
    (T, 3, H, W), lists of frames (PIL, arrays) or of image files, torchcodec decoders; flat, or one list per sample.
    Floats lie in 0..1 or 0..255.

    Sampling: `num_frames=n` looks at the middles of n equal shares, `fps=f` every 1/f seconds and at most at
    `max_frames` moments (then uniformly), `times` at the given seconds; a frame is the last one shown by then, and
    each frame comes once. The one that is passed clears the defaults of the others. Default: 1 fps, at most 256
    frames. Frames in memory follow the same rule given `video_metadata` with `fps`; without it `num_frames` picks
    uniformly, seconds are refused, and by default all frames are kept, uniformly thinned to `max_frames`.

    Returns `pixel_values_videos` (F, 3, S, S) float32 and `video_num_frames` (videos,).
    """

    valid_kwargs = CrossLMMVideosKwargs
    model_input_names = ["pixel_values_videos", "video_num_frames"]

    size: Any = {"height": 384, "width": 384}
    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_sample_frames = True
    num_frames: int | None = None
    fps: float | None = 1.0
    max_frames = 256
    strict = False

    def __init__(self, **kwargs: Any) -> None:
        if self._auto_class is None:
            kwargs.pop("auto_map", None)  # names code beside a checkpoint, which is not what runs here
        super().__init__(**kwargs)
        # The mixin leaves this to its subclasses; without it nothing but the class name would be saved.
        self._set_attributes(**kwargs)
        if kwargs.get("num_frames") is not None:
            _refuse_two_rates(num_frames=kwargs["num_frames"], fps=kwargs.get("fps"))
            self.fps = None

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """As in Transformers; an overriding `fps` clears a saved `num_frames` and the other way round."""
        if kwargs.get("num_frames") is not None or kwargs.get("fps") is not None:
            video_processor_dict = video_processor_dict | {"num_frames": None, "fps": None}
        return super().from_dict(video_processor_dict, **kwargs)

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Videos to pixels; see the class for what goes in and comes out, `CrossLMMVideosKwargs` for the options.

        With `return_metadata=True` also `video_metadata`, a `CrossLMMVideoMetadata` per video. Raises ValueError or
        TypeError for options that contradict each other, videos without frames, of a wrong rank, layout or value
        range, and seconds asked of frames without a clock; VideoError for files that cannot be decoded.
        """
        read, options = self._readers(videos, None, kwargs)
        chunks = [next(chunks()) for _, chunks in read]
        features: dict[str, Any] = {
            "pixel_values_videos": self._normalised([chunk.frames for chunk in chunks], options),
            "video_num_frames": torch.tensor([len(chunk.frames) for chunk in chunks]),
        }
        if options["return_metadata"]:
            features["video_metadata"] = [chunk.metadata for chunk in chunks]
        return BatchFeature(features, tensor_type=options["return_tensors"], skip_tensor_conversion=["video_metadata"])

    def stream(self, videos: Any, *, chunk_size: int = 16, **kwargs: Any) -> list[VideoStream]:
        """The same pixels, at most `chunk_size` frames at a time, for videos that are too long to be held: one
        `VideoStream` per video. What can be checked without decoding is checked now; see `preprocess`.

            [stream] = processor.video_processor.stream("hour.mp4", fps=1)
            encoded = encode_video(model, stream)  # for `mm_encoder_outputs={"video": encoded}`
        """
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1; got {chunk_size}.")
        read, options = self._readers(videos, chunk_size, kwargs)
        return [
            VideoStream(video, chunks, lambda frames: self._normalised([frames], options)) for video, chunks in read
        ]

    def _readers(
        self, videos: Any, chunk_size: int | None, kwargs: dict[str, Any]
    ) -> tuple[list[tuple[Any, Callable[[], Iterator[FrameChunk]]]], dict[str, Any]]:
        """Each video with what reads it, and all options, checked."""
        validate_typed_dict(self.valid_kwargs, kwargs)  # type: ignore[type-var]
        asked = {name: kwargs.pop(name, None) for name in SAMPLING_KWARGS}
        for name in self.valid_kwargs.__annotations__:
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self, name, None)
        options = self._standardize_kwargs(**kwargs)
        self._check_options(**options)
        sampling = self._sampling(**asked) if options["do_sample_frames"] else None

        flat_videos = flatten_videos(videos)
        if not flat_videos:
            raise ValueError("`videos` needs at least one video; got none.")
        flat_metadata = _flatten_metadata(options["video_metadata"], num_videos=len(flat_videos))
        sources = [_open(video, metadata, options) for video, metadata in zip(flat_videos, flat_metadata, strict=True)]
        resize = (
            partial(_resize, size=options["size"], resample=options["resample"]) if options["do_resize"] else _keep
        )
        readers = [partial(source.read, sampling, resize, chunk_size) for source in sources]
        return list(zip(flat_videos, readers, strict=True)), options

    def _sampling(
        self,
        *,
        num_frames: int | None,
        fps: float | None,
        max_frames: int | None,
        times: list[float] | None,
        start_seconds: float | None,
        end_seconds: float | None,
    ) -> FrameSampling:
        """What the caller asks for, completed by the processor's own attributes where the caller is silent."""
        _refuse_two_rates(num_frames=num_frames, fps=fps, times=times)
        if times is not None:
            others = {"max_frames": max_frames, "start_seconds": start_seconds, "end_seconds": end_seconds}
            if any(value is not None for value in others.values()):
                raise ValueError(
                    f"`times` names every moment, so nothing can narrow it; got {others}. Leave them out."
                )
            if not times:
                raise ValueError("`times` needs at least one moment; got none.")
        needs_clock = any(value is not None for value in (fps, times, start_seconds, end_seconds))
        if num_frames is None and fps is None and times is None:
            num_frames = self.num_frames
            default = type(self).fps if self.fps is None else self.fps
            fps = default if num_frames is None else None
        if num_frames is not None and max_frames is not None:
            num_frames = min(num_frames, max_frames)
        if max_frames is None:
            max_frames = self.max_frames
        return FrameSampling(
            num_frames=num_frames,
            fps=fps,
            max_frames=None if num_frames is not None or times is not None else max_frames,
            times=None if times is None else sorted(times),
            start_seconds=start_seconds or 0.0,
            end_seconds=end_seconds,
            needs_clock=needs_clock,
        )

    def _check_options(
        self,
        *,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool | None,
        do_pad: bool | None,
        **others: Any,
    ) -> None:
        self._validate_preprocess_kwargs(do_resize=do_resize, size=size, resample=resample, **others)
        if do_center_crop or do_pad:
            raise ValueError(
                "SigLIP sees the whole frame: `do_center_crop` and `do_pad` must be off; got "
                f"do_center_crop={do_center_crop}, do_pad={do_pad}."
            )
        if do_resize and not (size.height and size.width):
            raise ValueError(f'`size` must name a "height" and a "width", in pixels; got {dict(size)}.')
        if do_resize and resample not in INTERPOLATION_MODES:
            names = ", ".join(mode.name for mode in INTERPOLATION_MODES)
            raise ValueError(f"`resample` must be one of {names}; got {resample!r}.")

    def _normalised(self, videos: list[Tensor], options: dict[str, Any]) -> Tensor:
        """(F, 3, S, S) float32 of frames (T, 3, S, S) per video."""
        shapes = sorted({tuple(frames.shape[1:]) for frames in videos})
        if len(shapes) > 1:
            raise ValueError(f"Without `do_resize` all videos must have the same frame size; got {shapes}.")
        pixels = torch.empty(sum(len(frames) for frames in videos), *shapes[0], dtype=torch.float32)
        start = 0
        for frames in videos:
            pixels[start : start + len(frames)] = frames
            start += len(frames)
        if options["do_rescale"]:
            pixels *= options["rescale_factor"]
        if options["do_normalize"]:
            pixels -= torch.tensor(options["image_mean"]).view(-1, 1, 1)
            pixels /= torch.tensor(options["image_std"]).view(-1, 1, 1)
        return pixels.to(options["device"])


def _open(video: Any, metadata: Mapping | None, options: Mapping[str, Any]) -> VideoSource:
    """What reads this video; whatever can be checked without decoding is checked here."""
    if isinstance(video, Mapping):  # `datasets` with decode=False
        video = video["path"] if video.get("bytes") is None else video["bytes"]
    if isinstance(video, list | tuple):
        for frame in video:
            if not is_frame(frame) and not isinstance(frame, str | os.PathLike):
                described = f"shape {tuple(frame.shape)}" if hasattr(frame, "shape") else type(frame).__name__
                raise ValueError(
                    f"A frame is a PIL image, an array (H, W, 3) or (3, H, W) or a path; got {described}."
                )
    if isinstance(video, list | tuple | np.ndarray | Tensor):
        return FramesInMemory(video, metadata, layout=options["input_data_format"], do_rescale=options["do_rescale"])
    if hasattr(video, "get_frame_played_at") and hasattr(video, "metadata"):
        return DecoderVideo(video)
    if isinstance(video, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(video, "read"):
        return VideoFile(video, strict=options["strict"])
    raise TypeError(
        "A video is a path, URL, bytes or file object, an array or tensor (T, H, W, 3) or (T, 3, H, W), a list of "
        f"frames or a torchcodec decoder; got {type(video).__name__}."
    )


def _flatten_metadata(metadata: Any, *, num_videos: int) -> list[Mapping | None]:
    """One entry per video, from none at all, one mapping, a flat list or one list per sample."""
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
    """Whether (..., H, W, 3) rather than (..., 3, H, W); channels first where both fit, as in Transformers."""
    is_last = frames.shape[-3] != 3 if layout is None else ChannelDimension(layout) == ChannelDimension.LAST
    if frames.shape[-1 if is_last else -3] != 3 or 0 in frames.shape[-3:]:
        raise ValueError(
            f"Frames are RGB, (H, W, 3) or (3, H, W); got an array of shape {tuple(frames.shape)}"
            + ("." if layout is None else f" with input_data_format={layout!r}.")
        )
    return is_last


def _level_of(arrays: list[np.ndarray | Tensor], *, do_rescale: bool) -> float | None:
    """What turns a video's floats into grey levels: 255 where they lie in 0..1, else 1; None: leave them as they are.

    Decided once per video, so that a dark frame is not taken for one in 0..1. Raises for values outside of 0..255.
    """
    brightest = 0.0
    for array in arrays:
        is_float = array.dtype.kind == "f" if isinstance(array, np.ndarray) else array.is_floating_point()
        is_integer = str(array.dtype).removeprefix("torch.").startswith(("int", "uint"))
        if not is_float and not is_integer:
            raise TypeError(f"Frames hold integers or floats; got {array.dtype}.")
        if str(array.dtype).endswith("uint8"):
            continue
        lowest, highest = float(array.min()), float(array.max())
        if not (lowest >= 0 and highest <= 255):  # true for NaN too
            raise ValueError(
                f"Frames hold values in 0..255, or floats in 0..1; got {lowest:g}..{highest:g}. Undo any "
                "normalisation first."
            )
        if is_float:
            brightest = max(brightest, highest)
    if not do_rescale:
        return None
    return 255.0 if brightest <= 1 else 1.0


def _resize(frame: Tensor, *, size: Any, resample: int) -> Tensor:
    """(3, H, W) to (3, S, S) of the same dtype, as PIL does it within one grey level."""
    if frame.shape[-2:] == (size.height, size.width):
        return frame
    mode = INTERPOLATION_MODES[PILImageResampling(resample)]
    antialias = mode != "nearest-exact"
    return F.interpolate(frame[None], size=(size.height, size.width), mode=mode, antialias=antialias)[0]


def _keep(frame: Tensor) -> Tensor:
    return frame


def _stack(frames: list[Tensor]) -> Tensor:
    sizes = sorted({tuple(frame.shape) for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"Without `do_resize` all frames of a video must have the same size; got {sizes}.")
    return torch.stack(frames)


def _refuse_two_rates(**rates: Any) -> None:
    given = {name: value for name, value in rates.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{', '.join(f'`{name}`' for name in rates)} exclude each other; got {given}. Pass one.")
