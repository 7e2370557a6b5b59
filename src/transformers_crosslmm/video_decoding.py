"""Video files to frames: exact, bounded in memory, and safe with files from strangers.

A frame is asked for by time and found by its presentation timestamp: the frame at `t` is the last one that is due at
or before `t`. Times are seconds from the start of the video stream. Pixels are FFmpeg's own conversion to 8-bit RGB at
full size, turned upright as the file asks; `frame_transform` is applied to each frame as soon as it is decoded, so
that full-size frames never pile up.

How (see docs/decisions.md): compressed packets are read ahead of the decoder until the wanted one is known, so that
decoding starts at the last keyframe before it and pictures that nothing depends on are skipped. A damaged group of
pictures is decoded again without skipping; what stays missing is reported, never filled in silently.

This file imports only the standard library and PyAV at its top, so that the worker process of `isolated=True`, which
runs this very file, starts quickly and can be given little memory.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import http.client
import io
import ipaddress
import json
import math
import os
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast

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
    max_memory_bytes: memory of the process of `isolated=True`.
    max_redirects: how often an http(s) URL may lead to another one.
    network_timeout_seconds: how long a server may stay silent.
    allow_private_addresses: let URLs lead to this machine and to private networks.
    """

    max_bytes: int = 16 * 1024**3
    max_pixels: int = 8192 * 4320
    max_frames: int = 1_000_000
    max_output_bytes: int = 16 * 1024**3
    max_duration_seconds: float = 24 * 3600.0
    max_decode_seconds: float = 3600.0
    max_memory_bytes: int = 4 * 1024**3
    max_redirects: int = 5
    network_timeout_seconds: float = 30.0
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
    end = _check_part(duration_seconds, start_seconds, end_seconds)
    duration = end - start_seconds
    if fps is not None:
        # The tolerance keeps k / fps == duration out when the product rounds up.
        count = max(1, math.ceil(duration * fps - 1e-6))
        if max_frames is None or count <= max_frames:
            return [start_seconds + k / fps for k in range(count)]
        wanted = max_frames
    else:
        wanted = min(num_frames or 1, max_frames or num_frames or 1)
    return [start_seconds + (i + 0.5) * duration / wanted for i in range(wanted)]


_ENDLESS = 1e12
"""Seconds: stands for a duration that is not known yet, to check everything else."""


def _check_part(duration_seconds: float, start_seconds: float, end_seconds: float | None) -> float:
    """The end of the part of the video that is looked at."""
    end = duration_seconds if end_seconds is None else min(end_seconds, duration_seconds)
    if not 0 <= start_seconds < end:
        length = "" if duration_seconds == _ENDLESS else f" and a video of {duration_seconds:.3f} s"
        raise ValueError(
            f"`start_seconds` must lie in the video and before `end_seconds`; got start_seconds={start_seconds}, "
            f"end_seconds={end_seconds}{length}."
        )
    return end


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

    source: path, `file://`, `data:` or http(s) URI, the bytes of a file, or a binary file object (read from its
        start).
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
            sample_times(
                _ENDLESS,
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
            _check_part(duration_seconds, self.start_seconds, self.end_seconds)
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


# --- From pictures to tensors ----------------------------------------------------------------------------------------


def _chunks(source, *, chunk_size, request, frame_transform, limits, num_threads, strict, isolated):
    with _opened(source, limits) as opened:
        if isolated:
            pictures = _isolated(opened, request, limits, num_threads)
        else:
            pictures = _read(opened, request, limits, num_threads)
        with closing(pictures):
            yield from _stack(next(pictures), pictures, chunk_size, frame_transform, limits, strict)


def _stack(info, pictures, chunk_size, frame_transform, limits, strict):
    import torch

    announced = info.num_wanted or info.total_num_frames
    num_returned, bad_times, trouble = 0, [], ""
    slots, seconds, valid, size = None, [], [], (info.width, info.height)

    def chunk():
        """What has come since the last chunk; nothing of it is kept."""
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
        del frame  # nobody should hold it while a chunk is looked at
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


# --- From a source to a file -----------------------------------------------------------------------------------------

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
            file, own = _spooled(file, limits, _Clock(limits)), True
        size = file.seek(0, os.SEEK_END)
        _check_size(size if isinstance(size, int) else file.tell(), limits)
        file.seek(0)
        yield file
    finally:
        if own:
            file.close()


def _open_named(name: str, limits: VideoLimits) -> BinaryIO:
    scheme = name.partition(":")[0].lower() if isinstance(name, str) else ""
    if scheme == "data":
        return io.BytesIO(_data_uri(name, limits))
    if scheme in ("http", "https"):
        return _download(name, limits)
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
        reason = getattr(error, "strerror", None) or error
        raise VideoOpenError(
            f"Cannot open {name!r}: {reason}. Check the path; a relative one begins in the current folder."
        ) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        remedy = "Name a file in it" if stat.S_ISDIR(mode) else "Pass a file object to read from a pipe or device"
        raise VideoOpenError(f"{name!r} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}. {remedy}.")
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


def _spooled(stream, limits: VideoLimits, clock: _Clock) -> BinaryIO:
    """What cannot be rewound is kept in memory up to 16 MiB and on disk beyond."""
    file = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=16 * 1024**2))  # noqa: SIM115, the caller closes it
    while piece := stream.read(64 * 1024):
        clock.check()
        file.write(piece)
        _check_size(file.tell(), limits)
    return file


def _check_size(size: int, limits: VideoLimits) -> None:
    if size > limits.max_bytes:
        raise VideoLimitError(f"The video has more than max_bytes={limits.max_bytes} bytes. {_RAISE_LIMITS}")
    if size == 0:
        raise VideoOpenError("The video file is empty. Copy or download it again.")


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


# --- From a URL to a file --------------------------------------------------------------------------------------------


def _download(url: str, limits: VideoLimits) -> BinaryIO:
    """The body of an http(s) answer, checked at every redirect and never larger than `max_bytes`."""
    clock = _Clock(limits)
    for _ in range(limits.max_redirects + 1):
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise VideoOpenError(f"{url!r} is not a URL: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise VideoOpenError(f"A video URL must be http(s) with a host name; got {url!r}.")
        if parts.username is not None:
            raise VideoOpenError("A video URL must not carry a user name or password. Download the video first.")
        with closing(_connection(parts.scheme, parts.hostname, port, limits)) as connection:
            try:
                path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
                query = "?" + urllib.parse.quote(parts.query, safe="/?%:@!$&'()*+,;=~-._") if parts.query else ""
                connection.request("GET", path + query, headers={"Accept-Encoding": "identity"})
                answer = connection.getresponse()
                target = answer.headers.get("Location")
                if answer.status in (301, 302, 303, 307, 308) and target:
                    url = urllib.parse.urljoin(url, target)
                    continue
                if answer.status != 200:
                    raise VideoOpenError(f"{url!r} answers with status {answer.status} {answer.reason}.")
                _check_size(1 if answer.length is None else answer.length, limits)
                file = _spooled(answer, limits, clock)
                if answer.length:
                    raise VideoOpenError(f"The download of {url!r} ends {answer.length} bytes early.")
                return file
            except (OSError, http.client.HTTPException) as error:
                raise VideoOpenError(f"Cannot download {url!r}: {error}.") from error
    raise VideoLimitError(f"The URL redirects more than max_redirects={limits.max_redirects} times. {_RAISE_LIMITS}")


def _connection(scheme: str, host: str, port: int, limits: VideoLimits) -> http.client.HTTPConnection:
    """A connection to an address that was checked itself, so that a second look-up cannot lead elsewhere."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(address[0]) for *_, address in found]
        for address in addresses:
            if not limits.allow_private_addresses and not _is_public(address):
                raise VideoOpenError(
                    f"{host!r} leads to {address}, which is not a public address. Pass "
                    "`limits=VideoLimits(allow_private_addresses=True)` if that is intended."
                )
        stream = socket.create_connection((addresses[0], port), timeout=limits.network_timeout_seconds)
        if scheme == "https":
            stream = ssl.create_default_context().wrap_socket(stream, server_hostname=host)
    except (OSError, UnicodeError) as error:
        raise VideoOpenError(f"Cannot connect to {host!r}: {error}.") from error
    connection = http.client.HTTPConnection(host, port, timeout=limits.network_timeout_seconds)
    connection.sock = stream
    return connection


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # Addresses that carry an IPv4 address lead where that one leads: mapped, 6to4, Teredo and NAT64.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(str(inner))
    return ip.is_global and not ip.is_multicast


# --- From a file to pictures -----------------------------------------------------------------------------------------

# Containers that hold pictures and sound themselves. What reads further files by name (playlists, concat, SDP, image
# sequences) is not among them.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,mpeg,mpegvideo,avi,gif,flv,asf,ogg,h264,hevc,m4v,ivf,obu"

# Containers whose packets carry presentation times and which can be entered in the middle. All others, and pictures
# that build on each other without end (gif), are decoded from their first to their last packet.
_SEEKABLE = ("mov", "matroska", "mpegts", "mpeg", "avi", "flv", "asf")
_QUEUE_BYTES = 64 * 1024**2
_EARLY_PICTURES = 32
# Packets to read beyond the moment looked for: some containers do not store when a packet is decoded, and FFmpeg's
# guess may be off by the pictures it holds back.
_MARGIN = 8
# A moment this little before a picture still counts as its own, or the rounding of k / fps would decide.
_LATE = 1e-7


def _refuse_to_open(*args, **kwargs):
    raise VideoOpenError("A video file must not refer to other files.")


class _Untimed(Exception):
    """A packet carries no presentation time, so that pictures can only be counted."""


# Threads of a colour conversion do not survive a fork: a data loader's worker that frees one made by its parent waits
# for them for ever. Older PyAV has no such setting.
_ONE_THREAD = {"threads": 1} if "threads" in (av.VideoFrame.reformat.__doc__ or "") else {}


class _File:
    """One video stream of one file: packets, a decoder, and the way back and forth."""

    def __init__(self, file: BinaryIO, *, limits: VideoLimits, num_threads: int):
        self._file, self._limits, self._num_threads = file, limits, num_threads
        self.clock = _Clock(limits)
        self.trouble: str | None = None
        self._orientations: dict[int, tuple[bool, bool, bool]] = {}
        # FFmpeg decodes pictures to learn about a stream; how large they are it knows without.
        self._opened_stream(probe=False)
        self.open()
        stream = self._stream
        self.tick = stream.time_base
        self.format_name, self.codec = self._container.format.name, self._context.name
        self.width, self.height = self._context.width, self._context.height
        # Where pictures are only counted, the average is FFmpeg's default and the guess the stream's own word.
        rate = stream.average_rate if stream.start_time is not None else stream.guessed_rate
        rate = rate or stream.guessed_rate or stream.base_rate
        self.fps = float(rate) if rate and 0 < rate < 1000 else 25.0
        self.start = None if self.format_name == "avi" else stream.start_time
        # AVI counts pictures in the order of decoding: FFmpeg's times are late, or wrong where it cannot tell in which
        # order they are shown.
        self.reordered = self.format_name == "avi" and self.codec in ("h264", "hevc")
        self.seekable = (
            self.format_name.split(",")[0] in _SEEKABLE and self.codec not in ("gif", "apng") and not self.reordered
        )
        # Other containers announce the end of their longest stream only.
        ends = stream.start_time is not None and stream.duration and self.format_name.split(",")[0] in ("mov", "avi")
        self.announced_end = stream.start_time + stream.duration if ends else None
        self._count: int | None = None
        self.duration_seconds = self._duration()
        self.total_num_frames = self._count or stream.frames or max(1, round(self.duration_seconds * self.fps))

    def open(self, *, strict: bool = True) -> None:
        """Open the file, or begin again at its first packet.

        A strict decoder reports errors that FFmpeg would otherwise paint over with what was there before.
        """
        self._container, self._stream = self._opened_stream()
        for stream in self._container.streams:
            if stream is not self._stream and hasattr(stream, "discard"):  # PyAV < 17.1 reads and drops the others
                stream.discard = av.stream.Discard.all
        self._context = self._opened_context(self._stream, strict=strict)
        self._packets = self._container.demux(self._stream)

    def _opened_stream(self, *, probe: bool = True):
        self._file.seek(0)
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
        if not probe:
            options["codec_whitelist"] = "none"
        message = f"FFmpeg cannot open this as a video: it is cut off, or none of {_FORMATS.replace(',', ', ')}."
        with _translated_errors(message, VideoOpenError):
            container = av.open(
                _Input(self._file, self.clock),
                mode="r",
                # Not `options`: PyAV 15 writes past their end where streams show up late, as in flv and mpegts.
                container_options=options,
                metadata_errors="replace",
                buffer_size=65536,
                io_open=_refuse_to_open,
            )
        for stream in container.streams.video:
            if not stream.disposition & av.stream.Disposition.attached_pic and stream.codec_context is not None:
                break
        else:
            raise NoVideoStreamError("The file has no video stream that FFmpeg can decode.")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > self._limits.max_pixels:
            raise VideoLimitError(
                f"Pictures of {width}x{height} have more than max_pixels={self._limits.max_pixels}. {_RAISE_LIMITS}"
            )
        if not stream.time_base:
            raise VideoOpenError("The video stream does not say in which unit its times are.")
        return container, stream

    def _opened_context(self, stream, *, strict: bool):
        context = stream.codec_context
        context.thread_count = self._num_threads
        # FFmpeg's VP8 and VP9 decoders crash on some damaged files when they decode several frames at a time.
        context.thread_type = "SLICE" if context.name in ("vp8", "vp9") else "AUTO"
        context.options = {"max_pixels": str(self._limits.max_pixels)} | ({"err_detect": "explode"} if strict else {})
        # Some decoders (dav1d) keep the `skip_frame` that they are opened with.
        with _translated_errors(f"FFmpeg cannot decode {context.name}.", VideoDecodeError):
            context.open()
        return context

    @cached_property
    def _lenient(self):
        """A decoder that does what players do with damage, and the container that holds it."""
        position = self._file.tell()
        container, stream = self._opened_stream()
        self._file.seek(position)
        return self._opened_context(stream, strict=False), container

    @property
    def reports_at_once(self) -> bool:
        """Whether an error belongs to the packet that went in last: with threads it comes later."""
        return self._context.thread_count == 1

    def _duration(self) -> float:
        start_seconds = float((self.start or 0) * self.tick)
        if self._stream.duration and self._stream.start_time is not None:
            seconds = float(self._stream.duration * self.tick)
        elif self._container.duration and self.seekable:
            # Such containers announce when they end, whenever the stream begins.
            seconds = self._container.duration / 1e6
            seconds -= start_seconds if start_seconds < seconds else 0
        else:
            seconds = self._scan()
        if not seconds > 0:  # unknown, as of one picture
            seconds = 1 / self.fps
        if seconds > self._limits.max_duration_seconds:
            raise VideoLimitError(
                f"The video lasts {seconds:.0f} s, more than max_duration_seconds="
                f"{self._limits.max_duration_seconds}. {_RAISE_LIMITS}"
            )
        return seconds

    def _scan(self) -> float:
        """Seconds, by reading every packet."""
        count, first, last = 0, None, None
        while (packet := self.read()) is not None:
            count += 1
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                last = max(packet.pts if last is None else last, packet.pts + (packet.duration or 0))
        self.open()
        self._count = count
        return count / self.fps if last is None or last == first else float((last - first) * self.tick)

    def read(self):
        """The stream's next packet, or None at the end of what can be read."""
        self.clock.check()
        try:
            for packet in self._packets:
                if packet.size:
                    return packet
        except (av.error.FFmpegError, IndexError) as error:  # PyAV stumbles over streams that show up late
            self.trouble = self.trouble or str(error)
        return None

    def seek(self, pts: int) -> bool:
        try:
            self._container.seek(pts, stream=self._stream)
        except (av.error.FFmpegError, OverflowError):
            return False
        self._packets = self._container.demux(self._stream)
        return True

    def keyframe_between(self, low: int, high: int) -> bool | None:
        """Whether the container's index has a keyframe in (low, high]; None where it does not tell."""
        entries = getattr(self._stream, "index_entries", None)  # PyAV < 17 does not show them
        if not self.format_name.startswith("mov") or not entries or entries[-1].timestamp < high:
            return None
        found = entries.search_timestamp(high, backward=True)
        return found >= 0 and entries[found].timestamp > low

    def decode(self, packet, *, skip: bool = False, lenient: bool = False) -> list[av.VideoFrame]:
        """Pictures that come out when `packet` goes in, None for those still inside; `skip` leaves out a picture on
        which no other depends."""
        self.clock.check()
        context = self._lenient[0] if lenient else self._context
        context.skip_frame = "NONREF" if skip else "DEFAULT"
        try:
            return context.decode(packet)
        except EOFError:
            return []
        except av.error.MemoryError as error:
            raise VideoLimitError(f"Decoding asks for more memory than there is. {_RAISE_LIMITS}") from error

    def flush(self) -> None:
        """Forget what the decoders hold."""
        self._context.flush_buffers()
        if "_lenient" in self.__dict__:
            self._lenient[0].flush_buffers()

    def ticks(self, seconds: float) -> int:
        """The last moment of the stream's clock that is not after `seconds`."""
        return (self.start or 0) + math.floor(min((seconds + _LATE) / self.tick, 2.0**62))

    def seconds(self, pts: int) -> float:
        return float((pts - (self.start or 0)) * self.tick)

    def picture(self, seconds: float, frame) -> _Picture:
        with _translated_errors("FFmpeg cannot convert the picture to RGB.", VideoDecodeError):
            rgb = frame.reformat(format="rgb24", **_ONE_THREAD)
        plane = rgb.planes[0]
        # One frame per angle is asked for its matrix: asking ties a frame to its side data in a cycle, and it would
        # stay in memory until the garbage collector comes by.
        if frame.rotation not in self._orientations:
            self._orientations[frame.rotation] = _orientation(frame)
        return _Picture(
            seconds=seconds,
            pixels=memoryview(plane),
            width=rgb.width,
            height=rgb.height,
            line_size=plane.line_size,
            orientation=self._orientations[frame.rotation],
            valid=not frame.is_corrupt,
        )

    def no_picture(self, seconds: float) -> _Picture:
        return _Picture(seconds, None, self.width, self.height, 0, (False, False, False), False)


@contextmanager
def _translated_errors(message: str, kind: type[VideoError]):
    """FFmpeg's errors as ours: `av.error` classes depend on its version and say nothing about the remedy."""
    try:
        yield
    except av.error.MemoryError as error:
        raise VideoLimitError(f"{message} ({error}: it asks for more memory than there is)") from error
    except (av.error.FFmpegError, UnicodeError, OverflowError) as error:
        raise kind(f"{message} ({getattr(error, 'strerror', None) or error})") from error


def _orientation(frame) -> tuple[bool, bool, bool]:
    """(transpose, mirror, upside down) that turn the stored picture upright, for quarter turns and mirrorings.

    FFmpeg's display matrix (a b u, c d v, x y w) sends the point (p, q) to (a p + c q, b p + d q).
    """
    matrix = next((entry for entry in frame.side_data if entry.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if a == d == 0 and b and c:
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _read(opened: BinaryIO, request: _Request, limits: VideoLimits, num_threads: int):
    """What is known of the video, then its pictures, then what went wrong on the way (a sentence or nothing)."""
    file = _File(opened, limits=limits, num_threads=num_threads)
    moments = request.moments(file.duration_seconds)
    if moments is not None and len(moments) > limits.max_frames:
        raise VideoLimitError(f"{len(moments)} frames are more than max_frames={limits.max_frames}. {_RAISE_LIMITS}")
    yield _Info(
        fps=file.fps,
        duration_seconds=file.duration_seconds,
        total_num_frames=file.total_num_frames,
        width=file.width,
        height=file.height,
        codec=file.codec,
        num_wanted=None if moments is None else len(moments),
    )
    yield from _pictures(file, request, moments)
    yield f"Reading ended early: {file.trouble}." if file.trouble else ""


def _pictures(file: _File, request: _Request, moments: list[float] | None) -> Iterator[_Picture]:
    """The pictures asked for, in order; where one is missing, an empty one of the same shape."""
    held: list[_Picture] = []
    like: _Picture | None = None
    for picture in _decoded(file, request, moments):
        if picture.pixels is not None:
            like = picture
        held.append(picture)
        if like is None:
            continue
        for picture in held:
            if picture.pixels is None:
                picture = replace(picture, width=like.width, height=like.height, orientation=like.orientation)
            with file.clock.paused():
                yield picture
        held.clear()
    if like is None and not held and not file.trouble:
        raise VideoDecodeError("No frame is due in the part of the video asked for.")
    if like is None:
        raise VideoDecodeError(f"No frame of the video can be decoded. ({file.trouble or 'FFmpeg gives no reason'})")


def _decoded(file: _File, request: _Request, moments: list[float] | None) -> Iterator[_Picture]:
    if file.seekable:
        last_seconds = -math.inf
        try:
            for picture in _LookAhead(file).pictures(request, moments):
                last_seconds = picture.seconds
                yield picture
            return
        except _Untimed:
            yield from _in_sequence(file, request, moments, after=last_seconds)
    else:
        yield from _in_sequence(file, request, moments)


def _in_sequence(file: _File, request: _Request, moments, *, after: float = -math.inf) -> Iterator[_Picture]:
    """Decode everything from the first packet; picture k of a stream without times is due at k / fps."""
    file.open(strict=False)
    targets = None if moments is None else deque(moments)
    end = math.inf if request.end_seconds is None or moments is not None else request.end_seconds
    held = None
    for seconds, frame in _counted(file):
        if targets is None:
            if seconds >= end - _LATE:
                return
            if seconds >= request.start_seconds - _LATE and seconds > after:
                yield file.picture(seconds, frame)
            continue
        wanted = False
        while targets and held is not None and targets[0] + _LATE < seconds:
            targets.popleft()
            wanted = True
        if wanted and held[0] > after:
            yield file.picture(*held)
        if not targets:
            return
        held = (seconds, frame)
    if targets and held is not None and held[0] > after:
        yield file.picture(*held)


def _counted(file: _File) -> Iterator[tuple[float, av.VideoFrame]]:
    last = -1 / file.fps
    while True:
        packet = file.read()
        try:
            frames = file.decode(packet)
        except av.error.FFmpegError as error:
            file.trouble = file.trouble or str(error)
            frames = []
        for frame in frames:
            seconds = last + 1 / file.fps
            if frame.pts is not None and not file.reordered:
                file.start = frame.pts if file.start is None else file.start
                seconds = max(file.seconds(frame.pts), seconds if last < 0 else last)
            last = seconds
            yield seconds, frame
        if packet is None:
            return


class _Damaged(Exception):
    """Pictures in `_LookAhead.pending` do not come out right."""


class _LookAhead:
    """Pictures by presentation time, decoding as little as possible.

    Packets are read ahead of the decoder until some are decoded later than the target is due (dts > target): no later
    packet can be due by then, so the wanted one is known. Decoding starts at the last keyframe due by the target, goes
    no further than the wanted packet, and leaves out pictures that no other depends on.

    A group of pictures that turns out damaged (an error, a picture missing or marked corrupt) is decoded again by the
    lenient decoder without leaving anything out (care 1), then, if pictures are still missing or corrupt, once more
    from one keyframe earlier (care 2): streams that refresh gradually need it. What does not come right then, and what
    was decoded after the packet with the error, is handed out as not valid.
    """

    def __init__(self, file: _File):
        self.file = file
        self.queue: deque[av.Packet] = deque()  # read and not yet decoded
        self.queue_bytes = 0
        self.due: list[int] = []  # ascending pts of packets read, later than `last`
        self.recent: deque[float] = deque(maxlen=_MARGIN)  # dts of the packets read last
        self.ended = False
        self.end: int | None = None  # when the last picture read is over
        self.early: dict[int, av.VideoFrame] = {}  # pictures out that a later target may want
        self.pending: deque[int] = deque()  # pts wanted, given to the decoder and not yet out
        self.last: int | None = None  # pts last wanted
        self.keyframe: int | None = None  # where decoding began
        self.awaited: int | None = None  # the keyframe, until the decoder has shown that it starts cleanly there
        self.gradual = False  # keyframes only begin a refresh: what they promise is right one keyframe later
        self.proof: int | None = None  # the keyframe that made it look so
        self.fresh = True  # the decoder has been given nothing yet
        self.care = 0
        self.careful_until: float = -math.inf
        self.again: set[int] = set()  # pts that were pending in something damaged
        self.fed: int | None = None  # pts of the packet that went in last
        self.leading = False  # whether pictures due before the keyframe went in: they may need what lies before it
        self.broken: set[int] = set()  # pts of packets from which on decoding goes wrong
        self.excused: set[int] = set()  # such pts, if it turns out that the keyframe itself was damaged
        self.doubtful: set[int] = set()  # pts of pictures decoded from there on
        self.clean_groups = self.broken_groups = 0
        self.habit = False  # nothing decodes without errors: the encoder breaks a rule that does not matter
        self.patience_seconds = 4.0  # stretches up to this are read through rather than jumped over

    def pictures(self, request: _Request, moments: list[float] | None) -> Iterator[_Picture]:
        file = self.file
        if file.start is None:
            file.start = self._first_pts()
        todo = deque(max(file.ticks(moment), file.start) for moment in moments or ())
        first, end, every = -math.inf, math.inf, moments is None
        if every and request.start_seconds > 0:
            first = file.ticks(request.start_seconds - 2 * _LATE) + 1
            self._start_at(first)
        if every and request.end_seconds is not None:
            end = file.ticks(request.end_seconds - 2 * _LATE) + 1
        while True:
            try:
                if todo:
                    yield from self._serve(todo[0])
                    todo.popleft()
                elif every:
                    every = yield from self._serve_next(first, end)
                else:
                    yield from self._drain()
                    break
            except _Damaged:
                todo.extendleft(reversed(self.pending))
                self._begin_again()
        if moments is None and file.announced_end is not None and self._after_the_data(file.announced_end - 1):
            file.trouble = file.trouble or f"the data ends after {file.seconds(self.end):.3f} s"

    def _serve(self, target: int):
        """Hand out the last picture due at `target`, unless it was the last one already."""
        if target > self.careful_until and self._worth_seeking(target):
            yield from self._drain()
            self._trust()
            self._start_at(target)
        pts = yield from self._find(target)
        lost = target in self.again and pts != target
        self.again.discard(target)
        if lost or self._after_the_data(target):
            yield from self._drain()
            yield self.file.no_picture(self.file.seconds(target))
        elif pts is not None:
            yield from self._show(pts)

    def _serve_next(self, first: float, end: float):
        """Hand out the next picture due in [first, end); False when there is none."""
        while (pts := (yield from self._find(None))) is not None and pts < first:
            self._pass(pts)
        if pts is None or pts >= end:
            return False
        yield from self._show(pts)
        return True

    def _show(self, pts: int):
        if pts > self.careful_until:
            yield from self._jump(pts)
        self._pass(pts)
        self.pending.append(pts)
        if self.broken and not self._lenient:
            raise _Damaged
        if pts in self.early:
            yield from self._receive([self.early.pop(pts)])
        else:
            yield from self._feed(pts)

    def _pass(self, pts: int) -> None:
        self.last = pts
        del self.due[: bisect.bisect_right(self.due, pts)]
        self.early = {early: frame for early, frame in self.early.items() if early >= pts}

    # Reading

    def _read(self) -> None:
        packet = self.file.read()
        if packet is None:
            self.ended = True
            return
        if packet.pts is None:
            raise _Untimed
        self.recent.append(-math.inf if packet.dts is None else packet.dts)
        self.queue.append(packet)
        self.queue_bytes += packet.size
        # The pictures before an edit list's start are decoded and not shown.
        if not packet.is_discard:
            over = packet.pts + (packet.duration or 0)
            self.end = over if self.end is None else max(self.end, over)
            if self.last is None or packet.pts > self.last:
                bisect.insort(self.due, packet.pts)

    def _read_past(self, pts: float) -> bool:
        return self.ended or (len(self.recent) == _MARGIN and min(self.recent) > pts)

    def _find(self, target: int | None):
        """pts of the last picture due at `target` (None: of the next one), None if it is not a new one."""
        while True:
            position = bisect.bisect_right(self.due, target) if target is not None else 0
            if position == 0 and self.due and (target is None or self.last is None):
                position = 1  # before the first picture, it is the first one
            wanted = self.due[position - 1] if position else None
            limit = max((moment for moment in (target, wanted) if moment is not None), default=math.inf)
            if self._read_past(limit):
                return wanted
            self._read()
            # A stretch without keyframes is not kept as packets: all before the best one so far can be left out.
            while self.queue_bytes > _QUEUE_BYTES:
                yield from self._feed_one(skip=wanted is not None and self.queue[0].pts < wanted)

    def _first_pts(self) -> int:
        while len(self.queue) < 4 * _MARGIN and not self.ended:
            self._read()
        return self.due[0] if self.due else 0

    def _after_the_data(self, target: int) -> bool:
        """Whether a picture is announced for `target`, but the file is cut off before it."""
        end, announced_end = self.end, self.file.announced_end
        if not self.ended or end is None or announced_end is None:
            return False
        return end + 1.5 / (self.file.fps * self.file.tick) <= target < announced_end

    # Jumping

    def _worth_seeking(self, target: int) -> bool:
        position = self.recent[-1] if self.recent else self.file.start
        if self.ended or position == -math.inf or target <= position:
            return False
        between = self.file.keyframe_between(position, target)
        if between is not None:
            return between
        return (target - position) * self.file.tick > self.patience_seconds

    def _start_at(self, pts: int, *, earlier: bool = False) -> None:
        """Begin at a keyframe due by `pts`, or at the first packet."""
        self._flush()
        behind, step, at = self.recent[-1] if self.recent else -math.inf, max(1, round(1 / self.file.tick)), pts
        while True:
            rewound = at <= self.file.start or not self.file.seek(at)
            if rewound:
                self.file.open()
            self.queue.clear()
            self.recent.clear()
            self.due.clear()
            self.queue_bytes, self.ended = 0, False
            while not self.ended and not self.queue and not self._read_past(pts):
                self._read()
                if not rewound and self.queue and not self.queue[0].is_keyframe:
                    self._drop_first()
            if rewound or (self.queue and self.queue[0].pts <= pts):
                break
            at, step = at - step, 2 * step
        self._begun()
        if rewound:
            self.awaited = None
        elif self.gradual and self.keyframe > self.file.start and not earlier:
            self._start_at(self.keyframe - 1, earlier=True)
        if self.recent and self.recent[-1] <= behind:
            self.patience_seconds *= 2

    def _begun(self) -> None:
        self.keyframe = self.queue[0].pts if self.queue else None
        self.awaited = None if self.queue and self.queue[0].is_discard else self.keyframe
        self.leading = False

    def _drop_first(self) -> None:
        packet = self.queue.popleft()
        self.queue_bytes -= packet.size
        place = bisect.bisect_left(self.due, packet.pts)
        if self.due[place : place + 1] == [packet.pts]:
            del self.due[place]

    def _jump(self, pts: int):
        """Leave out what lies before the last keyframe in the queue from which `pts` can be decoded."""
        keyframes = []
        for place, packet in enumerate(self.queue):
            if packet.is_keyframe and packet.pts <= pts:
                keyframes.append(place)
            if packet.pts == pts:
                break
        else:
            return
        if self.gradual and keyframes:
            keyframes.pop()
        if not keyframes or (keyframes[-1] == 0 and (self.fresh or not self.care)):
            return
        yield from self._drain()
        for _ in range(keyframes[-1]):
            self._drop_first()
        self._trust()
        self._begun()

    def _trust(self) -> None:
        """Go on with care 0."""
        self.clean_groups += self.care == 0
        self.care = 0
        self.broken.clear()
        self.doubtful.clear()

    def _begin_again(self) -> None:
        first = self.pending[0]
        self.again.update(self.pending)
        self.careful_until = max(self.careful_until, self.pending[-1])
        self.pending.clear()
        self.last = first - 1
        self.broken_groups += self.keyframe in self.broken and self.care == 0
        self.habit |= self.clean_groups == 0 and self.broken_groups > 3
        self.care += 1
        self.doubtful.clear()
        earlier = self.care > 1 and self.keyframe is not None
        self._start_at(min(first, self.keyframe - 1) if earlier else first)

    # Decoding

    @property
    def _lenient(self) -> bool:
        return self.care > 0 or self.gradual or self.habit

    def _feed(self, pts: int):
        """Decode up to the packet of `pts`."""
        to_go = next((place + 1 for place, packet in enumerate(self.queue) if packet.pts == pts), 0)
        for _ in range(to_go):
            yield from self._feed_one(skip=self.queue[0].pts < pts)

    def _feed_one(self, *, skip: bool):
        packet = self.queue.popleft()
        self.queue_bytes -= packet.size
        self.fresh = False
        self.fed = packet.pts
        self.leading |= self.keyframe is not None and packet.pts < self.keyframe
        if packet.is_corrupt:  # a transport stream counts what it sends
            self._blame()
        if not self.habit and (self.doubtful or packet.pts in self.broken):
            self.doubtful.add(packet.pts)
        try:
            frames = self.file.decode(
                packet,
                skip=skip and self.care == 0 and not packet.is_keyframe and packet.pts not in self.pending,
                lenient=self._lenient,
            )
        except av.error.FFmpegError:
            self._blame()
            return
        yield from self._receive(frames)

    def _blame(self) -> None:
        """Note where decoding went wrong: at the last packet, or with threads anywhere since the keyframe."""
        at_once = self.file.reports_at_once
        if at_once and self.keyframe is not None and self.fed is not None and self.fed < self.keyframe:
            return
        place = self.fed if at_once else self.keyframe
        if place is not None and (at_once or not self.leading):
            self.broken.add(place)
        if self.pending and not self._lenient:
            raise _Damaged from None

    def _drain(self):
        if not self.fresh:
            try:
                frames = self.file.decode(None, lenient=self._lenient)
            except av.error.FFmpegError:
                frames = []
                self._blame()
            yield from self._receive(frames)
        yield from self._miss(math.inf)
        self._flush()

    def _flush(self) -> None:
        self.file.flush()
        self.fresh = True
        self.fed = None
        self.early.clear()

    def _receive(self, frames: list[av.VideoFrame]):
        for frame in frames:
            pts = frame.pts
            if pts is None:
                raise _Untimed
            if self.awaited is not None and pts >= self.awaited:
                self._see_start(pts)
            if self.proof is not None and self.keyframe is not None and pts >= self.proof > self.keyframe:
                self._see_proof(pts)
            yield from self._miss(pts)
            if self.pending and self.pending[0] == pts:
                if frame.is_corrupt and self.care < 2:
                    raise _Damaged
                self.pending.popleft()
                picture = self.file.picture(self.file.seconds(pts), frame)
                yield replace(picture, valid=False) if pts in self.doubtful else picture
            elif self.last is None or pts > self.last:
                self.early[pts] = frame
                if len(self.early) > _EARLY_PICTURES:
                    del self.early[next(iter(self.early))]

    def _see_start(self, pts: int) -> None:
        """The first picture out should be the keyframe. If not, it may only begin a gradual refresh, during which
        errors are to be expected."""
        keyframe, self.awaited = self.awaited, None
        if pts > keyframe:
            if not self.gradual:
                self.gradual, self.proof = True, keyframe
            self.excused |= self.broken
            self.broken.clear()
            self.doubtful.clear()
            if self.pending and self.care < 2:
                raise _Damaged

    def _see_proof(self, pts: int) -> None:
        """Seen from one keyframe earlier, a refresh has a picture where it begins; a damaged keyframe has none."""
        if pts > self.proof:
            self.gradual = False
            self.broken |= self.excused
            self.doubtful.update(self.pending, [self.proof])
        self.excused.clear()
        self.proof = None

    def _miss(self, pts: float):
        """Pictures come out in order: those pending before `pts` do not come."""
        while self.pending and self.pending[0] < pts:
            if self.care < 2:
                raise _Damaged
            yield self.file.no_picture(self.file.seconds(self.pending.popleft()))


# --- In a process of its own -----------------------------------------------------------------------------------------


def _isolated(opened: BinaryIO, request: _Request, limits: VideoLimits, num_threads: int):
    """`_read` in a process that may use `max_memory_bytes` and `max_decode_seconds`, and is killed beyond.

    It gets the file as its standard input and nothing else; pictures come back as bytes, a line of JSON before each.
    """
    if sys.platform == "win32":
        raise NotImplementedError("`isolated=True` needs the resource limits of POSIX, which Windows lacks.")
    task = {"request": asdict(request), "limits": asdict(limits), "num_threads": num_threads}
    with _as_real_file(opened) as file:
        # -P keeps this package's folder out of the path; the rest of the path is the caller's.
        worker = subprocess.Popen(
            [sys.executable, "-P", __file__, json.dumps(task)],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    pipe = _Pipe(worker, limits)
    try:
        while "end" not in (header := json.loads(pipe.line())):
            if "error" in header:
                raise _ERRORS[header["error"]](header["message"])
            if "fps" in header:
                yield _Info(**header)
                continue
            size = header.pop("size")
            height, line_size = header["height"], header["line_size"]
            if size and not 0 < 3 * header["width"] * height <= size == abs(line_size) * height:
                raise VideoDecodeError("The decoder process sends a picture of the wrong size.")
            header["orientation"] = tuple(header["orientation"])
            yield _Picture(pixels=memoryview(pipe.take(size)) if size else None, **header)
        yield header["end"]
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()


@contextmanager
def _as_real_file(opened: BinaryIO):
    """A file that another process can read from its start."""
    try:
        opened.fileno()
        opened.seek(0)
    except (OSError, AttributeError):
        with tempfile.TemporaryFile() as copy:
            opened.seek(0)
            shutil.copyfileobj(opened, copy)
            copy.seek(0)
            yield copy
    else:
        yield opened


class _Pipe:
    """What the worker writes, with an eye on the clock and on its end."""

    def __init__(self, worker: subprocess.Popen, limits: VideoLimits):
        self._worker, self._limits = worker, limits
        self._left = limits.max_decode_seconds
        self._buffer = bytearray()

    def _more(self) -> None:
        began = time.monotonic()
        ready, _, _ = select.select([self._worker.stdout], [], [], max(0, self._left))
        self._left -= time.monotonic() - began
        if not ready:
            raise VideoTimeoutError(
                f"Decoding took longer than max_decode_seconds={self._limits.max_decode_seconds}. {_RAISE_LIMITS}"
            )
        piece = os.read(self._worker.stdout.fileno(), 1024**2)
        if not piece:
            status = self._worker.wait()
            if status == -signal.SIGXCPU:
                raise VideoTimeoutError(f"Decoding took longer than max_decode_seconds. {_RAISE_LIMITS}")
            raise VideoDecodeError(f"The decoder process died on this video (status {status}).")
        self._buffer += piece

    def line(self) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > 2**16:
                raise VideoDecodeError("The decoder process sends no header.")
            self._more()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def take(self, size: int) -> bytearray:
        while len(self._buffer) < size:
            self._more()
        taken = self._buffer[:size]
        del self._buffer[:size]
        return taken


_ERRORS = {
    kind.__name__: kind
    for kind in (
        VideoError,
        VideoOpenError,
        NoVideoStreamError,
        VideoLimitError,
        VideoTimeoutError,
        VideoDecodeError,
        ValueError,
    )
}


def _work() -> None:
    """The worker's side of `_isolated`."""
    import resource

    task = json.loads(sys.argv[1])
    limits, request = VideoLimits(**task["limits"]), _Request(**task["request"])
    resource.setrlimit(resource.RLIMIT_AS, (limits.max_memory_bytes, limits.max_memory_bytes))
    seconds = math.ceil(limits.max_decode_seconds * max(1, task["num_threads"])) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = sys.stdout.buffer

    def send(**header) -> None:
        out.write(json.dumps(header).encode() + b"\n")

    try:
        for item in _read(sys.stdin.buffer.raw, request, limits, task["num_threads"]):
            if isinstance(item, _Info):
                send(**asdict(item))
            elif isinstance(item, str):
                send(end=item)
            else:
                pixels = item.pixels or b""
                header = {field.name: getattr(item, field.name) for field in fields(item) if field.name != "pixels"}
                send(size=len(pixels), **header)
                out.write(pixels)
            out.flush()
    except ValueError as error:
        kind = type(error).__name__
        send(error=kind if kind in _ERRORS else "ValueError", message=str(error))
    except MemoryError:
        message = f"Decoding needs more than max_memory_bytes={limits.max_memory_bytes}. {_RAISE_LIMITS}"
        send(error="VideoLimitError", message=message)
    out.flush()


if __name__ == "__main__":
    _work()
