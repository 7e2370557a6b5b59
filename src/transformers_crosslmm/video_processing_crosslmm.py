"""Converts videos in any form to model inputs: samples, resizes and normalises frames.

Shapes: T frames of one video, F frames of all videos together, (H, W) a frame's own size, (S, S) the vision tower's.
"""

import reprlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Annotated, Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor
from torch.nn import functional as F
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import VideosKwargs
from transformers.utils.type_validators import positive_int
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoMetadata

from .frames_crosslmm import (
    SAMPLING_KWARGS,
    CrossLMMVideoMetadata,
    FrameChunk,
    FrameSampling,
    GivenVideo,
    UnchangedFrames,
    flatten_metadata,
    flatten_videos,
    open_video,
)
from .video_decoding import VideoLimits
from .video_source import DEFAULT_LIMITS

FRAMES_COMPARED_AT_ONCE = 16
INTERPOLATION_MODES = {
    PILImageResampling.NEAREST: "nearest-exact",
    PILImageResampling.BILINEAR: "bilinear",
    PILImageResampling.BICUBIC: "bicubic",
}


class CrossLMMVideosKwargs(VideosKwargs, total=False):
    """Keyword arguments of Transformers' video processors, and:

    max_frames: with `fps`, the most frames; a longer video is sampled uniformly with this many.
    times: the moments to sample, in seconds, instead of `num_frames` or `fps`.
    start_seconds, end_seconds: the part of the video to sample from.
    strict: whether to raise VideoDecodeError for a frame of a file that cannot be decoded, instead of a warning and
        False in `frames_valid` of the metadata.
    skip_unchanged: whether to leave out frames equal to the last kept one: False, True (equal pixels after resizing)
        or the largest difference of a pixel in grey levels.
    limits: of time, memory and size for reading one video or picture; never saved, because they suit one machine.
    """

    max_frames: Annotated[int | None, positive_int()]
    times: list[int | float] | tuple[int | float, ...] | None
    start_seconds: int | float | None
    end_seconds: int | float | None
    strict: bool | None
    skip_unchanged: bool | int | float | None
    limits: VideoLimits | None


class VideoStream:
    """Pixels of one video, in chunks of frames; created by `CrossLMMVideoProcessor.stream`.

    Every iteration decodes the video again and yields (t, 3, S, S) float32. A chunk is decoded when it is requested
    and not stored, so one chunk is in memory at a time if the caller drops the previous one.

    source: the video as the caller passed it.
    metadata, num_frames: of the frames read so far, from the first chunk on.
    frame_index: with `skip_unchanged`, where only distinct frames are yielded, the index of each frame among them.
    expected_num_frames: the estimate for the whole video; known after `begin`.
    """

    def __init__(
        self, source: Any, read: Callable[[], Iterator[FrameChunk]], finish: Callable[[Tensor], Tensor]
    ) -> None:
        self.source = source
        self.metadata = CrossLMMVideoMetadata(total_num_frames=0)
        self.num_frames = self.expected_num_frames = 0
        self.frame_index: list[int] | None = None
        self._read, self._finish = read, finish
        self._begun: tuple[list[FrameChunk], Iterator[FrameChunk]] | None = None

    def begin(self) -> None:
        """Decodes the first chunk, so that errors are raised now and `expected_num_frames` is known."""
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
        yield self._finished(ahead.pop())
        yield from filter(len, map(self._finished, chunks))  # a chunk may have no new frames

    def _finished(self, chunk: FrameChunk) -> Tensor:
        if self.num_frames == 0:
            self.metadata, self.frame_index = chunk.metadata, chunk.frame_index
        else:
            if self.frame_index is not None:
                self.frame_index += chunk.frame_index or []
            for name in ("frames_indices", "frame_times", "frames_valid"):
                known = getattr(self.metadata, name)
                if known is not None:
                    known += getattr(chunk.metadata, name)
        self.num_frames += len(chunk.frames if chunk.frame_index is None else chunk.frame_index)
        return self._finish(chunk.frames)

    @property
    def times(self) -> list[float] | None:
        """Seconds of each frame from the start of the clip; None if the clip has no clock."""
        return self.metadata.frame_times

    @property
    def pixels(self) -> Tensor:
        """All chunks in one tensor, (T, 3, S, S)."""
        return torch.cat(list(self))


class CrossLMMVideoProcessor(VideoProcessorMixin):
    """Samples, resizes, rescales and normalises videos for SigLIP, frame by frame. Needs neither torchvision nor
    torchcodec.

    Videos: paths, `file://` and `data:` URIs, http(s) URLs, bytes, file objects, arrays or tensors (T, H, W, 3) or
    (T, 3, H, W), lists of frames (PIL, arrays) or of picture files, torchcodec decoders; flat, or one list per sample.
    A list of names of picture files is one video. Floats are in 0..1 or 0..255, integers in 0..255, 16-bit ones also
    in 0..65535. Frames can be passed in a tuple with their metadata, and any video in a mapping with its own options,
    which override those of the call: {"video": "clip.mp4", "fps": 2}. `sample_fps` there is the rate at which a list
    of frames was sampled: all of them are kept.

    Sampling: `num_frames=n` samples the middles of n equal shares, `fps=f` every 1/f seconds and at most `max_frames`
    moments (then uniformly), `times` the given seconds. The frame at t is the last one shown at or before t, and each
    frame is used once. The option that is passed clears the defaults of the others. Default: 1 fps, at most 256
    frames. Frames in memory follow the same rule if `video_metadata` has `fps`; without it `num_frames` samples
    uniformly, seconds are refused, and by default all frames are kept, thinned uniformly to `max_frames`.

    Returns `pixel_values_videos` (F, 3, S, S) float32 and `video_num_frames` (videos,). With `skip_unchanged` the
    pixels are those of distinct frames only, and `video_frame_index` gives for every frame its index among them:
    `pixel_values_videos[video_frame_index]` are all frames, and `video_num_frames` counts all.
    """

    valid_kwargs = CrossLMMVideosKwargs
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
    skip_unchanged: bool | float = False
    limits: VideoLimits | None = None

    def __init__(self, **kwargs: Any) -> None:
        if self._auto_class is None:
            kwargs.pop("auto_map", None)  # it names code in a checkpoint's folder, but the package's code runs
        super().__init__(**kwargs)
        # Not done by the mixin; without this call only the class name would be saved.
        self._set_attributes(**kwargs)
        if kwargs.get("num_frames") is not None:
            _refuse_two_rates(num_frames=kwargs["num_frames"], fps=kwargs.get("fps"))
            self.fps = None

    @property
    def model_input_names(self) -> list[str]:  # type: ignore[override]
        """Names of the model inputs that `preprocess` returns."""
        names = ["pixel_values_videos", "video_num_frames"]
        return names if self.skip_unchanged is False else [*names, "video_frame_index"]

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """Loads as in Transformers; a passed `fps` clears a saved `num_frames` and the other way round."""
        if kwargs.get("num_frames") is not None or kwargs.get("fps") is not None:
            video_processor_dict = video_processor_dict | {"num_frames": None, "fps": None}
        return super().from_dict(video_processor_dict, **kwargs)

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Converts videos to pixels; see the class for inputs and outputs, `CrossLMMVideosKwargs` for the options.

        With `return_metadata=True` also returns `video_metadata`, a `CrossLMMVideoMetadata` per video. Raises
        ValueError or TypeError for contradicting options, for videos without frames or with a wrong rank, layout or
        value range, and for sampling in seconds without a clock; VideoError for files that cannot be decoded.
        """
        read, options = self._readers(videos, None, kwargs)
        streams = [VideoStream(video, chunks, _identity) for video, chunks in read]
        frames = [list(stream) for stream in streams]
        features: dict[str, Any] = {
            "pixel_values_videos": self._normalised([chunk for chunks in frames for chunk in chunks], options),
            "video_num_frames": torch.tensor([stream.num_frames for stream in streams]),
        }
        if options["skip_unchanged"] is not False:
            before = accumulate((sum(map(len, chunks)) for chunks in frames), initial=0)  # distinct frames
            shown = [torch.tensor(stream.frame_index) + start for stream, start in zip(streams, before, strict=False)]
            features["video_frame_index"] = torch.cat(shown)
        if options["return_metadata"]:
            features["video_metadata"] = [stream.metadata for stream in streams]
        return BatchFeature(features, tensor_type=options["return_tensors"], skip_tensor_conversion=["video_metadata"])

    def stream(self, videos: Any, *, chunk_size: int = 16, **kwargs: Any) -> list[VideoStream]:
        """Returns a `VideoStream` per video, which gives the same pixels in chunks of at most `chunk_size` frames, for
        videos that do not fit in memory. Checks everything that needs no decoding; raises as `preprocess`.

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
        """Checks all options; returns each video's source with its reader, and the options."""
        validate_typed_dict(self.valid_kwargs, kwargs)  # type: ignore[type-var]
        asked = {name: kwargs.pop(name, None) for name in SAMPLING_KWARGS}
        for name in self.valid_kwargs.__annotations__:
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self, name, None)
        options = self._standardize_kwargs(**kwargs)
        self._check_options(**options)

        given = [GivenVideo.of(video) for video in flatten_videos(videos)]
        if not given:
            raise ValueError("`videos` needs at least one video; got none.")
        metadata = flatten_metadata(options["video_metadata"], num_videos=len(given))
        resize = (
            partial(_resize, size=options["size"], resample=options["resample"]) if options["do_resize"] else _identity
        )
        if options["skip_unchanged"] is not False:  # always in chunks, so that skipped frames are freed
            chunk_size = chunk_size or FRAMES_COMPARED_AT_ONCE
        readers: list[tuple[Any, Callable[[], Iterator[FrameChunk]]]] = []
        for video, about in zip(given, metadata, strict=True):
            sampling = self._sampling_of(video, asked, do_sample_frames=options["do_sample_frames"])
            read = open_video(
                video if video.metadata is not None else replace(video, metadata=about),
                layout=options["input_data_format"],
                do_rescale=options["do_rescale"],
                strict=options["strict"],
                limits=options["limits"] or DEFAULT_LIMITS,
            )
            chunks = partial(read, sampling, resize, chunk_size)
            readers.append((video.source, partial(_distinct_frames, chunks, options["skip_unchanged"])))
        return readers, options

    def _sampling_of(
        self, video: GivenVideo, asked: dict[str, Any], *, do_sample_frames: bool
    ) -> FrameSampling | None:
        """The sampling of one video; its own options override those of the call."""
        own = dict(video.options or {})
        if not own:
            return self._sampling(**asked) if do_sample_frames and not video.keeps_all else None
        for name, value in own.items():
            try:
                validate_typed_dict(self.valid_kwargs, {name: value})  # type: ignore[type-var]
            except StrictDataclassFieldValidationError as error:  # its text contains the whole value
                raise ValueError(f"`{name}` of a video takes numbers; got {reprlib.repr(value)}.") from error
        if "times" in own:
            asked = {}
        elif own.keys() & {"num_frames", "fps"}:
            asked = asked | {"num_frames": None, "fps": None, "times": None}
        return self._sampling(**asked | own)

    def sample_frames(  # type: ignore[override]
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Numbers of the frames that would be sampled from a clip, by the rules of this class.

        kwargs: more of `SAMPLING_KWARGS`; others are ignored.
        """
        kwargs = {name: kwargs[name] for name in SAMPLING_KWARGS if name in kwargs}
        sampling = self._sampling(num_frames=num_frames, fps=fps, **kwargs)
        return np.array(sampling.frames_of(range(metadata.total_num_frames), metadata))

    def to_dict(self) -> dict[str, Any]:
        """All attributes as in Transformers, without `limits`."""
        saved = super().to_dict()
        saved.pop("limits", None)
        return saved

    def _sampling(
        self,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        times: list[float] | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
    ) -> FrameSampling:
        """Completes the caller's sampling options with the processor's defaults."""
        _refuse_two_rates(num_frames=num_frames, fps=fps, times=times)
        if times is not None:
            others = {"max_frames": max_frames, "start_seconds": start_seconds, "end_seconds": end_seconds}
            if any(value is not None for value in others.values()):
                raise ValueError(
                    f"`times` names every moment, so no other option can restrict it; got {others}. Leave them out."
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
        skip_unchanged: bool | float,
        **others: Any,
    ) -> None:
        self._validate_preprocess_kwargs(do_resize=do_resize, size=size, resample=resample, **others)
        if do_center_crop or do_pad:
            raise ValueError(
                "SigLIP encodes the whole frame: `do_center_crop` and `do_pad` must be off; got "
                f"do_center_crop={do_center_crop}, do_pad={do_pad}."
            )
        if not 0 <= skip_unchanged <= 255:  # true for NaN too
            raise ValueError(
                f"`skip_unchanged` is False, True or a number of grey levels between 0 and 255; got {skip_unchanged}."
            )
        if do_resize and not (size.height and size.width):
            raise ValueError(f'`size` must name a "height" and a "width", in pixels; got {dict(size)}.')
        if do_resize and resample not in INTERPOLATION_MODES:
            names = ", ".join(mode.name for mode in INTERPOLATION_MODES)
            raise ValueError(f"`resample` must be one of {names}; got {resample!r}.")

    def _normalised(self, videos: list[Tensor], options: dict[str, Any]) -> Tensor:
        """Rescales and normalises frames (T, 3, S, S) per video to (F, 3, S, S) float32."""
        shapes = sorted({tuple(frames.shape[1:]) for frames in videos})
        if len(shapes) > 1:
            raise ValueError(f"Without `do_resize` all videos must have the same frame size; got {shapes}.")
        pixels = torch.empty(sum(len(frames) for frames in videos), *shapes[0], dtype=torch.float32)
        for room, frames in zip(pixels.split([len(frames) for frames in videos]), videos, strict=True):
            room[:] = frames
        if options["do_rescale"]:
            pixels *= options["rescale_factor"]
        if options["do_normalize"]:
            pixels -= torch.tensor(options["image_mean"]).view(-1, 1, 1)
            pixels /= torch.tensor(options["image_std"]).view(-1, 1, 1)
        return pixels.to(options["device"])


def _resize(frame: Tensor, *, size: Any, resample: int) -> Tensor:
    """Resizes (3, H, W) to (3, S, S) of the same dtype; differs from PIL by at most one grey level."""
    if frame.shape[-2:] == (size.height, size.width):
        return frame
    mode = INTERPOLATION_MODES[PILImageResampling(resample)]
    antialias = mode != "nearest-exact"
    return F.interpolate(frame[None], size=(size.height, size.width), mode=mode, antialias=antialias)[0]


def _distinct_frames(read: Callable[[], Iterator[FrameChunk]], skip_unchanged: bool | float) -> Iterator[FrameChunk]:
    """Reads chunks of frames, without those that `skip_unchanged` leaves out."""
    if skip_unchanged is False:
        return read()
    return map(UnchangedFrames(skip_unchanged), read())


def _identity(frame: Tensor) -> Tensor:
    return frame


def _refuse_two_rates(**rates: Any) -> None:
    given = {name: value for name, value in rates.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{', '.join(f'`{name}`' for name in rates)} exclude each other; got {given}. Pass one.")
