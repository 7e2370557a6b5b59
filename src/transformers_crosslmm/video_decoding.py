"""Video files to frames: exact, bounded in memory, and safe with files from strangers.

A frame is asked for by time and found by its presentation timestamp: the frame at `t` is the last one that is due at or
before `t`. Times are seconds from the start of the video stream. Pixels are FFmpeg's own conversion to 8-bit RGB at
full size, turned upright as the file asks; `frame_transform` is applied to each frame as soon as it is decoded, so that
full-size frames never pile up.

How (see docs/decisions.md): compressed packets are read ahead of the decoder until the wanted one is known, so that
decoding starts at the last keyframe before it and pictures that nothing depends on are skipped. A damaged group of
pictures is decoded again without skipping; what stays missing is reported, never filled in silently.

This file imports only the standard library and PyAV at its top, so that the worker process of `isolated=True`, which
runs this very file, starts quickly and can be given little memory.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import stat
import struct
import tempfile
import time
import urllib.parse
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import av
import av.error

if TYPE_CHECKING:
    import torch

VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"
FrameTransform: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


class VideoError(ValueError):
    """A video could not be read as asked."""


class VideoOpenError(VideoError):
    """The source cannot be opened, or is not a video file of a kind that is accepted."""


class NoVideoStreamError(VideoOpenError):
    """The file has no video stream (an audio file, a cover picture)."""


class VideoLimitError(VideoError):
    """The video is larger than a limit of `VideoLimits` allows."""


class VideoTimeoutError(VideoLimitError):
    """Decoding took longer than `VideoLimits.max_decode_seconds`."""


class VideoDecodeError(VideoError):
    """The file opened, but its pictures cannot be decoded."""


class VideoDecodeWarning(UserWarning):
    """Some frames asked for could not be decoded; `DecodedVideo.valid` says which."""


@dataclass(frozen=True)
class VideoLimits:
    """What one call may cost. The defaults let any ordinary video pass; lower them for files from strangers.

    max_bytes: size of the file, the data or the download.
    max_pixels: width times height of a picture; the default holds 8K.
    max_frames: frames that one call may return.
    max_output_bytes: size of the frames that `decode_video`, or one chunk of `iter_video`, holds.
    max_duration_seconds: length that the file announces.
    max_decode_seconds: time spent reading and decoding, checked between FFmpeg's calls (`isolated=True` is strict).
    max_redirects: how often an http(s) URL may lead to another one.
    allow_private_addresses: let URLs lead to this machine and to private networks.
    """

    max_bytes: int = 16 * 1024**3
    max_pixels: int = 8192 * 4320
    max_frames: int = 1_000_000
    max_output_bytes: int = 16 * 1024**3
    max_duration_seconds: float = 24 * 3600.0
    max_decode_seconds: float = 3600.0
    max_redirects: int = 5
    allow_private_addresses: bool = False


@dataclass(frozen=True)
class DecodedVideo:
    """Frames of one video, in order, with what is known of the video.

    frames: (T, 3, H, W) uint8 RGB, or what `frame_transform` made of it.
    times: presentation time of each frame, seconds from the start of the stream.
    frame_indices: number of each frame in the video, counted by time: round(time * fps).
    valid: (T,) bool; False where a frame could not be decoded and what stands in `frames` is not right.
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


def sample_times(
    duration_seconds: float,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
) -> list[float]:
    """Moments at which to look at a video, in seconds from its start.

    `num_frames=n`: the middles of n equal shares, start + (i + 1/2) * duration / n.
    `fps=f`: start + k / f before the end; where those are more than `max_frames`, `num_frames=max_frames` instead.
    The part looked at is [start_seconds, end_seconds), `end_seconds=None` the end of the video.

    Example: 10 s, num_frames=4 -> [1.25, 3.75, 6.25, 8.75]; 3 s, fps=1 -> [0, 1, 2].
    """
    if (num_frames is None) == (fps is None):
        raise ValueError(f"Pass exactly one of `num_frames` and `fps`; got num_frames={num_frames}, fps={fps}.")
    for name, count in (("num_frames", num_frames), ("max_frames", max_frames)):
        if count is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1; got {count}.")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"`fps` must be a positive number; got {fps}.")
    end = duration_seconds if end_seconds is None else min(end_seconds, duration_seconds)
    if not 0 <= start_seconds < end:
        raise ValueError(
            f"`start_seconds` must lie in the video and before `end_seconds`; got start_seconds={start_seconds}, "
            f"end_seconds={end_seconds} and a video of {duration_seconds:.3f} s."
        )
    duration = end - start_seconds
    if fps is not None:
        # The tolerance keeps k / fps == duration out when the product rounds up.
        count = max(1, math.ceil(duration * fps - 1e-6))
        if max_frames is None or count <= max_frames:
            return [start_seconds + k / fps for k in range(count)]
        num_frames = max_frames
    elif max_frames is not None:
        num_frames = min(num_frames, max_frames)
    return [start_seconds + (i + 0.5) * duration / num_frames for i in range(num_frames)]


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
    limits: VideoLimits = VideoLimits(),
    num_threads: int = 1,
    strict: bool = False,
    isolated: bool = False,
) -> DecodedVideo:
    """Decode the frames of `source` at the moments asked for.

    source: path, `file://`, `data:` or http(s) URI, the bytes of a file, or a binary file object (read from its start).
    num_frames, fps, times: at most one of them, see `sample_times`; `times` are seconds in ascending order. None of
        them: every frame due in [start_seconds, end_seconds).
    frame_transform: called with each (3, H, W) uint8 frame as it is decoded; returns tensors of one shape.
    num_threads: threads of the decoder; 0 lets FFmpeg choose.
    strict: raise where a frame cannot be decoded, instead of a warning and False in `valid`.
    isolated: decode in a process of its own under limits of memory and time, for files from strangers: a crash or a
        bomb costs this call alone.

    Each frame is returned once, so a clip that holds fewer frames than asked for gives fewer.
    Raises a subclass of `VideoError`.
    """
    chunks = _chunks(
        source,
        chunk_size=None,
        request=_Request.check(num_frames, fps, times, max_frames, start_seconds, end_seconds),
        frame_transform=frame_transform,
        limits=limits,
        num_threads=num_threads,
        strict=strict,
        isolated=isolated,
    )
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
    limits: VideoLimits = VideoLimits(),
    num_threads: int = 1,
    strict: bool = False,
    isolated: bool = False,
) -> Iterator[DecodedVideo]:
    """`decode_video` in chunks of `chunk_size` frames (the last may be shorter), each decoded when it is asked for."""
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1; got {chunk_size}.")
    return _chunks(
        source,
        chunk_size=chunk_size,
        request=_Request.check(num_frames, fps, times, max_frames, start_seconds, end_seconds),
        frame_transform=frame_transform,
        limits=limits,
        num_threads=num_threads,
        strict=strict,
        isolated=isolated,
    )


@dataclass(frozen=True)
class _Request:
    """Which frames: as the caller said it, checked."""

    num_frames: int | None
    fps: float | None
    times: list[float] | None
    max_frames: int | None
    start_seconds: float
    end_seconds: float | None

    @classmethod
    def check(cls, num_frames, fps, times, max_frames, start_seconds, end_seconds) -> _Request:
        given = {"num_frames": num_frames, "fps": fps, "times": times}
        if sum(value is not None for value in given.values()) > 1:
            raise ValueError(f"Pass at most one of `num_frames`, `fps` and `times`; got {given}.")
        if times is not None:
            times = [float(moment) for moment in times]
            if not times or not all(math.isfinite(moment) for moment in times) or times != sorted(times):
                raise ValueError(f"`times` must be seconds in ascending order, at least one; got {times[:8]}.")
        elif num_frames is not None or fps is not None:
            # The duration is not known yet; an endless one checks everything else.
            sample_times(
                1e12,
                num_frames=num_frames and 1,
                fps=fps,
                max_frames=1,
                start_seconds=start_seconds,
                end_seconds=end_seconds,
            )
            for name, count in (("num_frames", num_frames), ("max_frames", max_frames)):
                if count is not None and count < 1:
                    raise ValueError(f"`{name}` must be at least 1; got {count}.")
        return cls(num_frames, fps, times, max_frames, start_seconds, end_seconds)

    def moments(self, duration_seconds: float) -> list[float] | None:
        """Seconds from the start of the stream, or None for every frame."""
        if self.times is not None:
            return self.times
        if self.num_frames is None and self.fps is None:
            return None
        return sample_times(
            duration_seconds,
            num_frames=self.num_frames,
            fps=self.fps,
            max_frames=self.max_frames,
            start_seconds=self.start_seconds,
            end_seconds=self.end_seconds,
        )


@dataclass(frozen=True)
class _Picture:
    """One frame asked for, as rows of packed RGB; `pixels=None` where nothing could be decoded."""

    seconds: float
    pixels: memoryview | None
    width: int
    height: int
    line_size: int
    orientation: tuple[bool, bool, bool]  # transpose, then mirror left-right, then upside-down
    valid: bool


@dataclass(frozen=True)
class _Info:
    fps: float
    duration_seconds: float
    total_num_frames: int
    width: int
    height: int
    codec: str
    num_wanted: int | None  # None: every frame


# --- From pictures to tensors -----------------------------------------------------------------------------------------


def _chunks(source, *, chunk_size, request, frame_transform, limits, num_threads, strict, isolated):
    if isolated:
        raise NotImplementedError("isolated=True")
    with _opened(source, limits) as file:
        decoder = _Decoder(file, limits=limits, num_threads=num_threads)
        info, pictures = decoder.info(request), decoder.pictures(request)
        yield from _stack(info, pictures, chunk_size, frame_transform, limits, strict)


def _stack(info, pictures, chunk_size, frame_transform, limits, strict):
    import torch

    announced = info.num_wanted or info.total_num_frames
    num_returned, bad_times = 0, []
    slots, seconds, valid, size = None, [], [], (info.width, info.height)

    def chunk():
        return DecodedVideo(
            frames=slots[: len(seconds)],
            times=list(seconds),
            frame_indices=[round(moment * info.fps) for moment in seconds],
            valid=torch.tensor(valid, dtype=torch.bool),
            fps=info.fps,
            duration_seconds=info.duration_seconds,
            total_num_frames=info.total_num_frames,
            width=size[0],
            height=size[1],
            codec=info.codec,
        )

    for picture in pictures:
        if num_returned == limits.max_frames:
            raise VideoLimitError(
                f"The call asks for more than max_frames={limits.max_frames} frames. {_RAISE_LIMITS}"
            )
        if not picture.valid:
            bad_times.append(picture.seconds)
            if strict:
                raise VideoDecodeError(
                    f"The frame at {picture.seconds:.3f} s cannot be decoded. Without `strict=True` it is marked in "
                    "`valid` instead."
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
        if len(seconds) == len(slots):  # the file holds more frames than it announces
            grown = _empty_slots(len(slots) + len(slots) // 2 + 1, frame, limits)
            grown[: len(slots)] = slots
            slots = grown
        slots[len(seconds)] = frame
        seconds.append(picture.seconds)
        valid.append(picture.valid)
        num_returned += 1
        if len(seconds) == chunk_size:
            yield chunk()
            slots, seconds, valid = None, [], []
    if num_returned == 0:
        raise VideoDecodeError("No frame of the video can be decoded.")
    if bad_times:
        warnings.warn(
            f"{len(bad_times)} of {num_returned} frames could not be decoded and are marked in `valid`, at "
            + ", ".join(f"{moment:.3f}" for moment in bad_times[:8])
            + (" s." if len(bad_times) <= 8 else " s and later."),
            VideoDecodeWarning,
            stacklevel=4,
        )
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


def _tensor(picture: _Picture) -> torch.Tensor:
    """(3, H, W) uint8, upright; a view of FFmpeg's memory, so nothing is copied before `frame_transform`."""
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


# --- From a source to a file ------------------------------------------------------------------------------------------

_RAISE_LIMITS = "Pass `limits=VideoLimits(...)` with a higher value if that is intended."


@contextmanager
def _opened(source: VideoSource, limits: VideoLimits) -> Iterator[BinaryIO]:
    """A seekable binary file of at most `max_bytes`; closed at the end unless it is the caller's own."""
    if isinstance(source, (str, os.PathLike)):
        file, own = _open_named(os.fspath(source), limits), True
    elif isinstance(source, (bytes, bytearray, memoryview)):
        file, own = io.BytesIO(source), True
    elif callable(getattr(source, "read", None)):
        file, own = source, False
    else:
        raise TypeError(
            f"A video source is a path, a URI, bytes or a binary file object with read(); got {type(source).__name__}."
        )
    try:
        if not (hasattr(file, "seekable") and file.seekable()):
            file, own = _spooled(file, limits), True
        size = file.seek(0, os.SEEK_END)
        _check_size(size if isinstance(size, int) else file.tell(), limits)
        file.seek(0)
        yield file
    finally:
        if own:
            file.close()


def _open_named(name: str, limits: VideoLimits) -> BinaryIO:
    scheme = urllib.parse.urlsplit(name).scheme.lower() if isinstance(name, str) else ""
    if scheme == "data":
        return io.BytesIO(_data_uri(name, limits))
    if scheme in ("http", "https"):
        raise NotImplementedError("URLs")
    if scheme == "file":
        parts = urllib.parse.urlsplit(name)
        if parts.netloc not in ("", "localhost"):
            raise VideoOpenError(f"A file:// URI must name a file of this machine; got host {parts.netloc!r}.")
        name = urllib.request.url2pathname(parts.path)
    elif "://" in name:
        raise VideoOpenError(
            f"URLs of scheme {scheme!r} are not accepted, only http, https, file and data. Download the video first."
        )
    try:
        # Without O_NONBLOCK a named pipe would wait here for a writer; Windows has neither.
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise VideoOpenError(f"Cannot open {name!r}: {error}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VideoOpenError(f"{name!r} is not a regular file. Pass a file object to read from a pipe or device.")
    return open(descriptor, "rb", buffering=0)


def _data_uri(uri: str, limits: VideoLimits) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise VideoOpenError("A data: URI has the form data:video/mp4;base64,...; this one has no comma.")
    if not header.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    _check_size(len(payload) * 3 // 4, limits)
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise VideoOpenError(f"The data: URI is not valid base64: {error}.") from error


def _spooled(stream, limits: VideoLimits) -> BinaryIO:
    """What cannot be rewound is kept in memory up to 16 MiB and on disk beyond."""
    file = tempfile.SpooledTemporaryFile(max_size=16 * 1024**2)
    while piece := stream.read(1024**2):
        file.write(piece)
        _check_size(file.tell(), limits)
    return file


def _check_size(size: int, limits: VideoLimits) -> None:
    if size > limits.max_bytes:
        raise VideoLimitError(f"The video has more than max_bytes={limits.max_bytes} bytes. {_RAISE_LIMITS}")
    if size == 0:
        raise VideoOpenError("The video file is empty.")


class _Input:
    """What FFmpeg sees of a file: its bytes, and no name by which to choose a format or find a neighbour."""

    name = "video"

    def __init__(self, file: BinaryIO, clock: _Clock):
        self._file, self._clock = file, clock

    def read(self, size: int) -> bytes:
        self._clock.check()
        piece = self._file.read(size)
        # PyAV copies the answer into a buffer of `size` bytes without looking at its length.
        if not isinstance(piece, bytes) or len(piece) > size:
            raise VideoOpenError(
                f"read({size}) of the file object must return at most as many bytes; got {type(piece).__name__}"
                + (f" of length {len(piece)}." if isinstance(piece, bytes) else ". Open it in binary mode.")
            )
        return piece

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


class _Clock:
    """Seconds of work spent so far; stands still while the caller has the frames."""

    def __init__(self, limits: VideoLimits):
        self._limit = limits.max_decode_seconds
        self._spent, self._since = 0.0, time.monotonic()

    def check(self) -> None:
        if self._spent + time.monotonic() - self._since > self._limit:
            raise VideoTimeoutError(f"Decoding took longer than max_decode_seconds={self._limit}. {_RAISE_LIMITS}")

    @contextmanager
    def paused(self):
        self._spent += time.monotonic() - self._since
        yield
        self._since = time.monotonic()


# --- From a file to pictures ------------------------------------------------------------------------------------------

# Containers that hold pictures and sound themselves. What reads further files by name (playlists, concat, SDP, image
# sequences) is not among them.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,mpeg,mpegvideo,avi,gif,flv,asf,ogg,h264,hevc,m4v,ivf,obu"


def _refuse_to_open(*args, **kwargs):
    raise VideoOpenError("A video file must not refer to other files.")


class _Decoder:
    """Pictures of one file, in order of presentation."""

    def __init__(self, file: BinaryIO, *, limits: VideoLimits, num_threads: int):
        self._file, self._limits, self._num_threads = file, limits, num_threads
        self._clock = _Clock(limits)
        self._open()

    def _open(self) -> None:
        self._file.seek(0)
        try:
            self._container = av.open(
                _Input(self._file, self._clock),
                mode="r",
                options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"},
                metadata_errors="replace",
                io_open=_refuse_to_open,
            )
        except (av.error.FFmpegError, UnicodeError) as error:
            raise VideoOpenError(
                f"FFmpeg cannot open this as a video file ({error}). Accepted formats: {_FORMATS}."
            ) from error
        self._stream = self._pick_stream()
        self._context = self._stream.codec_context
        self._context.thread_count = self._num_threads
        self._context.thread_type = "AUTO"
        self._context.options = {"max_pixels": str(self._limits.max_pixels)}

    def _pick_stream(self):
        attached = int(av.stream.Disposition.attached_pic)
        for stream in self._container.streams.video:
            if not int(stream.disposition) & attached and stream.codec_context is not None:
                break
        else:
            raise NoVideoStreamError("The file has no video stream that FFmpeg can decode.")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > self._limits.max_pixels:
            raise VideoLimitError(
                f"Pictures of {width}x{height} have more than max_pixels={self._limits.max_pixels}. {_RAISE_LIMITS}"
            )
        return stream

    def info(self, request: _Request) -> _Info:
        rate = self._stream.average_rate or self._stream.guessed_rate or self._stream.base_rate
        fps = float(rate) if rate else 25.0
        tick = self._stream.time_base
        if self._stream.duration:
            duration = float(self._stream.duration * tick)
        elif self._container.duration:
            duration = self._container.duration / 1e6
        else:
            duration = self._scan(fps)
        if duration > self._limits.max_duration_seconds:
            raise VideoLimitError(
                f"The video lasts {duration:.0f} s, more than max_duration_seconds="
                f"{self._limits.max_duration_seconds}. {_RAISE_LIMITS}"
            )
        self._fps, self._moments = fps, request.moments(duration)
        if self._moments is not None and len(self._moments) > self._limits.max_frames:
            raise VideoLimitError(
                f"{len(self._moments)} frames are more than max_frames={self._limits.max_frames}. {_RAISE_LIMITS}"
            )
        return _Info(
            fps=fps,
            duration_seconds=duration,
            total_num_frames=self._stream.frames or max(1, round(duration * fps)),
            width=self._context.width,
            height=self._context.height,
            codec=self._context.name,
            num_wanted=None if self._moments is None else len(self._moments),
        )

    def _scan(self, fps: float) -> float:
        """Seconds, by reading every packet."""
        count, first, last = 0, math.inf, -math.inf
        for packet in self._container.demux(self._stream):
            if packet.size:
                count += 1
                if packet.pts is not None:
                    first = min(first, packet.pts)
                    last = max(last, packet.pts + (packet.duration or 0))
        self._open()
        if last > first:
            return float((last - first) * self._stream.time_base)
        return count / fps

    def pictures(self, request: _Request) -> Iterator[_Picture]:
        held, targets = None, deque(self._moments or ())
        for seconds, frame in self._frames():
            if self._moments is None:
                if request.end_seconds is not None and seconds >= request.end_seconds:
                    return
                if seconds >= request.start_seconds:
                    yield self._picture(seconds, frame)
                continue
            wanted = False
            while targets and held is not None and targets[0] + 1e-7 < seconds:
                targets.popleft()
                wanted = True
            if wanted:
                yield self._picture(*held)
            held = (seconds, frame)
            if not targets:
                return
        if targets and held is not None:
            yield self._picture(*held)

    def _frames(self):
        start, last = self._stream.start_time, -1 / self._fps
        try:
            for packet in self._container.demux(self._stream):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    continue
                for frame in frames:
                    if frame.pts is None:
                        seconds = last + 1 / self._fps
                    else:
                        start = frame.pts if start is None else start
                        seconds = float((frame.pts - start) * self._stream.time_base)
                    last = seconds
                    yield seconds, frame
        except av.error.FFmpegError as error:
            warnings.warn(f"The file ends in the middle: {error}.", VideoDecodeWarning, stacklevel=6)

    def _picture(self, seconds: float, frame) -> _Picture:
        rgb = frame.reformat(format="rgb24")
        plane = rgb.planes[0]
        return _Picture(
            seconds=seconds,
            pixels=memoryview(plane),
            width=rgb.width,
            height=rgb.height,
            line_size=plane.line_size,
            orientation=_orientation(frame),
            valid=not frame.is_corrupt,
        )


def _orientation(frame) -> tuple[bool, bool, bool]:
    """(transpose, mirror, upside down) that turn the stored picture upright, for quarter turns and mirrorings.

    FFmpeg's display matrix (a b u, c d v, x y w) sends the point (p, q) to (a p + c q, b p + d q).
    """
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("<5i", bytes(matrix)[:20])
    if a == d == 0 and b and c:
        return True, c < 0, b < 0
    return False, a < 0, d < 0
